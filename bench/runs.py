"""What all measurements share: the figures of one run, compared with the full one of the same clip."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from statistics import fmean
from typing import Any

from torch import Tensor

from accel.metrics import drift, psnr, psnr_per_segment, relative_l2, ssim
from demo.codec import TinyCodec
from demo.evaluate import segment_accuracy
from demo.generate import Result
from demo.judge import Judge, load_judge, read

from .scenes import Scene, shapes


@lru_cache
def codec() -> TinyCodec:
    """The codec, read once."""
    return TinyCodec.load()


@lru_cache
def judge() -> Judge:
    """The judge, read once."""
    return load_judge()


@dataclass(frozen=True, slots=True)
class Reference:
    """The run that computes every call: ``latents`` ``[1, 16, T, 8, 8]``, its FLOPs and its process seconds."""

    latents: Tensor
    flops: int
    seconds: float

    @classmethod
    def of(cls, full: Result) -> Reference:
        return cls(full.latents, full.timeline.totals()["flops"], full.seconds)


def row(
    scene: Scene, method: str, ours: bool, budget: float | None, seed: int, full: Reference, run: Result
) -> dict[str, Any]:
    """One row of the table; keys as in the README. A run whose latents are those of ``full`` is not compared."""
    video, totals = codec().decode(run.latents), run.timeline.totals()
    ratio = full.flops / totals["flops"]
    figures = {
        "model": scene.kind,
        "method": method,
        "ours": ours,
        "budget": budget,
        "seed": seed,
        "calls": totals["calls"],
        "flops": totals["flops"],
        "flop_ratio": ratio,
        "seconds": run.seconds,
        "realised": full.seconds / run.seconds / ratio,
        "psnr": None,
        "ssim": 1.0,
        "latent_rel_l2": 0.0,
        "drift_db_per_segment": None,
        "attribute_accuracy": fmean(segment_accuracy(read(judge(), video), shapes(seed), scene.bounds)),
        "state_bytes": totals.get("state_bytes", 0),
    }
    if run.latents is full.latents:
        return figures
    return figures | closeness(codec().decode(full.latents), video, scene) | {
        "latent_rel_l2": relative_l2(full.latents, run.latents)
    }  # fmt: skip


def closeness(reference: Tensor, video: Tensor, scene: Scene) -> dict[str, float | None]:
    """PSNR, SSIM and drift of a video against its reference; None where a figure is not finite (equal videos)."""
    figures = {
        "psnr": psnr(reference, video),
        "ssim": ssim(reference, video),
        "drift_db_per_segment": drift(psnr_per_segment(reference, video, scene.bounds)),
    }
    return {key: value if isfinite(value) else None for key, value in figures.items()}
