"""Reading a timeline's JSON: what has to be there, of which type, and how large it may be.

A file can be cut off, changed by hand or by a fault, or belong to something else; whatever it is, nothing of it goes
further than this unchecked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from reprlib import repr as shorten
from typing import Any

from .records import StepRecord

VERSION = 1
REMEDY = "use the JSON that AR Timeline saved"
MOST_ROWS, MOST_COLUMNS, MOST_DEPTH, MOST_LETTERS = 1 << 16, 1 << 22, 16, 10_000
NOTHING = type(None)
HEADER = {
    "rows": int, "columns": int, "frames_per_row": int, "branches": int, "row_unit": str, "title": str,
    "schedule": dict, "settings": dict,
}  # fmt: skip
TOTALS = {
    "flops_full": (int, float, NOTHING), "state_bytes": (int, NOTHING), "kv_bytes": (int, NOTHING),
    "late": (dict, NOTHING),
}  # fmt: skip
LATE = {"decisions": int, "differ": int}
NEEDED = {"segment": int, "iteration": int, "frames": list, "decision": str}
NUMBER = (int, float, NOTHING)
OPTIONAL = {
    "sigma": NUMBER, "window": (list, NOTHING), "forced": (str, NOTHING), "sigmas": (list, NOTHING),
    "discrepancy": NUMBER, "increment": NUMBER, "threshold": NUMBER, "order": (int, str, NOTHING), "corrected": NUMBER,
    "queries": (list, NOTHING), "error": NUMBER, "flops": int, "seconds": (int, float),
}  # fmt: skip


def parse(data: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """A timeline's JSON as a dict of this version.

    Raises:
        ValueError: no JSON object, another version, or nested beyond measure.
    """
    try:
        content = json.loads(data) if isinstance(data, str) else data
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Timeline: the text is no JSON ({error}); {REMEDY}.") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"Timeline: the JSON is a {type(content).__name__}, not an object; {REMEDY}.")
    if content.get("version") != VERSION:
        raise ValueError(
            f"Timeline: JSON has version {shorten(content.get('version'))}, this release reads version {VERSION}; "
            "read it with the release that wrote it."
        )
    _check_depth(content, MOST_DEPTH)
    return content


def header_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a ``Timeline``, without the records.

    Raises:
        ValueError: an entry of another type, or sizes beyond measure.
    """
    header = _taken(content, {}, HEADER, "")
    for name, most in (("rows", MOST_ROWS), ("columns", MOST_COLUMNS)):
        if header.get(name, 0) > most:
            _refuse(f"{name} is {shorten(header[name])}, more than {most}")
    totals = content.get("totals", {})
    if not isinstance(totals, Mapping):
        _refuse(f"totals is {shorten(totals)}")
    given = _taken(totals, {}, TOTALS, "totals ")
    if given.get("late") is not None:
        given["late"] = _taken(given["late"], LATE, {}, "totals late ")
    return header | given | {"flops_full": given.get("flops_full") or 0}


def records_of(content: Mapping[str, Any]) -> list[StepRecord]:
    """The records.

    Raises:
        ValueError: one that cannot be.
    """
    entries = content.get("records")
    if not isinstance(entries, list):
        _refuse(f"records is {shorten(entries)}")
    return [_record(index, entry, content.get("frames_per_row", 1)) for index, entry in enumerate(entries)]


def _record(index: int, entry: Any, frames_per_row: int) -> StepRecord:
    where = f"record {index} "
    if not isinstance(entry, Mapping):
        _refuse(f"{where}is {shorten(entry)}")
    given = _taken(entry, NEEDED, OPTIONAL, where)
    for name in ("frames", "window"):
        if given.get(name) is not None:
            _check_interval(given[name], where + name, MOST_ROWS * frames_per_row)
    for interval in given.get("queries") or ():
        _check_interval(interval, where + "queries", MOST_ROWS * frames_per_row)
    if not all(_fits(level, NUMBER) for level in given.get("sigmas") or ()):
        _refuse(f"{where}sigmas is {shorten(given['sigmas'])}")
    if not (0 <= given["segment"] < 1 << 31 and 0 <= given["iteration"] < 1 << 31):
        _refuse(f"{where}is of segment {shorten(given['segment'])} and iteration {shorten(given['iteration'])}")
    return StepRecord(**given | {"sigma": given.get("sigma")})


def _taken(content: Mapping[str, Any], needed: Mapping[str, Any], known: Mapping[str, Any], where: str) -> dict:
    """The entries of a mapping that are known, each of its type."""
    for name in needed:
        if name not in content:
            _refuse(f"{where}has no {name}")
    given = {name: content[name] for name in (*needed, *known) if name in content}
    for name, value in given.items():
        if not _fits(value, needed.get(name, known.get(name))):
            _refuse(f"{where}{name} is {shorten(value)}")
    return given


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, str) and len(value) > MOST_LETTERS:
        return False
    whole = not isinstance(value, float) or math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool) and whole


def _check_interval(interval: Any, where: str, most: int) -> None:
    whole = isinstance(interval, list) and len(interval) == 2 and all(_fits(end, int) for end in interval)
    if not whole or not 0 <= interval[0] <= interval[1] <= most:
        _refuse(f"{where} is {shorten(interval)}")


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, Mapping | list):
        if not left:
            _refuse(f"it is nested more than {MOST_DEPTH} deep")
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_depth(item, left - 1)


def _refuse(reason: str) -> None:
    raise ValueError(f"Timeline: the JSON is damaged: {reason}; {REMEDY}.")
