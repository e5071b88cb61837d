"""What a bounded K/V store does to the video: strategies on the same clips, against unbounded K/V and against truth.

Three rollouts of every strategy on a clip:

- closed: the video of a seed and its prompt; PSNR to the one of unbounded K/V, and the share of prompted shapes shown.
- open: every block is denoised from the same noise behind the same history, the clean latents of the unbounded video;
  PSNR of the block against the unbounded store's, so that errors do not add up.
- truth: the continuation of the first latent frames of a simulated clip; PSNR and centre error against what the
  simulation does next.

Curves are per segment of ``Clips.segment`` latent frames. What a store of ``Clips.budget`` latent frames still holds
whole says nothing about it, so ``closed`` and ``open`` count the latent frames after that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from accel.call import Call, Kind
from accel.engine import Acceleration, Run
from accel.metrics import drift, psnr, psnr_per_segment
from demo.data import Scenes, render, simulate
from demo.evaluate import segment_accuracy
from demo.generate import start_noise
from demo.judge import clear, read, track
from demo.prompt import embed_scenes

from .kv_runs import ANN, BLOCK, SINK, UNBOUNDED, Rollout, accelerations
from .runs import codec, judge
from .scenes import prompt, shapes

SCENES = 31_000  # first seed of the simulated clips
RESAMPLES = 4000
NEAR = 1.0  # dB within which a strategy counts as close to unbounded K/V
Get = Callable[[str, dict[str, Any], Callable[[], Any]], Any]


@dataclass(frozen=True, slots=True)
class Clips:
    """``count`` videos of ``frames`` latent frames, in segments of ``segment``."""

    count: int
    frames: int
    segment: int

    @property
    def budget(self) -> int:
        """Latent frames of K/V, a quarter of the video, but no fewer than two blocks."""
        return max(self.frames // 4, 2 * BLOCK)

    def bounds(self, first: int = 0) -> list[tuple[int, int]]:
        """Latent frames ``[start, end)`` of each segment from ``first`` on."""
        starts = range(first, self.frames, self.segment)
        return [(start, min(start + self.segment, self.frames)) for start in starts]


class OnHistory(Run):
    """Commits given latents ``[1, 16, T, 8, 8]`` in place of those just made."""

    def __init__(self, history: Tensor, acceleration: Acceleration, *parts: Any) -> None:
        super().__init__(acceleration, *parts)
        self._given = history

    def step(self, call: Call, x: Tensor) -> tuple[Tensor, bool]:
        """As ``Run.step``."""
        if call.kind is Kind.COMMIT:
            x = self._given[:, :, call.offset : call.offset + x.shape[2]]
        return super().step(call, x)


@lru_cache(maxsize=1)
def unbounded(seed: int, frames: int) -> Tensor:
    """Latents of the video with all its K/V."""
    return Rollout(Acceleration(), prompt(seed), frames).latents(start_noise(seed, frames), seed)


@lru_cache(maxsize=1)
def truth(seed: int, frames: int) -> tuple[Scenes, Tensor]:
    """A simulated clip without a cut, and its latents ``[1, 16, T, 8, 8]``."""
    scenes = simulate(SCENES + seed, 1, frames, cuts=0.0)
    return scenes, codec().encode(render(scenes))


def closed(acceleration: Acceleration, seed: int, clips: Clips) -> dict[str, Any]:
    """The video of a seed, against the one with all K/V, and what it shows."""
    reference = codec().decode(unbounded(seed, clips.frames))
    made = Rollout(acceleration, prompt(seed), clips.frames).latents(start_noise(seed, clips.frames), seed)
    video = codec().decode(made)
    return {
        "closed": compared(reference, video, clips),
        "accuracy": segment_accuracy(read(judge(), video), shapes(seed), clips.bounds()),
    }


def opened(acceleration: Acceleration, seed: int, clips: Clips) -> dict[str, Any]:
    """Blocks behind the history of the video with all K/V, against that video's."""
    history = unbounded(seed, clips.frames)
    make = partial(OnHistory, history, acceleration)
    made = Rollout(acceleration, prompt(seed), clips.frames, make).latents(start_noise(seed, clips.frames), seed)
    return {"open": compared(codec().decode(history), codec().decode(made), clips)}


def compared(reference: Tensor, video: Tensor, clips: Clips) -> dict[str, Any]:
    """PSNR after the first ``clips.budget`` latent frames, pooled and by segment; None where nothing differs."""
    first = clips.budget
    pooled = psnr(reference[:, :, first:], video[:, :, first:])
    curve = psnr_per_segment(reference, video, clips.bounds(first))
    return {"psnr": _finite(pooled), "curve": [_finite(value) for value in curve]}


def continued(acceleration: Acceleration, seed: int, clips: Clips) -> dict[str, Any]:
    """Continuation of the first block of a simulated clip, against the simulation."""
    scenes, latents = truth(seed, clips.frames)
    real, noise = codec().decode(latents), start_noise(seed, clips.frames)
    made = Rollout(acceleration, embed_scenes(scenes), clips.frames).latents(noise, seed, latents[:, :, :BLOCK])
    video, bounds = codec().decode(made), clips.bounds(BLOCK)
    error = (track(read(judge(), video), scenes.colour) - scenes.centre).norm(dim=-1)
    counted = clear(scenes) & ~error.isnan()
    centres = []
    for start, end in bounds:
        found = error[:, start:end][counted[:, start:end]]
        centres.append(float(found.mean()) if found.numel() else None)
    pooled = psnr(real[:, :, BLOCK:], video[:, :, BLOCK:])
    return {"truth": {"psnr": pooled, "curve": psnr_per_segment(real, video, bounds), "centres": centres}}


def measure(clips: Clips, get: Get) -> dict[str, list[dict[str, Any]]]:
    """Figures of every strategy, one dictionary a clip; ``get`` finds what is stored."""
    chosen = accelerations(clips.budget)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for seed in range(1, clips.count + 1):
        for name, acceleration in chosen.items():
            figures: dict[str, Any] = {"seed": seed}
            for part in (closed, opened, continued):
                parts = {"config": repr(acceleration), "seed": seed} | asdict(clips) | {"count": 0}
                figures |= get(f"{part.__name__}-{name}", parts, partial(part, acceleration, seed, clips))
            rows[name].append(figures)
    return rows


def summary(rows: dict[str, list[dict[str, Any]]], clips: Clips) -> dict[str, Any]:
    """Means with intervals of every strategy, what follows from them, and the rows themselves."""
    table = [{"strategy": name} | _averages(found, name) for name, found in rows.items()]
    told = {"clips": clips.count, "frames": clips.frames, "segment": clips.segment, "budget": clips.budget}
    return told | {"table": table, "verdict": verdict(rows), "rows": rows}


def verdict(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Which strategy of equal bytes is closest to the truth, and to unbounded K/V block by block; how far the former is
    from unbounded K/V and from window + sink, in dB, clip by clip."""

    def values(name: str, part: str) -> list[float]:
        return [row[part]["psnr"] for row in rows[name]]

    bounded = [name for name in rows if name not in (UNBOUNDED, ANN)]
    best = max(bounded, key=lambda name: fmean(values(name, "truth")))
    others = {"unbounded": UNBOUNDED, "window": SINK}
    gaps = {
        f"to_{key}": interval([a - b for a, b in zip(values(best, "truth"), values(other, "truth"), strict=True)])
        for key, other in others.items()
    }
    opened_best = max(bounded, key=lambda name: fmean(_known(values(name, "open")) or [float("inf")]))
    pairs_open = zip(values(opened_best, "open"), values(SINK, "open"), strict=True)
    open_gaps = [ours - theirs for ours, theirs in pairs_open if None not in (ours, theirs)]
    return {
        "best": best, **gaps, "within": gaps["to_unbounded"]["mean"] >= -NEAR, "beats": gaps["to_window"]["low"] > 0,
        "open_best": opened_best, "open_to_window": interval(open_gaps),
    }  # fmt: skip


def interval(values: list[float]) -> dict[str, float] | None:
    """Mean, and the middle 95 % of the means of samples drawn from ``values`` with replacement; None without any."""
    if not values:
        return None
    given = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = given[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": fmean(values), "low": low, "high": high}


def _averages(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for part in ("closed", "open", "truth"):
        curves = [row[part]["curve"] for row in found]
        told[f"{part}_psnr"] = interval(_known([row[part]["psnr"] for row in found]))
        told[f"{part}_curve"] = [_mean([curve[place] for curve in curves]) for place in range(len(curves[0]))]
        told[f"{part}_drift"] = interval(_known([_slope(curve) for curve in curves]))
    told["accuracy"] = interval([fmean(row["accuracy"]) for row in found])
    told["accuracy_curve"] = [fmean(shares) for shares in zip(*(row["accuracy"] for row in found), strict=True)]
    centres = [row["truth"]["centres"] for row in found]
    told["centre_error"] = interval(_known([_mean(curve) for curve in centres]))
    told["centre_curve"] = [_mean([curve[place] for curve in centres]) for place in range(len(centres[0]))]
    return told


def _slope(curve: list[float | None]) -> float | None:
    if None in curve or len(curve) < 2:
        return None
    return drift(curve)


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: list[float | None]) -> float | None:
    known = _known(values)
    return fmean(known) if known else None
