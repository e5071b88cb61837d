"""A saved workflow of core's own nodes with one of this pack's nodes in its MODEL line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo.model import TinyConfig, TinyWan, save_model

CHECKPOINT = "core-text.safetensors"
OURS, SAVE = 2, 10
CORE_TEXT = 1024
FRAMES, BLOCK = 6, 3


def save_checkpoint(models: Path) -> None:
    """A small causal model of random weights, for the conditioning that core's Lotus Conditioning gives."""
    config = TinyConfig(
        dim=128, ffn_dim=256, num_layers=2, num_heads=1, text_dim=CORE_TEXT, causal_ar=True, block=BLOCK
    )
    save_model(TinyWan(config), models / "diffusion_models" / CHECKPOINT)


def core_workflow(infos: dict[str, Any]) -> dict[str, Any]:
    """Core's way to sample a causal model, with Accelerate AR Video (node ``OURS``) behind the loader; UI format."""
    plan: list[tuple[str, list[Any], dict[str, tuple[int, int]]]] = [
        ("UNETLoader", [CHECKPOINT, "default"], {}),
        ("ARVAAccelerate", ["balanced", 40.0], {"model": (1, 0)}),
        ("LotusConditioning", [], {}),
        ("BasicGuider", [], {"model": (2, 0), "conditioning": (3, 0)}),
        ("BasicScheduler", ["simple", 2, 1.0], {"model": (2, 0)}),
        ("SamplerARVideo", [BLOCK], {}),
        ("RandomNoise", [5, "fixed"], {}),
        ("EmptyARVideoLatent", [64, 64, 4 * FRAMES - 3, 1], {}),
        ("SamplerCustomAdvanced", [], {
            "noise": (7, 0), "guider": (4, 0), "sampler": (6, 0), "sigmas": (5, 0), "latent_image": (8, 0),
        }),
        ("SaveLatent", ["latents/core"], {"samples": (9, 0)}),
    ]  # fmt: skip
    nodes, links = [], []
    for number, (kind, values, sources) in enumerate(plan, 1):
        info = infos[kind]
        inputs = []
        for name in [name for group in ("required", "optional") for name in info["input_order"].get(group, [])]:
            entry = {"name": name, "type": _type(info, name), "link": None}
            if name in sources:
                entry["link"] = len(links) + 1
                links.append([entry["link"], *sources[name], number, len(inputs), entry["type"]])
            inputs.append(entry)
        outputs = [
            {"name": name, "type": type_} for name, type_ in zip(info["output_name"], info["output"], strict=True)
        ]
        nodes.append(
            {"id": number, "type": kind, "mode": 0, "inputs": inputs, "outputs": outputs, "widgets_values": values}
        )
    return {"nodes": nodes, "links": links}


def _type(info: dict[str, Any], name: str) -> str:
    kind = next(info["input"][group][name][0] for group in info["input"] if name in info["input"][group])
    return "COMBO" if isinstance(kind, list) else kind
