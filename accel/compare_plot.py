"""Curves over the frames of a video as a picture: one panel a curve, with axes, ticks and legible numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, PANEL, GAP = 960, 260, 44
LEFT, RIGHT, TOP, BOTTOM = 96, 24, 16, 52
TEXT = 20
PAPER, INK, GRID, MARK = "#ffffff", "#222222", "#dddddd", "#888888"
COLOURS = ("#0072b2", "#d55e00")
_STEPS = (1, 2, 2.5, 5, 10)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` or below to ``high`` or above, about ``most`` of them, over at least a thousandth."""
    low = min(low, high - 1e-3)
    span = high - low
    scale = 10.0 ** math.floor(math.log10(span / most))
    step = next(scale * factor for factor in _STEPS if span / (scale * factor) <= most - 1 or factor == _STEPS[-1])
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def draw(curves: Sequence[tuple[str, Sequence[float]]], marks: Sequence[int] = ()) -> np.ndarray:
    """The picture ``[H, W, 3]`` uint8.

    Args:
        curves: label and one value a frame; infinite values (frames equal to the reference) are drawn as rings at the
            panel's upper edge.
        marks: frames at which a dashed line stands.
    """
    height = TOP + len(curves) * PANEL + (len(curves) - 1) * GAP + BOTTOM
    image = Image.new("RGB", (WIDTH, height), PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(TEXT)
    for index, (label, values) in enumerate(curves):
        top = TOP + index * (PANEL + GAP)
        _panel(pen, font, top, label, values, marks, COLOURS[index % len(COLOURS)])
    pen.text((LEFT + (WIDTH - LEFT - RIGHT) / 2, height - 4), "frame", INK, font, "md")
    return np.array(image)


def _panel(pen, font, top: int, label: str, values: Sequence[float], marks: Sequence[int], colour: str) -> None:
    finite = [value for value in values if math.isfinite(value)]
    rows = ticks(min(finite), max(finite)) if finite else []
    right, bottom, last = WIDTH - RIGHT, top + PANEL, max(len(values) - 1, 1)

    def x(frame: float) -> float:
        return LEFT + (right - LEFT) * frame / last

    def y(value: float) -> float:
        if not math.isfinite(value):
            return top
        return bottom - (bottom - top) * (value - rows[0]) / (rows[-1] - rows[0])

    for value in rows:
        pen.line((LEFT, y(value), right, y(value)), GRID)
        pen.text((LEFT - 8, y(value)), f"{value:.10g}", INK, font, "rm")
    for frame in (tick for tick in ticks(0, last, 10) if tick <= last and tick == int(tick)):
        pen.line((x(frame), bottom, x(frame), bottom + 6), INK)
        pen.text((x(frame), bottom + 8), f"{frame:g}", INK, font, "mt")
    for frame in marks:
        for start in range(top, bottom, 12):
            pen.line((x(frame), start, x(frame), start + 5), MARK)
    pen.rectangle((LEFT, top, right, bottom), outline=INK)
    _curve(pen, [(x(frame), y(value)) for frame, value in enumerate(values)], values, colour)
    note = f"{label}; rings: equal to the reference" if math.inf in values else label
    box = pen.textbbox((right - 10, top + 8), note, font, "rt")
    pen.rectangle((box[0] - 6, box[1] - 4, box[2] + 4, box[3] + 4), PAPER)
    pen.text((right - 10, top + 8), note, colour, font, "rt")


def _curve(pen, points: list[tuple[float, float]], values: Sequence[float], colour: str) -> None:
    for index, (horizontal, vertical) in enumerate(points):
        known = math.isfinite(values[index])
        if math.isnan(values[index]):
            continue
        if known and index and math.isfinite(values[index - 1]):
            pen.line((points[index - 1], points[index]), colour, 3)
        radius = 3 if known else 6
        box = (horizontal - radius, vertical - radius, horizontal + radius, vertical + radius)
        pen.ellipse(box, fill=colour if known else None, outline=colour, width=2)
