"""The rows as a Markdown table: means over clips, bootstrap intervals, and what did not reach its budget."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

COLUMNS = (
    "method", "calls: computed / predicted / held / commit", "GFLOP", "FLOPs", "CPU time", "realised", "PSNR dB (95 %)",
    "SSIM (95 %)", "latent relative L2", "drift dB/segment", "attribute accuracy", "state kB",
)  # fmt: skip
Group = list[dict[str, Any]]


def interval(
    values: Sequence[Any], of: Callable[[Sequence[Any]], float] = fmean, draws: int = 2000
) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of the values, the mean unless told otherwise."""
    dice = random.Random(0)
    found = sorted(of(dice.choices(values, k=len(values))) for _ in range(draws))
    return found[int(0.025 * draws)], found[int(0.975 * draws) - 1]


def groups(rows: Group, kind: str) -> list[Group]:
    """Rows of one model by method and budget, the dearest first."""
    found: dict[tuple, Group] = {}
    for entry in rows:
        if entry["model"] == kind:
            found.setdefault((entry["method"], entry["budget"]), []).append(entry)
    return sorted(found.values(), key=lambda group: average(group, "flop_ratio"))


def average(group: Group, key: str) -> float | None:
    """Mean of a figure over clips; those without it (equal to the full run) are left out, None where all are."""
    values = [entry[key] for entry in group if entry.get(key) is not None]
    return fmean(values) if values else None


def figure(group: Group, key: str, form: str, scale: float = 1.0) -> str:
    """Mean of a figure as text, empty where no clip has it."""
    value = average(group, key)
    return "" if value is None else form.format(value * scale)


def spread(group: Group, key: str, digits: int) -> str:
    """Mean of a figure with its interval, empty where no clip has it."""
    values = [entry[key] for entry in group if entry[key] is not None]
    if not values:
        return ""
    low, high = interval(values)
    return f"{fmean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _line(group: Group) -> str:
    calls = (fmean(entry["calls"][name] for entry in group) for name in ("recompute", "predict", "cache", "commit"))
    budget = group[0]["budget"]
    cells = (
        group[0]["method"] + ("" if budget is None else f", {budget:g}x"),
        " / ".join(f"{count:.0f}" for count in calls),
        figure(group, "flops", "{:.0f}", 1e-9),
        figure(group, "flop_ratio", "{:.2f}x"),
        figure(group, "time_ratio", "{:.2f}x"),
        figure(group, "realised", "{:.2f}"),
        spread(group, "psnr", 2),
        spread(group, "ssim", 4),
        figure(group, "latent_rel_l2", "{:.3f}"),
        figure(group, "drift_db_per_segment", "{:+.2f}"),
        figure(group, "attribute_accuracy", "{:.3f}"),
        figure(group, "state_bytes", "{:.0f}", 1e-3),
    )
    return "| " + " | ".join(cells) + " |"


def table(rows: Group, kind: str) -> str:
    """Table of one model."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "-|" * len(COLUMNS)]
    return "\n".join([*head, *(_line(group) for group in groups(rows, kind))])


def unreached(missing: dict[str, list[float]]) -> str:
    """A sentence on the methods that have no setting for a budget; empty where all have one."""
    told = (
        f"{name} ({', '.join(f'{budget:g}x' for budget in budgets)})" for name, budgets in missing.items() if budgets
    )
    listed = "; ".join(told)
    return f"No setting reaches the budget: {listed}." if listed else ""


def table_of(head: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of any Markdown table, an empty one behind it."""
    texts = ["| " + " | ".join(map(str, line)) + " |" for line in (head, *rows)]
    return [texts[0], "|" + "-|" * len(head), *texts[1:], ""]
