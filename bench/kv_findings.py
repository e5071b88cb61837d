"""What the quality rows of the K/V measurements say: tables, curves and sentences made from the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from accel.kv.budget import HEADS, IMPORTANCE, MERGE
from accel.metrics import drift
from demo.train_objective import LENGTHS

from .kv_quality import CLOSED, SAME, TRUE
from .kv_rollout import BLOCK, BYTES_EQUAL, NO_SINK, UNBOUNDED, WINDOW, Extent
from .pareto import Axes, Curve, draw
from .scenes import CAUSAL
from .table import interval, table_of

TRAINED = max(LENGTHS[CAUSAL])
EQUAL_BYTES = (NO_SINK, WINDOW, IMPORTANCE, MERGE, HEADS, BYTES_EQUAL)
NEAR = 1.0  # dB
Row = dict[str, Any]
Figure = Callable[[Row], float]


def decibel(errors: Sequence[float]) -> float:
    """PSNR of pooled squared errors; infinite where there are none."""
    error = fmean(errors)
    return math.inf if error == 0 else -10 * math.log10(error)


def psnr_of(regime: str, against: str, low: int, high: int) -> Figure:
    """PSNR of the blocks that start at latent frames ``[low, high)``: of a row, against the simulation or against the
    unbounded store."""
    return lambda row: decibel(_part(row[regime][against], low, high))


def centre_of(regime: str, low: int, high: int) -> Figure:
    """Centre error in pixels of those blocks; not a number where no shape was found."""

    def figure(row: Row) -> float:
        total, found, _ = map(sum, zip(*_part(row[regime]["centre"], low, high), strict=True))
        return total / found if found else math.nan

    return figure


def slope_of(regime: str, against: str, low: int) -> Figure:
    """Least-squares slope of the PSNR of blocks from ``low`` on, in dB a block."""
    return lambda row: drift([decibel([error]) for error in _part(row[regime][against], low, 10**9)])


def accuracy_of(low: int) -> Figure:
    """Share of the prompted shapes that blocks from ``low`` on show, in closed loop."""
    return lambda row: fmean(_part(row[CLOSED]["accuracy"], low, 10**9))


def _part(values: list, low: int, high: int) -> list:
    return [value for index, value in enumerate(values, 1) if low <= index * BLOCK < high]


def values(rows: list[Row], store: str, figure: Figure) -> list[float]:
    """A figure of every clip of a store, in the order of the seeds."""
    found = sorted((row["seed"], figure(row)) for row in rows if row["strategy"] == store)
    return [value for _, value in found]


def told(numbers: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Mean and 95 % bootstrap interval; a dash where the clips have none."""
    finite = [number for number in numbers if math.isfinite(number)]
    if not finite:
        return "-"
    low, high = interval(finite)
    form = f"{sign}.{digits}f"
    return f"{fmean(finite):{form}} ({low:{form}} to {high:{form}})"


def ranges(extent: Extent) -> list[tuple[int, int]]:
    """Blocks that are told apart, by first latent frame: those no longer than the model was trained for, and later
    ones; from where the stores are full."""
    edge = min(max(TRAINED, extent.budget + BLOCK), extent.frames)
    return [(extent.budget, edge)] + ([(edge, extent.frames)] if edge < extent.frames else [])


def quality_text(part: dict[str, Any], extent: Extent) -> list[str]:
    """Tables and findings."""
    still = (
        f"{fmean(total / count for total, count in _still(part['rows'], *span)):.2f} px" for span in ranges(extent)
    )
    return [
        f"{part['clips']} clips of {part['frames']} latent frames, each a simulated scene with its prompt, whose first "
        f"{BLOCK} are given; budget {extent.budget}. Mean over clips with its 95 % bootstrap interval; PSNR in dB, "
        "pooled over the blocks named, all from where the stores are full; slopes in dB a block. The model was "
        f"trained on up to {TRAINED} latent frames. If nothing moved, centres would err by {' and '.join(still)}.",
        "",
        "A block at a time. *Same history*: the unbounded run's clean latents are committed in every store. *True "
        "history*: the simulation's are, and blocks are compared with how it goes on.",
        "",
        *blocks_table(part, extent),
        "Closed loop: every store lives on what it made.",
        "",
        *loop_table(part, extent),
        *(f"- {line}" for line in findings(part, extent)),
        "",
    ]


def blocks_table(part: dict[str, Any], extent: Extent) -> list[str]:
    """What every store makes of a block after a history that is the same for all."""
    rows, lines = part["rows"], []
    for name, size in part["planned_bytes"].items():
        line = [name, f"{size / 1e3:,.0f}"]
        line.append(told(values(rows, name, psnr_of(SAME, "to_unbounded", extent.budget, extent.frames))))
        line.append(told(values(rows, name, slope_of(SAME, "to_unbounded", extent.budget)), 2, "+"))
        line += [told(values(rows, name, psnr_of(TRUE, "to_simulation", *span))) for span in ranges(extent)]
        line += [told(values(rows, name, centre_of(TRUE, *span)), 2) for span in ranges(extent)]
        lines.append(line)
    head = ["store", "kB", "same history: to unbounded", "slope"]
    for what in ("to simulation", "centre px"):
        head += [f"true history, {low} to {high}: {what}" for low, high in ranges(extent)]
    return table_of(head, lines)


def loop_table(part: dict[str, Any], extent: Extent) -> list[str]:
    """What every store makes of a video."""
    rows, lines = part["rows"], []
    for name in part["planned_bytes"]:
        line = [name, f"{fmean(values(rows, name, lambda row: row['flops'])) / 1e9:.1f}"]
        line.append(told(values(rows, name, psnr_of(CLOSED, "to_unbounded", extent.budget, extent.frames))))
        line += [told(values(rows, name, psnr_of(CLOSED, "to_simulation", *span))) for span in ranges(extent)]
        line.append(told(values(rows, name, slope_of(CLOSED, "to_simulation", extent.budget)), 2, "+"))
        line.append(told(values(rows, name, accuracy_of(extent.budget)), 2))
        lines.append(line)
    head = ["store", "GFLOP", "to unbounded", *(f"{low} to {high}: to simulation" for low, high in ranges(extent))]
    return table_of([*head, "slope", "prompted shapes shown"], lines)


def _still(rows: list[Row], low: int, high: int) -> list[tuple[float, float]]:
    parts = [_part(row["centre_if_still"], low, high) for row in rows if row["strategy"] == UNBOUNDED]
    return [(sum(one[0] for one in part), sum(one[1] for one in part)) for part in parts]


def findings(part: dict[str, Any], extent: Extent) -> list[str]:
    """Sentences: which store is best at equal bytes, how it stands to the unbounded one and to the window."""
    rows, measures = part["rows"], {}
    for low, high in ranges(extent):
        name = f"true history, latents {low} to {high}, to the simulation"
        measures[name] = psnr_of(TRUE, "to_simulation", low, high)
    first, last = extent.budget, extent.frames
    measures["same history, to the unbounded store"] = psnr_of(SAME, "to_unbounded", first, last)
    measures["closed loop, to the simulation"] = psnr_of(CLOSED, "to_simulation", first, last)
    measures["closed loop, to the unbounded run"] = psnr_of(CLOSED, "to_unbounded", first, last)
    lines = []
    for name, figure in measures.items():
        figures = {store: values(rows, store, figure) for store in EQUAL_BYTES if store in part["planned_bytes"]}
        best = max(figures, key=lambda store: fmean(_finite(figures[store])))
        line = f"{name}: best at equal bytes is {best}, {told(figures[best])} dB"
        line += f"; {stands(figures[best], figures[WINDOW], WINDOW)}" if best != WINDOW else ""
        unbounded = values(rows, UNBOUNDED, figure)
        if any(map(math.isfinite, unbounded)):
            line += f"; {stands(figures[best], unbounded, 'unbounded K/V', NEAR)}"
        lines.append(line + ".")
    return lines


def stands(found: list[float], other: list[float], name: str, near: float | None = None) -> str:
    """How one store stands to another, clip by clip: above, below or level by the interval of the difference, and
    whether within ``near`` dB."""
    pairs = zip(found, other, strict=True)
    gaps = [a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    if not gaps:
        return f"not to be compared with {name}"
    low, high = interval(gaps)
    word = "above" if low > 0 else "below" if high < 0 else "level with"
    within = "" if near is None else f", {'within' if fmean(gaps) >= -near else 'not within'} {near:g} dB of it"
    return f"{word} {name}: {told(gaps, 2, '+')} dB{within}"


def _finite(numbers: Sequence[float]) -> list[float]:
    return [number for number in numbers if math.isfinite(number)] or [math.inf]


def pictures(part: dict[str, Any], extent: Extent) -> dict[str, str]:
    """Curves over the video, the mean over clips of the PSNR of each block."""
    told_as = {"kv-true-history": (TRUE, "to_simulation"), "kv-same-history": (SAME, "to_unbounded")}
    titles = {TRUE: "Blocks after the simulation's history", SAME: "Blocks after the unbounded run's history"}
    up = {"to_simulation": "PSNR to the simulation, dB", "to_unbounded": "PSNR to the unbounded store's answer, dB"}
    found = {}
    for name, (regime, against) in told_as.items():
        curves = []
        for store in part["planned_bytes"]:
            points = []
            for first in range(BLOCK, extent.frames, BLOCK):
                numbers = values(part["rows"], store, psnr_of(regime, against, first, first + BLOCK))
                if all(map(math.isfinite, numbers)):
                    points.append((float(first), fmean(numbers)))
            curves.append(Curve(store, tuple(points), store == UNBOUNDED))
        found[name] = draw(curves, titles[regime], Axes("first latent frame of the block", up[against], ""))
    return found
