"""Time and memory of causal rollouts: blocks against the unbounded store at equal length, and 10,000 latent frames."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from accel.acceleration import Acceleration
from accel.call import Call, Decision, Kind
from accel.engine import Run
from accel.kv.budget import KVBudgetConfig
from accel.sampling import causal_blocks
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.denoiser import TinyDenoiser
from demo.generate import start_noise

from .kv_counts import simulated_blocks
from .kv_rollout import BLOCK, FORWARDS, SHIFT, SINK, STEPS, UNBOUNDED, WINDOW, Extent, Rollout, Strategy, bounded
from .scenes import CAUSAL, loaded, prompt

GLANCE = 5  # every so many blocks of the long rollout, one of a store that stands still is timed
RECORDS = 10_000  # that a timeline's size is measured with, after as many that warm up


@torch.inference_mode()
def speed(extent: Extent, say: Callable[[str], None]) -> dict[str, Any]:
    """Process seconds and FLOPs of a block at several history lengths: unbounded and every bounded store in turn, in
    one process, ``extent.pairs`` rounds each."""
    stores = bounded(extent.budget)
    rollouts = {one.name: Rollout(one, 1, extent.histories[-1] + BLOCK * (extent.pairs + 2)) for one in stores}
    clean = {name: simulated_blocks(2) for name in rollouts}
    noise, rows = start_noise(1, BLOCK), []
    for latents in extent.histories:
        for name, rollout in rollouts.items():
            while rollout.end < latents:
                rollout.commit(next(clean[name]))
        whole = filled(latents)
        rows += rounds(whole, rollouts, noise, latents, extent.pairs)
        say(f"speed: {latents} latents, {rows[-len(stores) - 1]['seconds']:.3f} s a block unbounded")
    return {"budget": extent.budget, "pairs": extent.pairs, "rows": rows}


def filled(latents: int) -> Rollout:
    """A rollout whose unbounded store holds ``latents`` latent frames of random keys and values."""
    rollout = Rollout(Strategy(UNBOUNDED), 1, latents + BLOCK)
    store, shape = rollout.store, rollout.denoiser.model.config
    tokens, generator = latents * 16, torch.Generator().manual_seed(0)
    for layer in range(shape.num_layers):
        sides = torch.randn(2, 1, tokens, shape.num_heads, shape.dim // shape.num_heads, generator=generator)
        store.append(layer, *sides)
    store.commit()
    rollout.end = latents
    return rollout


def rounds(
    whole: Rollout, rollouts: dict[str, Rollout], noise: torch.Tensor, latents: int, pairs: int
) -> list[dict[str, Any]]:
    """Medians of ``pairs`` rounds after one that is not counted, and the median ratios to the unbounded store and to
    the window in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in (UNBOUNDED, *rollouts)}
    flops = {}
    for number in range(pairs + 1):
        for name, rollout in {UNBOUNDED: whole, **rollouts}.items():
            before, started = rollout.flops, time.process_time()
            block = rollout.denoise(noise)
            if name == UNBOUNDED:
                rollout.look(block)
            else:
                rollout.commit(block)
            if number:
                seconds[name].append(time.process_time() - started)
            flops[name] = rollout.flops - before
    return [
        {
            "store": name,
            "latents": latents,
            "flops": flops[name],
            "seconds": median(values),
            "flop_ratio": flops[UNBOUNDED] / flops[name],
            "time_ratio": median(a / b for a, b in zip(seconds[UNBOUNDED], values, strict=True)),
            "window_flop_ratio": flops[WINDOW] / flops[name],
            "window_time_ratio": median(a / b for a, b in zip(seconds[WINDOW], values, strict=True)),
        }
        for name, values in seconds.items()
    ]


@torch.inference_mode()
def endless(extent: Extent, say: Callable[[str], None]) -> dict[str, Any]:
    """One rollout of ``extent.endless`` latent frames with a window and a sink: resident memory and block times.

    The segments are dropped as they come, the timeline is kept; the noise of the whole video is there from the start.
    Between blocks, one of a second store that stays at one length is timed, which tells a slower machine from a slower
    rollout.
    """
    frames = extent.endless
    config = KVBudgetConfig(frames=extent.budget, sink=SINK)
    noise = start_noise(1, frames)
    denoiser = TinyDenoiser(loaded(CAUSAL), prompt(1), 1.0, rollout=frames, budget=config, calls=FORWARDS).sized(noise)
    run = Run(Acceleration(kv_budget=config), denoiser, Timeline(row_unit="chunk", frames_per_row=BLOCK))
    yardstick = Yardstick(config, extent.budget)
    blocks: list[tuple[float, int]] = []
    still: list[tuple[int, float]] = []
    table = flow_sigmas(STEPS, SHIFT)
    started, wall = time.process_time(), time.perf_counter()
    for segment in causal_blocks(run, noise, BLOCK, table, renoise_seed=1):
        blocks.append((time.process_time() - started, resident()))
        if not bool(segment.latents.isfinite().all()):
            raise AssertionError(f"endless: latent frames from {segment.start} on are not finite")
        if len(blocks) % GLANCE == 0:
            still.append((len(blocks), yardstick.seconds()))
        if len(blocks) % 250 == 0:
            say(f"endless: latent {segment.end}, {resident() / 1e6:.1f} MB, {blocks[-1][0]:.3f} s a block")
        started = time.process_time()
    return told(extent, blocks, still, denoiser.kept_bytes) | {"wall_seconds": time.perf_counter() - wall}


def told(extent: Extent, blocks: list[tuple[float, int]], still: list[tuple[int, float]], kept: int) -> dict[str, Any]:
    """Figures of the long rollout from (process seconds, resident bytes) of every block and from (block, process
    seconds) of the store that stands still."""
    full = -(-extent.budget // BLOCK)
    after = blocks[full:]
    tenth = max(1, len(after) // 10)
    deciles = [after[start : start + tenth] for start in range(0, tenth * 10, tenth)][:10]
    seconds = [median(one for one, _ in part) for part in deciles]
    memory = [fmean(size for _, size in part) for part in deciles]
    marks = [full + index * tenth for index in range(len(deciles) + 1)]
    steady = [
        median([one for block, one in still if low < block <= high] or [one for _, one in still])
        for low, high in zip(marks, marks[1:], strict=False)
    ]
    first, last = after[0][1], after[-1][1]
    return {
        "latents": extent.endless,
        "budget": extent.budget,
        "kv_bytes": kept,
        "resident_when_full": first,
        "resident_at_end": last,
        "resident_most": max(size for _, size in after),
        "growth_percent": 100 * (last - first) / first,
        "growth_percent_of_deciles": 100 * (memory[-1] - memory[0]) / memory[0],
        "resident_by_decile": memory,
        "seconds_by_decile": seconds,
        "still_seconds_by_decile": steady,
        "last_over_first": seconds[-1] / seconds[0],
        "last_over_first_against_still": seconds[-1] / steady[-1] / (seconds[0] / steady[0]),
        "timeline_bytes_a_call": timeline_bytes(),
    }


class Yardstick:
    """Blocks of a full store that stays where it is."""

    def __init__(self, config: KVBudgetConfig, latents: int) -> None:
        self.rollout, self.noise = Rollout(Strategy(WINDOW, config), 2, 10 * latents), start_noise(2, BLOCK)
        blocks = simulated_blocks(2)
        while self.rollout.end < latents:
            self.rollout.commit(next(blocks))

    def seconds(self) -> float:
        """Process seconds of one block, not committed."""
        started = time.process_time()
        self.rollout.look(self.rollout.denoise(self.noise))
        return time.process_time() - started


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def timeline_bytes() -> float:
    """Bytes that a timeline keeps for each call of a causal rollout."""
    timeline, levels = Timeline(row_unit="chunk", frames_per_row=BLOCK), tuple(flow_sigmas(STEPS, SHIFT).tolist())
    tracemalloc.start()
    for number in range(2 * RECORDS):
        if number == RECORDS:
            before = tracemalloc.get_traced_memory()[0]
        index, step = divmod(number, STEPS)
        call = Call(
            Kind.DENOISE, index, step, (0, BLOCK), (levels[step],) * BLOCK, (step + 1,) * BLOCK, (True,) * BLOCK,
            index * BLOCK, total_steps=STEPS,
        )  # fmt: skip
        timeline.record(call, Decision.RECOMPUTE, flops=10**9 + number, seconds=0.01 * number)
    size = (tracemalloc.get_traced_memory()[0] - before) / RECORDS
    tracemalloc.stop()
    return size
