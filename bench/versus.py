"""Latent error at equal FLOPs: our methods with a knob, read off their curves where each rival's row lies."""

from __future__ import annotations

from bisect import bisect_left
from math import log
from statistics import fmean
from typing import Any

from .table import Group, average, groups, interval, table_of

OURS = ("tri-modal", "auto")
LEAST = 2.25  # FLOP ratio: rows of the budgets of 2.5 and more; a whole number of steps may miss a budget by so much
Points = list[tuple[float, float]]


def curve(rows: Group, kind: str, method: str) -> dict[int, Points]:
    """By clip ``(FLOP ratio, latent relative L2)`` of every budget of a method, by rising ratio."""
    found: dict[int, Points] = {}
    for entry in rows:
        if entry["model"] == kind and entry["method"] == method:
            found.setdefault(entry["seed"], []).append((entry["flop_ratio"], entry["latent_rel_l2"]))
    return {seed: sorted(points) for seed, points in found.items()}


def read(points: Points, ratio: float) -> float | None:
    """The error at a FLOP ratio, linear in its logarithm between two points; None outside of them."""
    place = bisect_left(points, (ratio,))
    if place < len(points) and points[place][0] == ratio:
        return points[place][1]
    if not 0 < place < len(points):
        return None
    (low, before), (high, after) = points[place - 1 : place + 1]
    return before + (after - before) * (log(ratio / low) / log(high / low))


def quotient(pairs: Points) -> tuple[float, float, float] | None:
    """Mean of the first over mean of the second, and its 95 % bootstrap interval; None where the second is 0."""

    def of(sample: Points) -> float:
        return fmean(ours for ours, _ in sample) / fmean(theirs for _, theirs in sample)

    if not all(theirs > 0 for _, theirs in pairs):
        return None
    return of(pairs), *interval(pairs, of)


def against(rows: Group, kind: str, rival: Group, method: str) -> tuple[float, tuple[float, float, float]] | None:
    """Mean error of ``method`` at a rival's FLOPs and the quotient of the two; None where its curve does not reach."""
    curves, pairs = curve(rows, kind, method), []
    for entry in rival:
        value = read(curves.get(entry["seed"], []), entry["flop_ratio"])
        if value is not None:
            pairs.append((value, entry["latent_rel_l2"]))
    compared = quotient(pairs) if len(pairs) == len(rival) else None
    return None if compared is None else (fmean(ours for ours, _ in pairs), compared)


def _cells(found: tuple[float, tuple[float, float, float]] | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    error, (value, low, high) = found
    return f"{error:.3f}", f"{value:.2f} ({low:.2f} to {high:.2f})"


def versus(rows: Group, kind: str) -> str:
    """Table of one model; empty where nothing can be compared."""
    told: list[list[Any]] = []
    for rival in groups(rows, kind):
        ratio = average(rival, "flop_ratio")
        if rival[0]["ours"] or ratio < LEAST:
            continue
        found = [against(rows, kind, rival, method) for method in OURS]
        if any(found):
            budget = rival[0]["budget"]
            name = rival[0]["method"] + ("" if budget is None else f", {budget:g}x")
            cells = [cell for entry in found for cell in _cells(entry)]
            told.append([name, f"{ratio:.2f}x", f"{average(rival, 'latent_rel_l2'):.3f}", *cells])
    if not told:
        return ""
    head = ["rival", "FLOPs", "latent error", *(cell for name in OURS for cell in (name, f"{name} / rival (95 %)"))]
    lines = table_of(head, told)
    return "\n".join([f"{kind}: latent relative L2 at the FLOPs of each rival.", "", *lines]).rstrip()
