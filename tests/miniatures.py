"""Small Wan transformers with weights from a formula, saved in every layout that AR video models are published in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from demo.model import TinyConfig, TinyWan

GOLDEN = TinyConfig(dim=48, ffn_dim=64, num_layers=2, num_heads=4, in_dim=4, text_dim=32, freq_dim=16)
CAUSAL = TinyConfig(dim=128, ffn_dim=256, num_layers=2, num_heads=1)
SHIFTED = ("norm_q.weight", "norm_k.weight", "norm3.weight")
# diffusers' names of a Wan transformer's modules, as its conversion script for SkyReels-V2 tells them.
DIFFUSERS = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    (".modulation", ".scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("fps_projection.0", "fps_projection.net.0.proj"),
    ("fps_projection.2", "fps_projection.net.2"),
    ("norm3", "norm2"),
    ("self_attn.o.", "attn1.to_out.0."),
    ("cross_attn.o.", "attn2.to_out.0."),
    *((f"self_attn.{name}.", f"attn1.to_{name}.") for name in "qkv"),
    *((f"cross_attn.{name}.", f"attn2.to_{name}.") for name in "qkv"),
    ("self_attn.norm", "attn1.norm"),
    ("cross_attn.norm", "attn2.norm"),
)


def formula(name: str, shape: torch.Size, shift: bool = False) -> Tensor:
    """The weights of ``golden/tiny_df_model.json``."""
    h = sum(name.encode()) % 97
    scale = math.sqrt(shape[-1]) if len(shape) > 1 else 4.0
    i = torch.arange(shape.numel(), dtype=torch.float64)
    w = 1.6 * torch.sin(0.731 * i + 0.17 * h + 0.003 * i * h) / scale
    return (w + float(shift)).reshape(shape).float()


def wan_weights(config: TinyConfig, frame_rate: bool = False) -> dict[str, Tensor]:
    """By Wan's own names; with SkyReels-V2's embedding of the frame rate where asked for."""
    shapes = {key: value.shape for key, value in TinyWan(config).state_dict().items()}
    if frame_rate:
        dim = config.dim
        shapes |= {
            "fps_embedding.weight": torch.Size((2, dim)),
            "fps_projection.0.weight": torch.Size((dim, dim)),
            "fps_projection.0.bias": torch.Size((dim,)),
            "fps_projection.2.weight": torch.Size((6 * dim, dim)),
            "fps_projection.2.bias": torch.Size((6 * dim,)),
        }
    return {key: formula(key, shape, key.endswith(SHIFTED)) for key, shape in shapes.items()}


class UnfoldedWan(TinyWan):
    """A model that is told its frame rate as SkyReels-V2 does it: added to the projected time embedding."""

    def __init__(self, config: TinyConfig, weights: Mapping[str, Tensor], rate_class: int) -> None:
        super().__init__(config)
        self.load_state_dict({key: value for key, value in weights.items() if not key.startswith("fps_")})
        told = [weights[f"fps_projection.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
        hidden = F.silu(F.linear(weights["fps_embedding.weight"][rate_class], *told[:2]))
        self.told = F.linear(hidden, *told[2:]).unflatten(0, (6, -1))
        self.eval().requires_grad_(False)

    def embed_time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        e, e0 = super().embed_time(sigma)
        return e, e0 + self.told


def diffusers_layout(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in weights.items():
        for ours, theirs in DIFFUSERS:
            key = key.replace(ours, theirs)
        renamed[key] = value
    return renamed


def prefixed(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def training_file(weights: Mapping[str, Tensor], inner: str = "model.", ema: bool = True) -> dict[str, object]:
    """What the trainers of Self-Forcing, Causal-Forcing and CausVid save: the generator, its critic, and with ``ema``
    the moving average, whose weights are ``weights``; the others' are something else."""
    other = {key: value + 1.0 for key, value in prefixed(weights, "model.").items()}
    saved = {"generator": other if ema else prefixed(weights, inner), "critic": other, "step": 600}
    return saved | ({"generator_ema": prefixed(weights, inner)} if ema else {})


def save_whole(weights: Mapping[str, Tensor], path: Path, config: Mapping[str, object] | None = None) -> Path:
    """A safetensors file, with ``config`` as ComfyUI reads it from the metadata."""
    metadata = None if config is None else {"config": json.dumps({"transformer": dict(config)})}
    save_file({key: value.clone().contiguous() for key, value in weights.items()}, path, metadata)
    return path


def save_parts(weights: Mapping[str, Tensor], folder: Path, stem: str, count: int, **options) -> list[Path]:
    """The same over several files, as sharded checkpoints are."""
    keys = sorted(weights)
    return [
        save_whole(
            {key: weights[key] for key in keys[number::count]},
            folder / f"{stem}-{number + 1:05}-of-{count:05}.safetensors", **options,
        )
        for number in range(count)
    ]  # fmt: skip
