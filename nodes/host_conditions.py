"""Which conditionings act at a noise level: stored velocities belong to one set of them.

Core switches conditionings, control models and hooks on and off along the noise levels. A velocity stored under another
set answers another question, so the set is part of what a run remembers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def shown_branches(conds: Sequence[list[dict] | None], sigma: float) -> tuple[list[int], int]:
    """Indices of the CFG branches that have a conditioning at ``sigma``, and how many conditionings that are."""
    counts = [sum(_holds(entry, sigma) for entry in entries or ()) for entries in conds]
    return [index for index, count in enumerate(counts) if count], sum(counts)


def signature(
    model: Any, conds: Sequence[list[dict] | None], shown: Sequence[int], sigma: float, model_options: dict[str, Any]
) -> tuple:
    """What a forward depends on besides latents and noise level; equal signatures may answer for one another."""
    window = model_options.get("transformer_options", {}).get("context_window")
    inside = tuple(getattr(window, "index_list", ()))
    branches = tuple(tuple(_state(entry, sigma) for entry in conds[index] if _holds(entry, sigma)) for index in shown)
    return id(model), tuple(shown), inside, branches


def _holds(entry: dict[str, Any], sigma: float) -> bool:
    """Whether core runs a conditioning at this noise level."""
    return sigma <= entry.get("timestep_start", sigma) and sigma >= entry.get("timestep_end", sigma)


def _state(entry: dict[str, Any], sigma: float) -> tuple:
    return (
        entry.get("uuid"),
        tuple(_controls(entry.get("control"), sigma)),
        tuple(_keyframes(entry.get("hooks"), sigma)),
    )


def _controls(control: Any, sigma: float) -> Iterator[tuple[int, bool]]:
    """Control models of a conditioning, and whether each acts."""
    while control is not None:
        start, end = control.timestep_range or (sigma, sigma)
        yield id(control), end <= sigma <= start
        control = control.previous_controlnet


def _keyframes(hooks: Any, sigma: float) -> Iterator[int]:
    """How many keyframes of every hook have begun."""
    for hook in hooks.hooks if hooks is not None else ():
        yield sum(keyframe.start_t >= sigma for keyframe in hook.hook_keyframe.keyframes)
