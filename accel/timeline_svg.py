"""A timeline as a stand-alone SVG: latent frames or chunks over iterations, and the discrepancy against its threshold.

Every decision has a colour (after Okabe and Ito, so that colour-blind readers tell them apart) and a pattern; a
computed call is the strongest. The picture follows the reader's light or dark theme, and every cell says on hover what
was decided there and why.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from .timeline_report import NAME, calls_line, cost_line, figures, why_nothing_skipped

if TYPE_CHECKING:
    from .timeline import StepRecord, Timeline

DECISIONS = ("recompute", "predict", "cache", "commit", "prefill")
MARKS = {
    "predict": '<path class="mark" d="M-1 1l2-2M0 6l6-6M5 7l2-2"/>',
    "cache": '<path class="mark" d="M1 1.5h1.6M4 4.5h1.6"/>',
    "commit": '<path class="mark" d="M0 0l6 6M0 6l6-6"/>',
    "prefill": '<path class="mark" d="M0 1.5h6M0 4.5h6"/>',
}
"""What is drawn over the colour, six pixels square; recompute is solid."""
STYLE = """
.arva{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
.arva .page{fill:#fff}.arva text{fill:#24292f}.arva .soft{fill:#57606a}.arva .head{font-size:15px;font-weight:600}
.arva .recompute{fill:#0072b2}.arva .predict{fill:#e69f00}.arva .cache{fill:#b3e0f8}
.arva .commit{fill:#009e73}.arva .prefill{fill:#cc79a7}
.arva .mark{fill:none;stroke:#fff;stroke-width:1.4}.arva .cache+.mark{stroke:#0b5c8a;stroke-width:1.6}
.arva .window{fill:#eaeef2}.arva .grid{stroke:#fff}.arva .frame{fill:none;stroke:#8c959f}
.arva .segment{stroke:#24292f}.arva .limit{stroke:#b42318;fill:none}.arva .warn{fill:#b42318}
.arva .halo{stroke:#fff;stroke-width:2.6;fill:none}
@media(prefers-color-scheme:dark){
.arva .page{fill:#16191d}.arva text{fill:#e6edf3}.arva .soft{fill:#9da7b3}
.arva .recompute{fill:#56b4e9}.arva .cache{fill:#14425c}.arva .mark{stroke:#16191d}.arva .cache+.mark{stroke:#a9dcf7}
.arva .window{fill:#262c34}.arva .grid{stroke:#16191d}.arva .frame{stroke:#6e7681}
.arva .segment{stroke:#e6edf3}.arva .limit{stroke:#ff8f7d}.arva .warn{fill:#ff8f7d}.arva .halo{stroke:#16191d}}
"""
LEFT, RIGHT, STRIP, MIN_WIDTH = 78, 52, 72, 560
"""Margins for the axes, height of the discrepancy strip and least width, in pixels."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is, in pixels."""

    columns: int
    rows: int
    cell_width: float
    cell_height: float
    top: float

    @classmethod
    def of(cls, timeline: Timeline, top: float) -> Layout:
        columns, rows = max(timeline.columns, 1), max(timeline.rows, 1)
        return cls(columns, rows, min(max(980 / columns, 2), 24), min(max(300 / rows, 2), max(84 / rows, 24)), top)

    def x(self, column: float) -> float:
        return LEFT + column * self.cell_width

    def y(self, row: float) -> float:
        return self.top + row * self.cell_height

    @property
    def right(self) -> float:
        return self.x(self.columns)

    @property
    def bottom(self) -> float:
        return self.y(self.rows)

    @property
    def strip(self) -> tuple[float, float]:
        """Top and bottom of the discrepancy strip."""
        return self.bottom + 34, self.bottom + 34 + STRIP


def render(timeline: Timeline) -> str:
    """The picture as text of one ``<svg>`` element."""
    heading = [timeline.title or NAME, calls_line(timeline), cost_line(timeline), why_nothing_skipped(timeline)]
    heading = [line for line in heading if line]
    layout = Layout.of(timeline, top=24 + 17 * len(heading) + 26)
    has_strip = any(_finite(record.discrepancy) for record in timeline.records)
    floor = layout.strip[1] if has_strip else layout.bottom + 22
    width = max(layout.right + RIGHT, MIN_WIDTH, min(32 + 7 * max(map(len, heading)), 1200))
    legend, height = _legend(timeline, floor + 22, width)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="arva" role="img" width="{_n(width)}" height="{_n(height)}" '
        f'viewBox="0 0 {_n(width)} {_n(height)}">',
        f"<title>{_text(heading[0])}</title><desc>{_text(timeline.summary())}</desc>",
        f"<style>{STYLE}</style><defs>{_patterns()}</defs>",
        f'<rect class="page" width="{_n(width)}" height="{_n(height)}"/>',
        _heading(heading, bool(why_nothing_skipped(timeline))),
        *_windows(timeline, layout),
        *_cells(timeline, layout),
        *_grid(layout),
        *(_strip(timeline, layout) if has_strip else ()),
        *_segments(timeline, layout, floor if has_strip else layout.bottom),
        *_axes(timeline, layout),
        legend,
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _text(value: object) -> str:
    return escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", str(value)))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _fill(decision: str) -> str:
    return f'fill="url(#arva-{decision})"' if decision in MARKS else f'class="{decision}"'


def _rect(x: float, y: float, width: float, height: float, fill: str, inside: str = "") -> str:
    shape = f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" {fill}'
    return f"{shape}>{inside}</rect>" if inside else f"{shape}/>"


def _cell(layout: Layout, column: int, y: float, height: float, decision: str, hover: str) -> str:
    width = layout.cell_width - (0.7 if layout.cell_width >= 5 else 0)
    return _rect(layout.x(column), y, width, height, _fill(decision), f"<title>{_text(hover)}</title>")


def _label(x: float, y: float, text: object, anchor: str = "start", kind: str = "soft") -> str:
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{_text(text)}</text>'


def _patterns() -> str:
    return "".join(
        f'<pattern id="arva-{name}" width="6" height="6" patternUnits="userSpaceOnUse">'
        f'<rect class="{name}" width="6" height="6"/>{marks}</pattern>'
        for name, marks in MARKS.items()
    )


def _heading(lines: list[str], warned: bool) -> str:
    labels = [_label(16, 26, lines[0], kind="head")]
    for index, line in enumerate(lines[1:], 1):
        labels.append(_label(16, 28 + 17 * index, line, kind="warn" if warned and index == len(lines) - 1 else "soft"))
    return "".join(labels)


def _windows(timeline: Timeline, layout: Layout) -> list[str]:
    """What the model was given beyond the active frames; drawn under the cells."""
    wider = (record for record in timeline.records if record.window != record.frames)
    spans = sorted({(record.segment, timeline.column(record), record.window) for record in wider})
    parts = []
    for (_, window), run in groupby(spans, key=lambda span: (span[0], span[2])):
        columns = [column for _, column, _ in run]
        left, right, rows = layout.x(columns[0]), layout.x(columns[-1] + 1), timeline.row_range(window)
        height = len(rows) * layout.cell_height
        parts.append(_rect(left, layout.y(rows.start), right - left, height, 'class="window"'))
    return parts


def _cells(timeline: Timeline, layout: Layout) -> list[str]:
    """One rectangle for the rows of a record that share a noise level; records of one cell share its height."""
    tenants: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, record in enumerate(timeline.records):
        for row in timeline.row_range(record.frames):
            tenants[timeline.column(record), row].append(index)
    parts = []
    for index, record in enumerate(timeline.records):
        column, rows = timeline.column(record), timeline.row_range(record.frames)
        sigmas = record.sigmas if record.sigmas and len(record.sigmas) == len(rows) else (record.sigma,) * len(rows)
        places = []
        for row, sigma in zip(rows, sigmas, strict=True):
            sharing = tenants[column, row]
            height = layout.cell_height / len(sharing)
            alone = row if len(sharing) > 1 else None
            places.append((layout.y(row) + sharing.index(index) * height, height, row, (sigma, alone)))
        for (sigma, _), run in groupby(places, key=lambda place: place[3]):
            (top, height, first, _), *rest = run
            hover = _hover(record, timeline, range(first, first + 1 + len(rest)), sigma)
            parts.append(_cell(layout, column, top, height * (1 + len(rest)), record.decision, hover))
    return parts


def _hover(record: StepRecord, timeline: Timeline, rows: range, sigma: float | None) -> str:
    order = "" if record.order is None else f", order {record.order}"
    forced = f" ({record.forced})" if record.forced else ""
    size = timeline.frames_per_row
    start, end = max(rows.start * size, record.frames[0]), min(rows.stop * size, record.frames[1])
    lines = [
        f"{record.decision}{order}{forced}",
        f"segment {record.segment}, iteration {record.iteration}, latent frames [{start}, {end})",
        f"sigma {figures(sigma)}",
    ]
    if record.discrepancy is not None or record.threshold is not None:
        lines.append(f"discrepancy {figures(record.discrepancy)}, threshold {figures(record.threshold)}")
    if record.corrected is not None:
        lines.append(f"corrected by {figures(record.corrected)}")
    if record.queries:
        lines.append("forwarded latent frames " + ", ".join(f"[{start}, {end})" for start, end in record.queries))
    if record.error is not None:
        lines.append(f"relative error {figures(record.error)}")
    if record.seconds:
        lines.append(f"{figures(record.seconds)} s")
    return "\n".join(lines)


def _grid(layout: Layout) -> list[str]:
    lines = range(1, layout.rows) if layout.cell_height >= 5 else ()
    path = "".join(f"M{LEFT} {_n(layout.y(row))}H{_n(layout.right)}" for row in lines)
    frame = _rect(LEFT, layout.top, layout.right - LEFT, layout.bottom - layout.top, 'class="frame"')
    return ([f'<path class="grid" d="{path}"/>'] if path else []) + [frame]


def _strip(timeline: Timeline, layout: Layout) -> list[str]:
    """The greatest discrepancy of every iteration as a bar in its decision's colour, and the thresholds as lines."""
    highest: dict[int, StepRecord] = {}
    for record in timeline.records:
        rival = highest.get(timeline.column(record))
        if _finite(record.discrepancy) and (rival is None or record.discrepancy > rival.discrepancy):
            highest[timeline.column(record)] = record
    limits = {column: record.threshold for column, record in highest.items() if _finite(record.threshold)}
    peak, limit = max(record.discrepancy for record in highest.values()), max(limits.values(), default=0)
    full = max(min(peak, 2.5 * limit) if limit > 0 else peak, 1.15 * limit) or 1.0
    top, bottom = layout.strip
    scale = (bottom - top) / full
    parts = []
    for column, record in sorted(highest.items()):
        height = min(max(record.discrepancy, 0) * scale, bottom - top + 4)
        text = f"iteration {column}: discrepancy {figures(record.discrepancy)}, threshold {figures(record.threshold)}"
        parts.append(_cell(layout, column, bottom - height, height, record.decision, text))
    parts += _limits(limits, layout, bottom, scale)
    parts.append(f'<path class="frame" d="M{LEFT} {_n(top)}V{_n(bottom)}H{_n(layout.right)}"/>')
    parts.append(_label(LEFT - 6, top + 8, figures(full), "end"))
    parts.append(_label(LEFT - 6, bottom, "0", "end"))
    parts.append(_turned(20, (top + bottom) / 2, "discrepancy"))
    return parts


def _limits(limits: dict[int, float], layout: Layout, bottom: float, scale: float) -> list[str]:
    """A dashed line across the strip for each of a few thresholds, or one that follows them where they are many."""
    values = sorted(set(limits.values()))
    if len(values) > 3:
        starts = (f"M{_n(layout.x(column))} {_n(bottom - value * scale)}" for column, value in limits.items())
        return [_line("".join(f"{start}h{_n(layout.cell_width)}" for start in starts), dashed=False)]
    parts = []
    for y, value in ((bottom - value * scale, value) for value in values):
        parts.append(_line(f"M{LEFT} {_n(y)}H{_n(layout.right)}") + _label(layout.right + 6, y + 4, figures(value)))
    return parts


def _line(path: str, dashed: bool = True) -> str:
    dashes = ' stroke-dasharray="5 3"' if dashed else ""
    return f'<path class="halo" d="{path}"/><path class="limit"{dashes} d="{path}"/>'


def _segments(timeline: Timeline, layout: Layout, floor: float) -> list[str]:
    """A line where a segment begins and its number above."""
    columns = sorted({(timeline.column(record), record.segment) for record in timeline.records})
    parts, last_label = [_label(LEFT - 6, layout.top - 8, "segment", "end")] if columns else [], -math.inf
    for segment, run in groupby(columns, key=lambda item: item[1]):
        spans = [column for column, _ in run]
        left, middle = layout.x(spans[0]), (layout.x(spans[0]) + layout.x(spans[-1] + 1)) / 2
        if spans[0] and len(spans) * layout.cell_width >= 4:
            parts.append(f'<path class="segment" d="M{_n(left)} {_n(layout.top - 20)}V{_n(floor)}"/>')
        if middle - last_label >= 24:
            parts.append(_label(middle, layout.top - 8, segment, "middle"))
            last_label = middle
    return parts


def _axes(timeline: Timeline, layout: Layout) -> list[str]:
    size = f" of {timeline.frames_per_row} latent frames" if layout.bottom - layout.top >= 180 else ""
    unit = timeline.row_unit + (size if timeline.row_unit == "chunk" else "")
    start = timeline.frames_per_row if timeline.row_unit == "latent frame" else 1
    parts = [
        _turned(20, (layout.top + layout.bottom) / 2, unit),
        _label(LEFT - 6, layout.bottom + 16, "iteration", "end"),
    ]
    for row in range(0, layout.rows, _tick(layout.rows, layout.bottom - layout.top, 14)):
        parts.append(_label(LEFT - 6, layout.y(row + 0.5) + 4, row * start, "end"))
    for column in range(0, layout.columns, _tick(layout.columns, layout.right - LEFT, 44)):
        parts.append(_label(layout.x(column + 0.5), layout.bottom + 16, column, "middle"))
    return parts


def _turned(x: float, y: float, text: str) -> str:
    place = f'transform="translate({_n(x)} {_n(y)})rotate(-90)"'
    return f'<text class="soft" text-anchor="middle" {place}>{_text(text)}</text>'


def _tick(count: int, length: float, room: float) -> int:
    """The least of 1, 2, 5, 10, ... that leaves ``room`` pixels between labels."""
    least = room * count / length
    scale = 10 ** max(math.floor(math.log10(least)), 0)
    return next(step * scale for step in (1, 2, 5, 10) if step * scale >= least)


def _legend(timeline: Timeline, top: float, width: float) -> tuple[str, float]:
    """The legend from ``top`` downwards, and where the picture ends."""
    used = {record.decision for record in timeline.records} | {"recompute", "predict", "cache"}
    items = [(_fill(name), name) for name in DECISIONS if name in used]
    if any(record.window != record.frames for record in timeline.records):
        items.append(('class="window"', "given to the model, not active"))
    parts, x, y = [], float(LEFT), top
    for fill, name in items:
        needed = 26 + 6.6 * len(name) + 18
        if x > LEFT and x + needed > width - 16:
            x, y = LEFT, y + 20
        parts.append(_rect(x, y, 20, 13, fill) + _label(x + 26, y + 11, name))
        x += needed
    if any(_finite(record.threshold) for record in timeline.records):
        parts.append(_line(f"M{_n(x)} {_n(y + 7)}h22") + _label(x + 28, y + 11, "threshold"))
    return "".join(parts), y + 13 + 16
