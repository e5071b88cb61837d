"""A timeline in words: one line for the log, a report of several lines, and why nothing was skipped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .timeline import StepRecord, Timeline

NAME = "AR Video Accelerator"
HISTORY_GUIDANCE = "history guidance"
NOTES = ("sampler", "signal", "history signal", "conditioning", "correction")
_PREFIXES = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_ROUND = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
_STANDSTILLS = {
    "off": "the threshold is 0, which switches skipping off; raise it.",
    "fresh noise": "this sampler adds fresh noise after every step, so no velocity can be predicted and holding one "
    "equals leaving the step out; use fewer steps, or Euler.",
}


def figures(value: float | None) -> str:
    """A number to three significant figures; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def quantity(value: float, unit: str) -> str:
    """A number with its SI prefix, as in ``1.23 PFLOP``."""
    prefix, size = next(((prefix, size) for prefix, size in _PREFIXES if value >= size), ("", 1))
    return f"{figures(value / size)} {prefix}{unit}"


def log_line(timeline: Timeline) -> str:
    """One line for the log."""
    totals = timeline.totals()
    parts = [f"{NAME}: {calls_line(timeline)}"]
    if totals["flop_ratio"]:
        parts.append(f"{totals['flop_ratio']:.2f}x fewer FLOPs")
    if totals["seconds"]:
        parts.append(f"{totals['seconds']:.1f} s")
    return "; ".join(parts)


def calls_line(timeline: Timeline) -> str:
    """How many model calls there were and what became of them; with decisions per chunk, each chunk is a call."""
    calls = timeline.totals()["calls"]
    steps = sum(calls.values()) - calls["commit"]
    skipped = calls["predict"] + calls["cache"]
    share = f", {100 * skipped / steps:.0f} % skipped" if steps else ""
    parts = ", ".join(f"{name} {count}" for name, count in calls.items() if count or name != "commit")
    total = sum(calls.values())
    noun = "chunk call" if _per_chunk(timeline) else "model call"
    return f"{total} {noun}{'' if total == 1 else 's'}{share} ({parts})"


def cost_line(timeline: Timeline) -> str:
    """FLOPs, time and state; empty where none was counted."""
    totals = timeline.totals()
    parts = []
    if totals["flop_ratio"]:
        done, full = quantity(totals["flops"], "FLOP"), quantity(totals["flops_full"], "FLOP")
        parts.append(f"{done} instead of {full}: {totals['flop_ratio']:.2f}x fewer")
    elif totals["flops"]:
        parts.append(quantity(totals["flops"], "FLOP"))
    if totals["seconds"]:
        parts.append(f"{totals['seconds']:.1f} s" + _speedup(timeline))
    if timeline.state_bytes is not None:
        parts.append(f"{quantity(timeline.state_bytes, 'B')} of state")
    if timeline.kv_bytes is not None:
        parts.append(f"{quantity(timeline.kv_bytes, 'B')} of kept K/V")
    return "; ".join(parts)


def summary(timeline: Timeline) -> str:
    """A report of several lines: calls by decision and why, FLOPs, time, state, and why nothing was skipped."""
    segments = len({record.segment for record in timeline.records})
    branches = f", {timeline.branches} CFG branches" if timeline.branches > 1 else ""
    lines = [
        f"{timeline.title or NAME}: segments {segments}, iterations {timeline.totals()['iterations']}{branches}",
        calls_line(timeline),
        _reasons_line(timeline),
        cost_line(timeline),
        _error_line(timeline),
        _late_line(timeline),
        *(f"{HISTORY_GUIDANCE}: {value}" for value in told_settings(timeline, HISTORY_GUIDANCE)),
        *told_settings(timeline, "auto"),
        *note_lines(timeline),
        *memory_lines(timeline),
        _kernels_line(timeline),
        why_nothing_skipped(timeline),
    ]
    return "\n".join(line for line in lines if line)


def note_lines(timeline: Timeline) -> list[str]:
    """What stood in the way of what was asked for, and what was done instead."""
    told = {key: timeline.settings.get(key) for key in NOTES}
    return [f"{key}: {value}" for key, value in told.items() if isinstance(value, str)]


def memory_lines(timeline: Timeline) -> list[str]:
    """What a causal model's K/V were kept and read as, where that was not simply all of them."""
    names = ("K/V", "attention", "out of memory")
    return [f"{name}: {value}" for name in names for value in told_settings(timeline, name)]


def told_settings(timeline: Timeline, name: str) -> list[str]:
    """An entry of the settings, where it is there and a text."""
    value = timeline.settings.get(name)
    return [value] if isinstance(value, str) else []


def why_nothing_skipped(timeline: Timeline) -> str | None:
    """The reason, and what to do, where a run skipped no call; None where it did skip or has not denoised."""
    denoised = _denoised(timeline)
    if not denoised or any(record.decision != "recompute" for record in denoised):
        return None
    asked = [record for record in denoised if record.forced is None]
    for reason, sentence in _STANDSTILLS.items():
        if not asked and any(record.forced == reason for record in denoised):
            return f"Nothing was skipped: {sentence}"
    if not asked:
        reasons = _counted(record.forced for record in denoised)
        return f"Nothing was skipped: every call had to be computed ({reasons}); use more steps or a shorter warm-up."
    limited = [record for record in asked if record.threshold is not None]
    if not limited and memory_lines(timeline):
        return None
    if not limited:
        return "Nothing was skipped: no acceleration is set; connect an acceleration node to the model."
    finite = [record for record in limited if record.discrepancy is not None and math.isfinite(record.discrepancy)]
    if not finite:
        return "Nothing was skipped: the discrepancy was never a finite number; check the model's precision."
    if "auto" in timeline.settings:
        return "Nothing was skipped: the quality target leaves no room for it; set a lower one, or use more steps."
    return f"Nothing was skipped: {_nearest(finite)}"


def _denoised(timeline: Timeline) -> list[StepRecord]:
    return [record for record in timeline.records if record.decision in ("recompute", "predict", "cache")]


def _per_chunk(timeline: Timeline) -> bool:
    return timeline.totals()["iterations"] < len(timeline.records)


def _counted(reasons: Iterable[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in Counter(reasons).most_common())


def _reasons_line(timeline: Timeline) -> str:
    """Why calls were computed; empty where nothing could have skipped them."""
    computed = [record for record in _denoised(timeline) if record.decision == "recompute"]
    if not any(record.forced or record.threshold is not None for record in computed):
        return ""
    return f"recomputed because of {_counted(record.forced or 'discrepancy' for record in computed)}"


def _kernels_line(timeline: Timeline) -> str:
    """Which operations ran as Triton kernels and which as plain torch; empty where none was called."""
    kernels = timeline.settings.get("kernels")
    return f"kernels: {kernels}" if kernels else ""


def _error_line(timeline: Timeline) -> str:
    errors = [record.error for record in timeline.records if record.error is not None and math.isfinite(record.error)]
    if not errors:
        return ""
    mean, worst = figures(sum(errors) / len(errors)), figures(max(errors))
    return f"predicted against true velocity: mean relative error {mean}, worst {worst} ({len(errors)} compared)"


def _late_line(timeline: Timeline) -> str:
    """What deciding one step late changed; empty where all decisions are exact."""
    if timeline.late is None:
        return ""
    decisions, differ = timeline.late["decisions"], timeline.late["differ"]
    return f"decided one step late: {differ} of {decisions} decisions differ from the exact rule's"


def _nearest(records: list[StepRecord]) -> str:
    nearest = min(records, key=lambda record: record.discrepancy - record.threshold)
    discrepancy, threshold = figures(nearest.discrepancy), figures(nearest.threshold)
    try_next = f"try {figures(_round_above(nearest.discrepancy))}."
    if nearest.threshold <= 0:
        return f"threshold {threshold} switches skipping off; the smallest discrepancy was {discrepancy}, {try_next}"
    if nearest.discrepancy > nearest.threshold:
        return f"threshold {threshold} is below the smallest discrepancy {discrepancy}; {try_next}"
    return f"the smallest discrepancy {discrepancy} is within threshold {threshold}, but there was nothing to reuse."


def _round_above(value: float) -> float:
    """The next round number that leaves a tenth of room above ``value``."""
    if value <= 0:
        return 0.01
    scale = 10.0 ** math.floor(math.log10(1.1 * value))
    return next((step * scale for step in _ROUND if step * scale >= 1.1 * value), 10 * scale)


def _speedup(timeline: Timeline) -> str:
    totals = timeline.totals()
    estimate = totals["seconds_full_estimate"]
    if not estimate or not totals["calls"]["predict"] + totals["calls"]["cache"]:
        return ""
    return f", about {estimate / totals['seconds']:.2f}x faster than computing every call ({estimate:.1f} s)"
