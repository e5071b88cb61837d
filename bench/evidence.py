"""``python -m bench.evidence``: which signal knows how much the model's answer is about to change?

ARCache's evidence, redone on the tiny models: full runs, every call looked at. At each call the change of every signal
since the call before is set against the change of the velocity (relative L1 over the active latent frames), as
Spearman's rank correlation over all calls of a clip, mean over clips. ``within steps`` takes the noise level out: ranks
among the calls at the same solver step of the oldest active chunk, so that only what depends on the video is left.
Writes ``bench/results/evidence.json`` and ``evidence.md``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from accel.acceleration import Acceleration
from accel.call import Call, Kind
from accel.denoiser import Denoiser
from accel.engine import Run
from accel.signals import HOST_SIGNALS, SIGNALS, SignalMeter, level_step, relative_l1, remember_levels
from accel.timeline import Timeline

from .scenes import PLANS, Scene

RESULTS = Path(__file__).with_name("results")
NAMES = (*HOST_SIGNALS, *SIGNALS)


class Watching(Run):
    """Computes every call; ``seen`` holds, for every call but a segment's first, the oldest active step, the change of
    each signal and the change of the velocity."""

    def __init__(self, denoiser: Denoiser, timeline: Timeline) -> None:
        super().__init__(Acceleration(), denoiser, timeline)
        self.seen: list[tuple[int, dict[str, float], float]] = []

    def begin_segment(
        self, segment: int, frames: int, prefix: int, chunk: int = 1, table: Sequence[float] = ()
    ) -> None:
        """As ``Run``'s; what is remembered is that of one segment."""
        super().begin_segment(segment, frames, prefix, chunk, table)
        self._all = SignalMeter(tuple(SIGNALS), frames)
        self._before: dict[int, Tensor] = {}
        self._last: dict[int, float] = {}

    def step(self, call: Call, x: Tensor) -> tuple[Tensor, bool]:
        """As ``Run``'s."""
        velocity, true = super().step(call, x)
        if call.kind is Kind.DENOISE:
            self._watch(call, x, velocity)
        return velocity, true

    def _watch(self, call: Call, x: Tensor, velocity: Tensor) -> None:
        features = {kind: self.denoiser.feature(kind, call, x) for kind in self._all.kinds}
        changes = dict(zip(self._all.names, self._all.measure(features, call).tolist(), strict=True))
        changes |= {name: level_step(name, self._last, call) for name in HOST_SIGNALS}
        remember_levels(self._last, call)
        first = call.frames[0]
        known = [frame for frame, flag in enumerate(call.active, first) if flag and frame in self._before]
        if known:
            now = torch.stack([velocity[:, :, frame - first] for frame in known])
            change = float(relative_l1(now, torch.stack([self._before[frame] for frame in known])))
            step = max(step for step, flag in zip(call.steps, call.active, strict=True) if flag)
            self.seen.append((step, changes, change))
        self._before = {frame: velocity[:, :, frame - first] for frame in range(*call.frames)}


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0, equal values sharing their mean rank."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            found[place] = (start + end) / 2
        start = end + 1
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; NaN where one of them never changes."""
    first, second = ranks(one), ranks(other)
    means = fmean(first), fmean(second)
    product = sum((a - means[0]) * (b - means[1]) for a, b in zip(first, second, strict=True))
    sizes = (sum((a - mean) ** 2 for a in values) for values, mean in zip((first, second), means, strict=True))
    scale = math.sqrt(math.prod(sizes))
    return product / scale if scale else math.nan


def correlations(seen: list[tuple[int, dict[str, float], float]]) -> dict[str, dict[str, float]]:
    """By signal: over all calls, and within calls at the same solver step."""
    steps: dict[int, list[tuple[dict[str, float], float]]] = {}
    for step, changes, change in seen:
        steps.setdefault(step, []).append((changes, change))
    found = {}
    for name in NAMES:
        pairs = [(changes[name], change) for _, changes, change in seen if math.isfinite(changes[name])]
        inside = []
        for calls in steps.values():
            same = [(changes[name], change) for changes, change in calls if math.isfinite(changes[name])]
            if len(same) > 2:
                inside.append(spearman(*zip(*same, strict=True)))
        inside = [value for value in inside if math.isfinite(value)]
        found[name] = {
            "all": spearman(*zip(*pairs, strict=True)) if len(pairs) > 2 else math.nan,
            "within steps": fmean(inside) if inside else math.nan,
        }
    return found


def mean(values: Sequence[float]) -> float | None:
    """Mean of the finite ones; None without any."""
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    told: dict[str, dict] = {}
    for kind, plan in PLANS.items():
        scene, runs = Scene(kind, plan), []

        def watch(denoiser: Denoiser, timeline: Timeline, runs: list = runs) -> Watching:
            runs.append(Watching(denoiser, timeline))
            return runs[-1]

        for seed in range(1, arguments.clips + 1):
            scene.run(seed, make_run=watch)
            print(kind, seed, flush=True)
        clips = [correlations(run.seen) for run in runs]
        told[kind] = {
            name: {key: mean([clip[name][key] for clip in clips]) for key in ("all", "within steps")} for name in NAMES
        }
    lines = ["| signal | " + " | ".join(f"`{kind}`: all calls, within steps" for kind in told) + " |"]
    lines.append("|-" * (len(told) + 1) + "|")
    for name in NAMES:
        cells = (
            ", ".join("-" if value is None else f"{value:.2f}" for value in told[kind][name].values()) for kind in told
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "evidence.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "evidence.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
