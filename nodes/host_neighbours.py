"""What else is on a MODEL that cannot go with ours: core's own caches, windows and copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CORE_CACHE = "easycache"  # where core's EasyCache and LazyCache keep themselves in a model's options


def check_other_caches(node: str, model_options: Mapping[str, Any]) -> None:
    """Raises ValueError where core's EasyCache or LazyCache is on the model too."""
    other = model_options.get("transformer_options", {}).get(CORE_CACHE)
    if other is not None:
        name = getattr(other, "name", "EasyCache")
        raise ValueError(
            f"{node}: {name} is on the model too, and one would skip steps on top of what the other skipped; remove "
            f"{name}, or the acceleration nodes of AR Video."
        )


def check_windows(node: str, model_options: Mapping[str, Any]) -> None:
    """Raises ValueError where core's context windows would cut what ``node`` cuts itself."""
    if model_options.get("context_handler") is not None:
        raise ValueError(
            f"{node}: context windows are on the model, and segments are windows already; remove the context windows "
            "node and set segment and overlap here."
        )


def check_cards(node: str, model: Any) -> None:
    """Raises ValueError where core's MultiGPU CFG Split has each guidance branch computed by another copy of the model:
    kept K/V belong to one."""
    if model.get_additional_models_with_key("multigpu"):
        raise ValueError(
            f"{node}: MultiGPU CFG Split is on the model, and K/V kept between calls belong to one copy of it; remove "
            "MultiGPU CFG Split, or Active Frame Window, Shared Prefix Cache, Chunk Cache and a cfg other than 1 in "
            "causal blocks."
        )
