"""Quality over cost as a stand-alone picture: one line a method, drawn for white and for dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from accel.compare_plot import ticks

WIDTH, HEIGHT = 960, 680
LEFT, RIGHT, TOP, BOTTOM = 70, 250, 50, 58
LINE = 17  # pixels between labels
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe-Ito
RIVAL = "#8a8a8a"  # its black, light enough for a dark page
MARKS = ("circle", "square", "diamond", "triangle")
STYLE = (
    "<style>text{font:13px system-ui,sans-serif;fill:#222}.ground{fill:#fff}.grid{stroke:#ddd}.axis{stroke:#666}"
    ".title{font-size:16px;font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e6e6}.ground{fill:#16181d}.grid{stroke:#3a3d45}.axis{stroke:#999}}"
    "</style>"
)


@dataclass(frozen=True, slots=True)
class Axes:
    """What stands beside the axes, and the unit behind the numbers across."""

    across: str = "FLOPs of the full run over FLOPs of the method"
    up: str = "PSNR to the full run, dB"
    unit: str = "x"


@dataclass(frozen=True, slots=True)
class Curve:
    """Points ``(FLOP ratio, PSNR)`` of one method, or what the axes say; ``dashed`` marks the rival that everything is
    compared with."""

    name: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


def draw(curves: Sequence[Curve], title: str, axes: Axes | None = None) -> str:
    """The picture as SVG text. Labels stand beside the last point of their line, moved apart where they would meet."""
    curves = [Curve(curve.name, tuple(sorted(curve.points)), curve.dashed) for curve in curves if curve.points]
    flat = [point for curve in curves for point in curve.points] or [(1.0, 0.0), (2.0, 1.0)]
    across, up = ([*ticks(min(values), max(values), 9)] for values in zip(*flat, strict=True))

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - across[0]) / (across[-1] - across[0])

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - up[0]) / (up[-1] - up[0])

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{STYLE}',
        f"<title>{escape(title)}</title>",
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="title" x="{LEFT}" y="28">{escape(title)}</text>',
        *_axes(axes or Axes(), across, up, x, y),
    ]
    heights = spread([y(curve.points[-1][1]) for curve in curves], TOP, HEIGHT - BOTTOM)
    for number, (curve, height) in enumerate(zip(curves, heights, strict=True)):
        places = [(x(ratio), y(value)) for ratio, value in curve.points]
        parts += _curve(curve, places, height, number)
    return "\n".join([*parts, "</svg>"]) + "\n"


def spread(wanted: Sequence[float], low: float, high: float, gap: float = LINE) -> list[float]:
    """Heights near the wanted ones, ``gap`` apart where there is room, in their order and from ``low`` to ``high``."""
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    heights, floor = [0.0] * len(wanted), low
    for index in order:
        heights[index] = floor = max(wanted[index], floor)
        floor += gap
    ceiling = high
    for index in reversed(order):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    return heights


def _axes(axes: Axes, across: list[float], up: list[float], x, y) -> list[str]:
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    parts = []
    for value in up:
        parts.append(f'<line class="grid" x1="{left}" y1="{y(value):.1f}" x2="{right}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in across:
        parts.append(f'<line class="axis" x1="{x(value):.1f}" y1="{bottom}" x2="{x(value):.1f}" y2="{bottom + 5}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 20}" text-anchor="middle">{value:g}{axes.unit}</text>')
    centre, middle = (left + right) / 2, (top + bottom) / 2
    parts.append(f'<path class="axis" fill="none" d="M{left} {top}V{bottom}H{right}"/>')
    for place, words in (
        (f"translate({centre:.0f} {bottom + 44})", axes.across),
        (f"translate(18 {middle:.0f}) rotate(-90)", axes.up),
    ):
        parts.append(f'<text transform="{place}" text-anchor="middle">{words}</text>')
    return parts


def _curve(curve: Curve, places: list[tuple[float, float]], height: float, number: int) -> list[str]:
    colour, mark = COLOURS[number % len(COLOURS)], MARKS[number // len(COLOURS) % len(MARKS)]
    colour = RIVAL if curve.dashed else colour
    dash = ' stroke-dasharray="7 5"' if curve.dashed else ""
    line = " ".join(f"{across:.1f},{up:.1f}" for across, up in places)
    edge, (end, level) = WIDTH - RIGHT + 24, places[-1]
    return [
        f'<g fill="{colour}" stroke="{colour}"><polyline points="{line}" fill="none" stroke-width="2.2"{dash}/>',
        *(_mark(mark, *place) for place in places),
        f'<path d="M{end + 7:.1f} {level:.1f}L{edge - 4} {height:.1f}" fill="none" stroke-width="0.8" opacity="0.6"/>',
        f'{_mark(mark, edge + 4, height)}</g><text x="{edge + 14}" y="{height + 4:.1f}">{escape(curve.name)}</text>',
    ]


def _mark(shape: str, x: float, y: float) -> str:
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
        "triangle": ((0, -5.5), (5, 4), (-5, 4)),
    }
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" stroke="none"/>'
    points = " ".join(f"{x + across:.1f},{y + up:.1f}" for across, up in corners[shape])
    return f'<polygon points="{points}" stroke="none"/>'
