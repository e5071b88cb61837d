"""What happened: one record per guided model call, from which the log, the report, the SVG and the widget are made.

JSON (``Timeline.to_json``, version 1)::

    {"version": 1,
     "rows": 13, "columns": 245,           latent frames or chunks; distinct (segment, iteration) of the whole run
     "row_unit": "chunk",                  or "latent frame"
     "frames_per_row": 5,                  row r shows latent frames [r * frames_per_row, (r + 1) * frames_per_row)
     "branches": 2,                        CFG branches of a guided call
     "title": "", "schedule": {}, "settings": {},
     "remark": null,                       why nothing was skipped and what to change, where that is so
     "records": [{
        "segment": 0, "iteration": 12,     iteration inside the segment, from 0
        "column": 12,                      iteration inside the whole run: order of first appearance
        "frames": [0, 15],                 active interval [start, end) in latent frames of the whole video
        "window": [0, 20],                 latent frames given to the model, likewise
        "decision": "cache",               recompute, predict, cache, commit or prefill
        "forced": null,                    why the policy was not asked: warm-up, last, no history, cap, new frames, ...
        "sigma": 0.93,                     highest noise level of the active frames
        "sigmas": [0.71, 0.87, 0.93],      noise level of each row that `frames` touches, or null
        "discrepancy": 0.11,               accumulated, as compared with `threshold`; null where none was measured
        "increment": 0.04,                 what this call added to it
        "threshold": 0.18,
        "order": null,                     order of the prediction
        "corrected": null,                 lambda of the residual correction
        "queries": null,                   latent frames [[start, end), ...] of the video that were forwarded, where
                                           the rest of the window answered with kept K/V
        "error": null,                     of a computed call: relative L2 error of the prediction (or of the held
                                           velocity) that would have stood in its place, where there was one
        "flops": 0, "seconds": 0.002}],    of this record, all branches
     "totals": {
        "calls": {"recompute": 212, "predict": 120, "cache": 158, "commit": 0},
                                           model calls, each CFG branch counted as one; commit includes prefill
        "iterations": 245, "flops": 0,
        "flops_full": 0,                   what an unaccelerated run of the same schedule costs; 0 where unknown
        "flop_ratio": null,                flops_full / flops
        "seconds": 65.2,
        "seconds_full_estimate": 151.0,    every skipped call at the median time of a recompute; null without one
        "late": {"decisions": 41, "differ": 3},
                                           where decisions are taken one step late: how many, and how many of them the
                                           exact rule would have taken otherwise
        "state_bytes": 40000000,           where it was set; kv_bytes are not part of it
        "kv_bytes": 90000000}}             of kept keys and values, where any were

Numbers that are not finite are null. Readers ignore keys they do not know.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, MutableSequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from numbers import Integral, Real
from statistics import median
from typing import Any

from .call import Call, Decision, Kind
from .records import DECISIONS, SKIPS, Columns, Records, StepRecord
from .timeline_read import VERSION, header_of, parse, records_of
from .timeline_report import log_line, summary, why_nothing_skipped
from .timeline_svg import render

__all__ = ["DECISIONS", "SKIPS", "StepRecord", "Timeline"]

ROW_UNITS = ("latent frame", "chunk")


@dataclass(slots=True)
class Timeline:
    """Everything one run did.

    Attributes:
        rows: rows of latent frames or chunks; grows where a record reaches further.
        columns: iterations planned for the whole run; grows likewise. 0 where the plan is not known.
        branches: CFG branches of a guided call.
        row_unit: what a row is, ``latent frame`` or ``chunk``.
        frames_per_row: latent frames of a row.
        title: headline of the picture.
        schedule: how the run was scheduled, for people to read.
        settings: how the acceleration was configured, for people to read.
        flops_full: FLOPs of an unaccelerated run of the same schedule, 0 where unknown.
        state_bytes: most memory that the acceleration's own state took, without kept K/V.
        kv_bytes: most memory that kept keys and values took; None where none are kept.
        late: decisions taken one step late, and those of them that differ from the exact ones; None where none is.
        records: in the order of the run.
    """

    rows: int = 0
    columns: int = 0
    branches: int = 1
    row_unit: str = "latent frame"
    frames_per_row: int = 1
    title: str = ""
    schedule: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    flops_full: int = 0
    state_bytes: int | None = None
    kv_bytes: int | None = None
    late: dict[str, int] | None = None
    records: MutableSequence[StepRecord] = field(default_factory=Records)
    _columns: Columns = field(default_factory=Columns, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 0 or min(self.branches, self.frames_per_row) < 1:
            raise ValueError(
                "Timeline: rows and columns must be 0 or more, branches and frames_per_row 1 or more, got "
                f"{self.rows}, {self.columns}, {self.branches} and {self.frames_per_row}."
            )
        if self.row_unit not in ROW_UNITS:
            raise ValueError(f"Timeline: row_unit must be one of {', '.join(ROW_UNITS)}, got {self.row_unit!r}.")
        given, self.records = self.records, Records()
        for record in given:
            self.add(record)

    def add(self, record: StepRecord) -> None:
        """Appends a record."""
        self.records.append(record)
        self._columns.add(record)
        self.columns = max(self.columns, len(self._columns))
        self.rows = max(self.rows, -(-max(record.frames[1], record.window[1]) // self.frames_per_row))

    def record(
        self, call: Call, decision: Decision | None = None, frames: tuple[int, int] | None = None, **measured: Any
    ) -> StepRecord:
        """Appends what was done at ``call`` and returns it.

        Args:
            call: the model call; its frames become latent frames of the whole video.
            decision: None for a commit or prefill, whose kind says it.
            frames: latent frames of the segment that the decision is about, where it is made per chunk; None for the
                active ones, or for the window of a commit or prefill.
            measured: the other fields of ``StepRecord``.
        """
        start, end = frames or (call.active_frames if call.kind is Kind.DENOISE else call.frames)
        levels = call.sigmas[start - call.frames[0] : end - call.frames[0]]
        by_row: dict[int, float] = {}
        for frame, sigma in enumerate(levels, call.offset + start):
            row = frame // self.frames_per_row
            by_row[row] = max(sigma, by_row.get(row, sigma))
        entry = StepRecord(
            segment=call.segment,
            iteration=call.iteration,
            frames=(call.offset + start, call.offset + end),
            window=(call.offset + call.frames[0], call.offset + call.frames[1]),
            decision=decision if call.kind is Kind.DENOISE else call.kind,
            sigma=max(levels, default=0.0),
            sigmas=tuple(by_row.values()),
            **measured,
        )
        self.add(entry)
        return entry

    def told_error(self, index: int, error: float) -> None:
        """Fills in the prediction error of a record that is there already; one that is not finite is left out."""
        if math.isfinite(error):
            self.records[index] = replace(self.records[index], error=error)

    def column(self, record: StepRecord) -> int:
        """Column of a record: iterations of the whole run in order of first appearance."""
        return self._columns[record]

    def row_range(self, frames: tuple[int, int]) -> range:
        """Rows that latent frames ``[start, end)`` touch."""
        start, end = frames
        return range(start // self.frames_per_row, -(-end // self.frames_per_row) if end > start else 0)

    def totals(self) -> dict[str, Any]:
        """Sums over the records, as in the JSON of this module."""
        counts = Counter(record.decision for record in self.records)
        flops = sum(record.flops for record in self.records)
        seconds = sum(record.seconds for record in self.records)
        computed = [record.seconds for record in self.records if record.decision == "recompute" and record.seconds > 0]
        kept = sum(record.seconds for record in self.records if record.decision not in SKIPS)
        skipped = sum(counts[name] for name in SKIPS)
        totals = {
            "calls": {
                "recompute": counts["recompute"] * self.branches,
                "predict": counts["predict"] * self.branches,
                "cache": counts["cache"] * self.branches,
                "commit": (counts["commit"] + counts["prefill"]) * self.branches,
            },
            "iterations": len(self._columns),
            "flops": flops,
            "flops_full": self.flops_full,
            "flop_ratio": self.flops_full / flops if flops and self.flops_full else None,
            "seconds": seconds,
            "seconds_full_estimate": kept + skipped * median(computed) if computed else None,
        }
        if self.late is not None:
            totals["late"] = dict(self.late)
        if self.state_bytes is not None:
            totals["state_bytes"] = self.state_bytes
        if self.kv_bytes is not None:
            totals["kv_bytes"] = self.kv_bytes
        return totals

    def to_json(self) -> dict[str, Any]:
        """The timeline as plain lists, dicts, strings and finite numbers, ready for ``json.dumps``."""
        records = [
            {item.name: getattr(record, item.name) for item in fields(record)} | {"column": self.column(record)}
            for record in self.records
        ]
        return _plain(
            {
                "version": VERSION,
                "rows": self.rows,
                "columns": self.columns,
                "row_unit": self.row_unit,
                "frames_per_row": self.frames_per_row,
                "branches": self.branches,
                "title": self.title,
                "schedule": self.schedule,
                "settings": self.settings,
                "remark": self.remark(),
                "records": records,
                "totals": self.totals(),
            }
        )

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> Timeline:
        """The timeline that ``to_json`` wrote, from its dict or its text.

        Raises:
            ValueError: no JSON, another version, or what cannot be: one sentence with the entry.
        """
        content = parse(data)
        return cls(**header_of(content), records=records_of(content))

    def to_svg(self) -> str:
        """A stand-alone picture: rows over iterations, and the discrepancy against its threshold."""
        return render(self)

    def remark(self) -> str | None:
        """Why nothing was skipped and what to change; None where something was."""
        return why_nothing_skipped(self)

    def log_line(self) -> str:
        """One line for the log."""
        return log_line(self)

    def summary(self) -> str:
        """A report of several lines: calls by decision and why, FLOPs, time, state, and why nothing was skipped."""
        return summary(self)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)
