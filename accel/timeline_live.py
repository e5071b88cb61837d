"""A timeline while it grows, in events small and rare enough for a browser.

An event is plain JSON::

    {"version": 1, "run": "6f1c", "title": "", "rows": 13, "columns": 245, "row_unit": "chunk", "frames_per_row": 4,
     "branches": 2,                        as in the JSON of ``timeline``
     "keys": ["column", "segment", ...],   what the values of one record are; intervals take two places
     "records": [[0, 0, 0, 0, 4, ...]],    records since the last event, numbers to four figures, without trailing nulls
     "behind": 0,                          records that wait for a later event
     "done": false}                        true in the last event, which also has
     "calls", "remark", "accelerated"      totals by decision, why nothing was skipped or null, whether anything was set
"""

from __future__ import annotations

import json
import math
from typing import Any
from uuid import uuid4

from .timeline import DECISIONS, VERSION, StepRecord, Timeline

INTERVAL = 0.25
ROOM = 4200
"""Seconds between two events, and bytes that the records of one may take: below 20 KB a second with their headers."""
KEYS = (
    "column", "segment", "iteration", "start", "end", "window_start", "window_end", "decision", "sigma", "discrepancy",
    "threshold", "seconds", "flops", "forced", "order", "corrected", "increment", "error",
)  # fmt: skip


class LiveFeed:
    """Cuts what a timeline gained into events.

    Args:
        timeline: the timeline of the run that goes on.
        interval: seconds between two events. room: bytes for the records of one event.
    """

    def __init__(self, timeline: Timeline, interval: float = INTERVAL, room: int = ROOM) -> None:
        self.timeline, self.interval, self.room = timeline, interval, room
        self.run = uuid4().hex
        self._sent, self._last = 0, -math.inf

    def event(self, now: float, done: bool = False) -> dict[str, Any] | None:
        """The next event at ``now`` (seconds of any steady clock), or None where it is too early for one.

        The last event (``done``) always comes; records that find no room in it are left to the finished timeline.
        """
        if not done and (now - self._last < self.interval or self._sent == len(self.timeline.records)):
            return None
        self._last = now
        told = self._header() | {"records": self._records(), "done": done}
        told["behind"] = len(self.timeline.records) - self._sent
        if done:
            told |= {
                "calls": self.timeline.totals()["calls"],
                "remark": self.timeline.remark(),
                "accelerated": bool(self.timeline.settings),
            }
        return told

    def _header(self) -> dict[str, Any]:
        names = ("title", "rows", "columns", "row_unit", "frames_per_row", "branches")
        told = {name: getattr(self.timeline, name) for name in names}
        return {"version": VERSION, "run": self.run, "keys": list(KEYS)} | told

    def _records(self) -> list[list[Any]]:
        taken, room = [], self.room
        while self._sent < len(self.timeline.records):
            record = self.timeline.records[self._sent]
            values = compact(record, self.timeline.column(record))
            room -= len(json.dumps(values)) + 2
            if room < 0 and taken:
                break
            taken.append(values)
            self._sent += 1
        return taken


def compact(record: StepRecord, column: int) -> list[Any]:
    """The values of ``KEYS``; the decision as its place in ``DECISIONS``."""
    values = [
        column, record.segment, record.iteration, *record.frames, *record.window, DECISIONS.index(record.decision),
        *map(_short, (record.sigma, record.discrepancy, record.threshold, record.seconds)), record.flops,
        record.forced, record.order, *map(_short, (record.corrected, record.increment, record.error)),
    ]  # fmt: skip
    while values[-1] is None:
        values.pop()
    return values


def _short(value: float | None) -> float | None:
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
