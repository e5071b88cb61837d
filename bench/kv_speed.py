"""Time of a block: of a rollout that does not end, and of bounded stores against unbounded ones."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from statistics import median
from typing import Any

from accel.engine import Acceleration
from accel.kv.budget import KVBudgetConfig
from demo.generate import start_noise

from .kv_runs import ANN, BLOCK, SINK, SPAN, UNBOUNDED, Rollout, accelerations
from .scenes import prompt

MOST_GROWTH, MOST_SLOWER = 0.01, 1.05
FILLING = 100  # latent frames committed together where all are kept
AVERAGED = 10  # blocks whose resident memory one figure is the median of


def resident() -> int:
    """Bytes of this process that lie in main memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def deep_size(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of a Python object and all that it holds, each counted once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    parts: Iterable[Any] = ()
    if isinstance(value, dict):
        parts = (part for pair in value.items() for part in pair)
    elif isinstance(value, (list, tuple)):
        parts = value
    elif is_dataclass(value):
        parts = (getattr(value, field.name) for field in fields(value))
    return sys.getsizeof(value) + sum(deep_size(part, seen) for part in parts)


def endless(latents: int, budget: int, seed: int, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """A window rollout of ``latents`` latent frames of which nothing is kept: resident memory and seconds a block."""
    rollout = Rollout(Acceleration(kv_budget=KVBudgetConfig(frames=budget, span=SPAN)), prompt(seed), latents)
    noise, seconds, memory, told = start_noise(seed, latents), [], [], 0
    full, started = -(-budget // BLOCK) + 1, time.process_time()
    for block in rollout.blocks(noise, seed):
        seconds.append(time.process_time() - started)
        memory.append(resident())
        if block.index == full + AVERAGED // 2:
            told = deep_size(rollout.timeline)
        if block.index % 250 == 0:
            report(f"endless: latent {block.end}, {memory[-1] / 1e6:.1f} MB, {seconds[-1] * 1e3:.0f} ms a block")
        started = time.process_time()
    gc.collect()
    timeline = deep_size(rollout.timeline) - told
    return {"latents": latents, "budget": budget, "seed": seed} | trends(seconds[full:], memory[full:], timeline)


def trends(seconds: list[float], memory: list[int], timeline: int) -> dict[str, Any]:
    """What became of a block's time and of resident memory, from the first block with a full store to the last.

    Args:
        seconds, memory: of each block. timeline: bytes by which the list of what was done grew.
    """
    tenth = max(1, len(seconds) // 10)
    first, last = median(memory[:AVERAGED]), median(memory[-AVERAGED:])
    early, late = median(seconds[:tenth]), median(seconds[-tenth:])
    return {
        "blocks": len(seconds), "resident_first": first, "resident_last": last, "timeline_bytes": timeline,
        "growth": (last - first) / first, "growth_without_timeline": (last - first - timeline) / first,
        "seconds_first": early, "seconds_last": late, "slower": late / early,
        "seconds_by_tenth": [median(seconds[start : start + tenth]) for start in range(0, tenth * 10, tenth)],
    }  # fmt: skip


def check_endless(told: dict[str, Any]) -> None:
    """Raises AssertionError where memory, without the timeline, or a block's time grew by more than is allowed."""
    if told["growth_without_timeline"] >= MOST_GROWTH:
        raise AssertionError(f"endless: resident memory grew by {100 * told['growth_without_timeline']:.2f} %.")
    if told["slower"] > MOST_SLOWER:
        raise AssertionError(f"endless: a block takes {told['slower']:.3f} times as long at the end.")


def compared(history: int, budget: int, rounds: int, seed: int) -> dict[str, Any]:
    """FLOPs and process seconds of a block at about ``history`` latent frames, strategies taken in turns.

    Stores are filled up to ``rounds / 2`` blocks before ``history`` with random clean latents, the unbounded one with
    random keys and values; then each makes one block that is not counted and ``rounds`` that are. The order changes
    each time.
    """
    filled = max(BLOCK, (history - BLOCK * rounds // 2) // BLOCK * BLOCK)
    frames = filled + BLOCK * (rounds + 1)
    noise, rollouts, blocks = start_noise(seed, frames), {}, {}
    finished = [noise[:, :, first : first + BLOCK] for first in range(0, filled, BLOCK)]
    for name, acceleration in accelerations(budget).items():
        rollouts[name] = Rollout(acceleration, prompt(seed), frames)
        if name == UNBOUNDED:
            rollouts[name].pretend(filled, seed)
        else:
            rollouts[name].fill(noise[:, :, :filled], FILLING if name == ANN else BLOCK)
        blocks[name] = rollouts[name].blocks(noise, seed, finished=finished)
    seconds: dict[str, list[float]] = {name: [] for name in rollouts}
    for turn in range(rounds + 1):
        for name in sorted(rollouts, reverse=turn % 2 == 1):
            started = time.process_time()
            next(blocks[name])
            seconds[name].append(time.process_time() - started)
    middle = len(finished) + 1 + rounds // 2
    flops = {name: rollout.block_flops(middle) for name, rollout in rollouts.items()}
    told = {"history": history, "budget": budget, "rounds": rounds}
    return told | {"rows": ratios(flops, {name: values[1:] for name, values in seconds.items()})}


def ratios(flops: dict[str, int], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Of each strategy: FLOPs and median seconds of a block, and how many times those of unbounded K/V and of window +
    sink they are less; ratios of times are medians over rounds."""
    rows = []
    for name, values in seconds.items():
        row = {"strategy": name, "flops": flops[name], "seconds": median(values)}
        for other, key in ((UNBOUNDED, "unbounded"), (SINK, "window")):
            row[f"flop_ratio_to_{key}"] = flops[other] / flops[name]
            pairs = zip(seconds[other], values, strict=True)
            row[f"time_ratio_to_{key}"] = median(theirs / ours for theirs, ours in pairs)
        rows.append(row)
    return rows
