"""What the GPU measurement found, for people: the figures to reach, and the tables behind them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from accel.flops import CONVENTION

from .table import table_of


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that a part measures and what it is to be.

    Attributes:
        key: under which the part gives it. words: what it is. part: the part. limit: of ``form``. least: whether the
            limit is the least it may be, else the most.
    """

    key: str
    words: str
    part: str
    limit: float
    least: bool = False
    form: str = "{:.3g}"

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit

    @property
    def goal(self) -> str:
        return f"{'>=' if self.least else '<='} {self.form.format(self.limit)}"


FIGURES = (
    Figure("realised_listed", "realised, diffusion forcing, forced list", "loops", 0.97, True),
    Figure("realised_suffix", "realised, diffusion forcing, forced list and suffix window", "loops", 0.97, True),
    Figure("realised_frozen", "realised, diffusion forcing, forced list and frozen K/V", "loops", 0.97, True),
    Figure("realised_causal", "realised, causal, block 1, K/V 12 against 21 latents", "causal", 0.90, True),
    Figure("skip_share", "skipped step, share of a 1.3B forward", "forwards", 0.001, form="{:.2%}"),
    Figure("skip_ms", "skipped step with host time", "forwards", 1.0, form="{:.3g} ms"),
    Figure("decision_share", "decision and history, share of a 1.3B forward", "forwards", 0.0005, form="{:.3%}"),
    Figure("extra_peak_mb", "extra peak memory without frozen K/V", "memory", 80.0, form="{:.3g} MB"),
    Figure("relative_l1_share", "relative L1, share of copy bandwidth", "kernels", 0.80, True, "{:.1%}"),
    Figure("relative_l1_over_compiled", "relative L1, time over inductor's", "kernels", 1.1),
    Figure("block_sparse", "block-sparse attention, time over density x dense", "attention", 1.35),
    Figure("column_mass", "column mass, dense passes", "attention", 2.2),
    Figure("floor_share", "causal rollout in 4 steps, K/V 12, time over its roofline floor", "causal", 2.0),
    Figure("over_rolling", "the same, speed over K/V 21 in the manner of Self-Forcing", "causal", 1.5, True),
)
"""What has to be reached on an H200."""
NOTE = (
    "{} with random weights, one CFG branch, forced decisions; medians of interleaved rounds after "
    "warm-up, loops the mean of runs forth and back. {} Device time is between events in the device's queue; the "
    "skipped step, blocks and loops are timed from an idle device to an idle device, host time included."
)


def figures(parts: dict[str, Any], toy: bool) -> dict[str, dict[str, Any]]:
    """Every figure by its key: what was measured and whether the goal is reached, or why there is nothing."""
    rows = {}
    for figure in FIGURES:
        part = parts.get(figure.part, {})
        value = part.get("figures", {}).get(figure.key)
        row = {"figure": figure.words, "goal": figure.goal, "measured": value, "reached": None}
        if value is None:
            unrun = "its part stopped before" if part else f"part {figure.part} has not run"
            row["why"] = part.get("why", {}).get(figure.key) or part.get("error") or unrun
        elif toy:
            row["why"] = "toy size: it runs, which says nothing about speed"
        else:
            row["reached"] = figure.reached(value)
        rows[figure.key] = row
    return rows


def markdown(told: dict[str, Any]) -> str:
    """The tables."""
    title = "# On a GPU" if not told["toy"] else "# Toy size: it runs, which says nothing about speed"
    lines = [title, "", NOTE.format("A toy" if told["toy"] else "Wan 1.3B at full size", f"FLOPs: {CONVENTION}."), ""]
    lines += table_of(("figure", "goal", "measured", "reached"), (_figure(key, told) for key in told["figures"]))
    lines += _table([
        {"part": name, "seconds": f"{part['seconds']:.0f}"} | part["conditions"]
        | {"forms used": part["used"], "stopped by": part.get("error")}
        for name, part in told["parts"].items()
    ])  # fmt: skip
    for name, part in told["parts"].items():
        for key, rows in part.items():
            if isinstance(rows, list) and rows:
                lines += [f"## {name}: {key}", "", *_table(rows)]
            elif isinstance(rows, dict) and key not in ("conditions", "figures", "why"):
                nested = all(isinstance(value, dict) for value in rows.values())
                told_rows = [{"": one} | value for one, value in rows.items()] if nested else [rows]
                lines += [f"## {name}: {key}", "", *_table(told_rows)]
    return "\n".join(lines)


def _figure(key: str, told: dict[str, Any]) -> Iterable[str]:
    figure = next(one for one in FIGURES if one.key == key)
    row = told["figures"][key]
    value = row["measured"]
    reached = {True: "yes", False: "no", None: row.get("why", "")}[row["reached"]]
    return figure.words, figure.goal, "-" if value is None else figure.form.format(value), reached


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return table_of(columns, [[_cell(row.get(name)) for name in columns] for row in rows])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items() if one not in ("", 0))
    if isinstance(value, list | tuple):
        return " ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")
