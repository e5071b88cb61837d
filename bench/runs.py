"""What all measurements share: the prompt of a seed, and a run compared with the full one of the same seed."""

from __future__ import annotations

from torch import Tensor

from accel.metrics import drift, psnr, psnr_per_segment, relative_l2, ssim
from demo.codec import TinyCodec
from demo.data import simulate
from demo.generate import PLAN, Result
from demo.prompt import embed_scenes

PROMPTS = 4242


def bounds() -> list[tuple[int, int]]:
    """New latent frames of each segment."""
    return [(start + prefix, end) for start, end, prefix in PLAN.intervals()]


def prompt(seed: int) -> Tensor:
    """The prompt ``[1, 64, 64]`` that goes with a seed."""
    return embed_scenes(simulate(PROMPTS + seed, 1, 1))


def row(codec: TinyCodec, method: str, ours: bool, budget: float | None, seed: int, full: Result, run: Result) -> dict:
    """One row of the table; keys as in the README."""
    reference, video = codec.decode(full.latents), codec.decode(run.latents)
    whole, totals = full.timeline.totals(), run.timeline.totals()
    ratio = whole["flops"] / totals["flops"]
    same = run is full
    return {
        "model": "tiny-df",
        "method": method,
        "ours": ours,
        "budget": budget,
        "seed": seed,
        "calls": totals["calls"],
        "flops": totals["flops"],
        "flop_ratio": ratio,
        "seconds": run.seconds,
        "realised": full.seconds / run.seconds / ratio,
        "psnr": None if same else psnr(reference, video),
        "ssim": 1.0 if same else ssim(reference, video),
        "latent_rel_l2": 0.0 if same else relative_l2(full.latents, run.latents),
        "drift_db_per_segment": None if same else drift(psnr_per_segment(reference, video, bounds())),
        "state_bytes": totals.get("state_bytes", 0),
    }
