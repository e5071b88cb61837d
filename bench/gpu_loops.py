"""Whole diffusion-forcing loops with forced decisions, and the memory that caching and prediction take beside them.

Every call of a loop goes through the engine and the Euler update; what is decided was decided before, because decisions
from random weights would mean nothing. Loops run in turn, forth and back, so that in the mean of its runs each has seen
the same heat. One CFG branch, as in ``gpu_forwards``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor

from accel.acceleration import Acceleration, SchedulerConfig
from accel.call import Decision
from accel.correct import CorrectionConfig
from accel.engine import Run
from accel.kv.frozen import FrozenConfig
from accel.sampling import SegmentPlan, diffusion_forcing
from accel.schedule import flow_sigmas
from accel.timeline import Timeline

from .gpu_clock import peak_bytes
from .gpu_extent import Bench
from .gpu_forwards import SHIFT, forced_list, window_call
from .gpu_model import WanDenoiser, latents, random_model

EVERY, LISTED, SUFFIX, FROZEN = "every call", "forced list", "forced list, suffix window", "forced list, frozen K/V"
REFRESH = 2.0  # of frozen K/V, as bench/README.md measured it
HELD = "forced list that holds, corrected"


def settings(decisions: tuple[Decision, ...]) -> dict[str, Acceleration]:
    """What is set in each loop."""
    listed = Acceleration(scheduler=SchedulerConfig(), replay=decisions)
    return {
        EVERY: Acceleration(),
        LISTED: listed,
        SUFFIX: replace(listed, suffix_window=True),
        FROZEN: replace(listed, frozen_window=FrozenConfig(REFRESH)),
    }


def loops(bench: Bench, told: dict[str, Any]) -> None:
    """Fills ``told`` with seconds and FLOPs of every loop, and the speed that arrives of that counted."""
    extent, plan = bench.extent, bench.extent.plan
    denoiser = _denoiser(bench)
    noise = latents(bench, plan.frames, extent.grid)
    for frames in range(plan.block, plan.segment + 1, plan.block):
        denoiser.velocity(window_call(frames, frames), noise[:, :, :frames])
    chosen = settings(forced_list(plan, bench))
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    timelines: dict[str, Timeline] = {}
    for number in range(extent.loop_rounds):
        if bench.pace.left < sum(taken[-1] for taken in seconds.values() if taken):
            bench.say("loops: no time for another round")
            break
        for name in chosen if number % 2 == 0 else reversed(list(chosen)):
            bench.pace.demand(name, max((taken[-1] for taken in seconds.values() if taken), default=0.0))
            timelines[name] = Timeline()
            taken = bench.clock.wall(loop(denoiser, chosen[name], noise, plan, timelines[name]))
            seconds[name].append(taken)
            bench.say(f"loops: {name}, {taken:.4g} s")
            told["loops"] = compared(seconds, timelines)
            told["figures"] = {
                f"realised_{key}": row["realised"]
                for key, name in (("listed", LISTED), ("suffix", SUFFIX), ("frozen", FROZEN))
                for row in told["loops"]
                if row["loop"] == name
            }


def compared(seconds: dict[str, list[float]], timelines: dict[str, Timeline]) -> list[dict[str, Any]]:
    """One row a loop; ratios are to the loop that computes every call, over the rounds that all have gone through."""
    rows, rounds = [], min(len(taken) for taken in seconds.values() if taken)
    for name, taken in seconds.items():
        if not taken:
            continue
        totals = timelines[name].totals()
        flop_ratio, time_ratio = totals["flop_ratio"], fmean(seconds[EVERY][:rounds]) / fmean(taken[:rounds])
        rows.append({
            "loop": name, "calls": totals["calls"], "seconds": fmean(taken[:rounds]), "runs": taken,
            "pflop": totals["flops"] / 1e15, "flop_ratio": flop_ratio, "time_ratio": time_ratio,
            "realised": time_ratio / flop_ratio, "state_bytes": totals.get("state_bytes", 0),
            "kv_bytes": totals.get("kv_bytes", 0),
        })  # fmt: skip
    return rows


def loop(
    denoiser: WanDenoiser, acceleration: Acceleration, noise: Tensor, plan: SegmentPlan, timeline: Timeline
) -> Callable[[], None]:
    """A work that samples a whole video."""

    def work() -> None:
        run = Run(acceleration, denoiser, timeline)
        for _ in diffusion_forcing(run, noise, plan, flow_sigmas(plan.steps, SHIFT)):
            pass

    return work


def memory(bench: Bench, told: dict[str, Any]) -> None:
    """Fills ``told`` with the peak memory of short synchronous loops: every latent frame is predicted at once."""
    extent = bench.extent
    plan = SegmentPlan(frames=extent.plan.segment, segment=extent.plan.segment, steps=extent.steps)
    noise = latents(bench, plan.frames, extent.grid)
    skips = tuple((Decision.RECOMPUTE, Decision.RECOMPUTE, Decision.PREDICT)) * extent.steps
    chosen = settings(skips[: extent.steps])
    chosen[HELD] = replace(
        chosen[LISTED], correction=CorrectionConfig(),
        replay=tuple(Decision.CACHE if one is Decision.PREDICT else one for one in skips[: extent.steps]),
    )  # fmt: skip
    chosen.pop(SUFFIX)
    peaks: dict[str, int] = {}
    _denoiser(bench).velocity(window_call(plan.frames, plan.frames), noise)
    for name in (EVERY, LISTED, HELD, FROZEN):
        bench.pace.demand(name)
        denoiser = _denoiser(bench)
        peaks[name] = peak_bytes(bench.device, loop(denoiser, chosen[name], noise, plan, Timeline()))
        bench.say(f"memory: {name}, {(peaks[name] - peaks[EVERY]) / 1e6:,.4g} MB beyond every call")
        told["peaks"] = [
            {"loop": key, "peak_bytes": peak, "extra_bytes": peak - peaks[EVERY]} for key, peak in peaks.items()
        ]
        extra = [peaks[key] - peaks[EVERY] for key in (LISTED, HELD) if key in peaks]
        if extra:
            told["figures"] = {"extra_peak_mb": max(extra) / 1e6}


def _denoiser(bench: Bench) -> WanDenoiser:
    shape, (rows, columns) = bench.extent.shape, bench.extent.grid
    return WanDenoiser(random_model(shape, bench), shape, rows * columns, bench)
