"""Writes what was measured: ``quality.json``, ``quality.md`` and one picture a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accel.flops import CONVENTION

from .measure import Extent
from .methods import CEILING, FEWER_STEPS, FLOOR
from .pareto import Curve, draw
from .presets import schedule
from .table import average, groups, table, unreached
from .versus import versus

Rows = list[dict[str, Any]]


def curves(rows: Rows, kind: str) -> list[Curve]:
    """``(FLOP ratio, PSNR)`` means of every method of one model; fewer steps first, dashed."""
    points: dict[str, list[tuple[float, float]]] = {FEWER_STEPS: []}
    for group in groups(rows, kind):
        value = average(group, "psnr")
        if value is not None:
            points.setdefault(group[0]["method"], []).append((average(group, "flop_ratio"), value))
    return [Curve(name, tuple(found), name == FEWER_STEPS) for name, found in points.items()]


def heading(kind: str, extent: Extent) -> str:
    """What the table of one model rests on."""
    clips = "1 clip" if extent.clips == 1 else f"{extent.clips} clips, each with a seed and a prompt of its own"
    return f"{kind}: {schedule(kind, extent.plans[kind])}; {clips}."


def notes(extent: Extent) -> str:
    """How to read the tables."""
    return (
        f"FLOPs: {CONVENTION}; \"FLOPs\" is the full run's over the method's. A budget is a target for that ratio: a "
        f"knob is turned on one clip that is not measured, and may land between {FLOOR:g} and {CEILING:g} of it; "
        f"fewer steps get at least the FLOPs that {FLOOR:g} of it allows. CPU time: full over method, process time on "
        f"one thread, median of {extent.pairs} interleaved pairs over one segment that continues clean history; "
        "realised: that over the FLOP ratio of the same segment. PSNR, SSIM, latent error and drift (slope of the "
        "PSNR over segments) are to the full run of the same clip, PSNR pooled over frames; a clip that equals its "
        "full run has no PSNR. In brackets the 95 % bootstrap interval of the mean over clips. Attribute accuracy: "
        "share of the prompted shapes that a segment shows. State: most that the method keeps between calls."
    )


def write(folder: Path, rows: Rows, missing: dict[str, dict[str, list[float]]], extent: Extent) -> str:
    """Writes everything into ``folder`` and returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [notes(extent)]
    for kind in missing:
        text += [heading(kind, extent), table(rows, kind), unreached(missing[kind]), versus(rows, kind)]
        picture = draw(curves(rows, kind), f"{kind}: quality at equal cost")
        (folder / f"pareto-{kind}.svg").write_text(picture, encoding="utf-8")
    told = {
        "convention": CONVENTION,
        "schedules": {kind: schedule(kind, extent.plans[kind]) for kind in missing},
        "unreached": missing,
        "rows": rows,
    }
    (folder / "quality.json").write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    markdown = "\n\n".join(part for part in text if part)
    (folder / "quality.md").write_text(markdown + "\n", encoding="utf-8")
    return markdown
