"""Forwards of a diffusion-forcing model by window, what skipping one costs, and schedules composed of both.

Each forward that a schedule makes is timed once: ``(frames, keys)`` latent frames that go through the model and that
they read. The others of the window answer with kept K/V. One CFG branch throughout: a second one doubles a forward and
leaves what is decided and predicted as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.acceleration import Acceleration, SchedulerConfig
from accel.call import Call, Decision, Kind
from accel.engine import Run
from accel.policy import TriModalConfig
from accel.sampling import SegmentPlan, diffusion_forcing
from accel.schedule import flow_sigmas
from accel.solver import EulerSolver
from accel.timeline import Timeline

from . import fullsize as full
from .gpu_clock import syncs
from .gpu_extent import Bench
from .gpu_model import InstantDenoiser, WanDenoiser, latents, random_model

SHIFT = 8.0
SCHEMES = (full.FULL, full.SUFFIX, full.ACTIVE)
LISTED = (full.FULL, full.SUFFIX, full.ACTIVE_WHOLE)
NEVER_SKIPS = SchedulerConfig(TriModalConfig(0.0, 1e-9, decay=1.0))
Pair = tuple[int, int]


def forwards(bench: Bench, told: dict[str, Any]) -> None:
    """Fills ``told`` with forwards, the cost of decisions and skips, and composed schedules."""
    extent, tokens = bench.extent, bench.extent.grid[0] * bench.extent.grid[1]
    whole = (extent.plan.segment, extent.plan.segment)
    pairs = sorted(distinct([extent.long, extent.plan]), reverse=True)
    seconds = timed_forwards(bench, tokens, pairs)
    counts = {pair: extent.shape.forward_flops(pair[0], tokens, pair[1] * tokens) for pair in pairs}
    told["forwards"] = [
        {"frames": frames, "keys": keys, "flops": counts[frames, keys], "seconds": taken, "rounds": rounds}
        for (frames, keys), (taken, rounds) in seconds.items()
    ]
    bench.say(f"forwards: {len(pairs)} windows, the whole one {seconds[whole][0]:.4g} s")
    told["steps"] = step_costs(bench)
    share = 1 / seconds[whole][0]
    told["figures"] = {
        "skip_share": told["steps"]["skip"]["wall"] * share,
        "skip_ms": told["steps"]["skip"]["wall"] * 1e3,
        "decision_share": told["steps"]["decision and history"]["queued"] * share,
    }
    told["composed"] = composed(
        extent, {pair: taken for pair, (taken, _) in seconds.items()}, counts, told["steps"]["skip"]["wall"]
    )
    told["large_block"] = large_block(bench, tokens)


def distinct(plans: Sequence[SegmentPlan]) -> set[Pair]:
    """Every ``(frames, keys)`` that a scheme forwards in one of the plans."""
    schemes = {*SCHEMES, *LISTED}
    return {pair for plan in plans for scheme in schemes for pairs in full.calls(plan, scheme) for pair in pairs}


def timed_forwards(bench: Bench, tokens: int, pairs: Sequence[Pair]) -> dict[Pair, tuple[float, int]]:
    """Median device seconds of each forward, and of how many rounds."""
    extent = bench.extent
    denoiser = WanDenoiser(random_model(extent.shape, bench), extent.shape, tokens, bench)
    x = latents(bench, extent.plan.segment, extent.grid)
    denoiser.keep(extent.plan.segment)
    denoiser.velocity(window_call(extent.plan.segment, extent.plan.segment, keep=True), x)

    def forward(pair: Pair) -> Callable[[int], Tensor]:
        call = window_call(*pair)
        return lambda number: denoiser.velocity(call, x[:, :, : pair[1]])

    times = bench.timed(bench.clock.device, {str(pair): forward(pair) for pair in pairs})
    return {pair: (times.median(str(pair)), times.rounds) for pair in pairs}


def window_call(frames: int, keys: int, keep: bool = False) -> Call:
    """A call of the last ``frames`` latent frames of the window ``[0, keys)``; all others answer with kept K/V."""
    sigmas = tuple(0.2 + 0.6 * frame / keys for frame in range(keys))
    queries = None if frames == keys and not keep else (keys - frames, keys)
    return Call(Kind.DENOISE, 0, 0, (0, keys), sigmas, (5,) * keys, (True,) * keys, total_steps=10, queries=queries)


def step_costs(bench: Bench) -> dict[str, dict[str, float]]:
    """What the engine takes beside the model, in a window of a whole segment whose latent frames all advance.

    ``skip``: a predicted call with its Euler update. ``decision and history``: what a computed call takes beyond the
    same call without acceleration. Each as ``queued`` (behind other work), ``wall`` (host time included) and ``syncs``
    (waits for the device in a call).
    """
    extent = bench.extent
    total = extent.rounds + extent.warmup + 4
    settings = {
        "off": Acceleration(),
        "decide": Acceleration(scheduler=NEVER_SKIPS),
        "skip": Acceleration(
            scheduler=SchedulerConfig(reach=None),
            replay=(Decision.RECOMPUTE,) * 3 + (Decision.PREDICT,) * total,
        ),
    }
    found: dict[str, dict[str, float]] = {"skip": {}, "decision and history": {}}
    for reading in ("queued", "wall"):
        works = {name: engine_steps(bench, one, total, update=name == "skip") for name, one in settings.items()}
        for work in works.values():
            for number in range(3):
                work(number)
        times = bench.timed(getattr(bench.clock, reading), works)
        found["skip"][reading] = times.median("skip")
        found["decision and history"][reading] = times.median("decide") - times.median("off")
    waits = {name: syncs(bench.device, lambda work=work: work(0)) for name, work in works.items()}
    found["skip"]["syncs"] = waits["skip"]
    found["decision and history"]["syncs"] = waits["decide"] - waits["off"]
    return found


def engine_steps(bench: Bench, acceleration: Acceleration, total: int, update: bool) -> Callable[[int], Any]:
    """A work that takes the next call of a synchronous segment, whatever its number."""
    extent = bench.extent
    frames, tokens = extent.plan.segment, extent.grid[0] * extent.grid[1]
    sets = [latents(bench, frames, extent.grid) for _ in range(3)]
    answers = [one.to(bench.dtype) for one in sets]
    run = Run(acceleration, InstantDenoiser(extent.shape, tokens, bench, answers), Timeline())
    table = flow_sigmas(total, SHIFT).tolist()
    run.begin_segment(0, frames, 0, 1, table)
    solver = EulerSolver(table, frames)
    calls = iter(range(total))

    def work(number: int) -> None:
        step = next(calls)
        call = Call(
            Kind.DENOISE, 0, step, (0, frames), (table[step],) * frames, (step + 1,) * frames, (True,) * frames,
            total_steps=total,
        )  # fmt: skip
        x = sets[step % len(sets)]
        velocity, true = run.step(call, x)
        if update:
            solver.step(x, velocity, call.steps, call.active, call.frames, true)

    return work


def forced_list(plan: SegmentPlan, bench: Bench) -> tuple[Decision, ...]:
    """What Tri-Modal Scheduler decides by default in a plan: its signal needs the noise levels alone."""
    host = Bench(bench.extent, torch.device("cpu"), torch.float32, bench.clock, bench.pace, bench.say)
    denoiser = InstantDenoiser(bench.extent.shape, 1, host, [torch.ones(1, 16, plan.segment, 2, 2)])
    timeline = Timeline()
    run = Run(Acceleration(scheduler=SchedulerConfig()), denoiser, timeline)
    noise = torch.ones(1, 16, plan.frames, 2, 2)
    for _ in diffusion_forcing(run, noise, plan, flow_sigmas(plan.steps, SHIFT)):
        pass
    return tuple(Decision(record.decision) for record in timeline.records)


def composed(extent, seconds: dict[Pair, float], flops: dict[Pair, int], skip: float) -> list[dict[str, Any]]:
    """Schedules by scheme, from the times of their forwards; ``skip`` seconds for each call that is not computed.

    Ratios are to the whole window at every call; ``realised`` is the ratio of times over that of FLOPs.
    """
    bench = Bench(extent, torch.device("cpu"), torch.float32, None, None, print)
    rows = []
    for name, plan in (("long", extent.long), ("loop", extent.plan)):
        whole = summed(full.calls(plan, full.FULL), None, seconds, flops, skip)
        decisions = forced_list(plan, bench)
        cases = [(scheme, None) for scheme in SCHEMES] + [(scheme, decisions) for scheme in LISTED]
        for scheme, chosen in cases:
            taken, spent, calls = summed(full.calls(plan, scheme), chosen, seconds, flops, skip)
            flop_ratio, time_ratio = whole[1] / spent, whole[0] / taken
            rows.append({
                "plan": name, "scheme": scheme, "list": "every call" if chosen is None else "forced list",
                "computed": calls[True], "skipped": calls[False], "seconds": taken, "pflop": spent / 1e15,
                "flop_ratio": flop_ratio, "time_ratio": time_ratio, "realised": time_ratio / flop_ratio,
            })  # fmt: skip
    return rows


def summed(
    calls, decisions: Sequence[Decision] | None, seconds: dict[Pair, float], flops: dict[Pair, int], skip: float
) -> tuple[float, int, Counter]:
    """Seconds and FLOPs of a schedule, and how many of its calls are computed (True) and skipped (False)."""
    taken, spent, count = 0.0, 0, Counter()
    for number, pairs in enumerate(calls):
        computed = decisions is None or decisions[number] is Decision.RECOMPUTE
        count[computed] += 1
        if computed:
            taken += sum(seconds[pair] for pair in pairs)
            spent += sum(flops[pair] for pair in pairs)
        else:
            taken += skip
    return taken, spent, count


def large_block(bench: Bench, tokens: int) -> dict[str, Any]:
    """One transformer block of the larger model over a whole segment, and what its forward would take."""
    extent, shape = bench.extent, bench.extent.large
    block = random_model(shape, bench, layers=1).blocks[0]
    frames = extent.plan.segment
    x, modulation = bench.random(1, frames * tokens, shape.dim), bench.random(1, frames, 6, shape.dim)
    turns = torch.linspace(0, 1, frames * tokens * shape.dim // shape.heads // 2, device=bench.device)
    rotations = torch.stack((turns.cos(), turns.sin()), -1).unflatten(0, (frames * tokens, -1))
    context = bench.random(1, shape.text_tokens, shape.dim)
    times = bench.timed(bench.clock.device, {"block": lambda number: block(x, modulation, rotations, context)})
    seconds, flops = times.median("block"), shape.block_flops(frames * tokens, frames * tokens)
    return {
        "seconds": seconds, "flops": flops, "rate": flops / seconds, "layers": shape.layers, "rounds": times.rounds,
    }  # fmt: skip
