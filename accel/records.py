"""Records of a run, packed: a rollout that never ends keeps about a hundred bytes a call, not objects."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Any

SKIPS = ("predict", "cache")
DECISIONS = ("recompute", *SKIPS, "commit", "prefill")

NUMBERS = ("sigma", "discrepancy", "increment", "threshold", "corrected", "error", "seconds")
SHARED = ("forced", "sigmas", "order", "queries")
LAYOUT = struct.Struct(f"<6iB{len(NUMBERS)}dqB{len(SHARED)}i")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one guided model call did; fields as in the JSON of ``timeline``.

    Raises:
        ValueError: a decision that does not exist, or an interval that runs backwards.
    """

    segment: int
    iteration: int
    frames: tuple[int, int]
    decision: str
    sigma: float | None
    window: tuple[int, int] | None = None
    forced: str | None = None
    sigmas: tuple[float, ...] | None = None
    discrepancy: float | None = None
    increment: float | None = None
    threshold: float | None = None
    order: int | str | None = None
    corrected: float | None = None
    queries: tuple[tuple[int, int], ...] | None = None
    error: float | None = None
    flops: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        decision = getattr(self.decision, "value", self.decision)
        if decision not in DECISIONS:
            raise ValueError(f"StepRecord: decision must be one of {', '.join(DECISIONS)}, got {shorten(decision)}.")
        window = self.frames if self.window is None else self.window
        for name, (start, end) in (("frames", self.frames), ("window", window)):
            if not 0 <= start <= end:
                raise ValueError(
                    f"StepRecord: {name} must be an interval [start, end) from 0 on, got [{start}, {end})."
                )
        object.__setattr__(self, "decision", decision)
        object.__setattr__(self, "frames", tuple(self.frames))
        object.__setattr__(self, "window", tuple(window))
        object.__setattr__(self, "sigmas", None if self.sigmas is None else tuple(self.sigmas))
        queries = None if self.queries is None else tuple((start, end) for start, end in self.queries)
        object.__setattr__(self, "queries", queries)


class Records(MutableSequence[StepRecord]):
    """A list of records, each a fixed number of bytes; what many have in common (noise levels of a step, reasons) is
    kept once. Records come out equal to those put in."""

    def __init__(self, records: Iterable[StepRecord] = ()) -> None:
        self._packed = bytearray()
        self._shared: dict[str, dict[Any, int]] = {name: {} for name in SHARED}
        self._values: dict[str, list[Any]] = {name: [] for name in SHARED}
        self.extend(records)

    def __len__(self) -> int:
        return len(self._packed) // LAYOUT.size

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._record(place) for place in range(*index.indices(len(self)))]
        return self._record(self._place(index))

    def __setitem__(self, index: int | slice, value: Any) -> None:
        if isinstance(index, slice):
            records = self[:]
            records[index] = value
            self._packed = bytearray()
            self.extend(records)
            return
        start = self._place(index) * LAYOUT.size
        self._packed[start : start + LAYOUT.size] = self._pack(value)

    def __delitem__(self, index: int | slice) -> None:
        if isinstance(index, slice):
            places = sorted(range(*index.indices(len(self))), reverse=True)
        else:
            places = [self._place(index)]
        if places and len(places) == places[0] - places[-1] + 1:
            del self._packed[places[-1] * LAYOUT.size : (places[0] + 1) * LAYOUT.size]
            return
        for place in places:
            del self._packed[place * LAYOUT.size : (place + 1) * LAYOUT.size]

    def __eq__(self, other: object) -> bool:
        return self[:] == list(other) if isinstance(other, Records | list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def insert(self, index: int, value: StepRecord) -> None:
        """Puts ``value`` before the record ``index``, as a list does."""
        place = slice(index, None).indices(len(self))[0] * LAYOUT.size
        self._packed[place:place] = self._pack(value)

    def append(self, value: StepRecord) -> None:
        """Puts ``value`` behind the last record.

        Raises:
            ValueError: a field of another type than it should have, or beyond what is kept of it.
        """
        self._packed += self._pack(value)

    def _place(self, index: int) -> int:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"Records: no record {index} among {len(self)}.")
        return place

    def _pack(self, record: StepRecord) -> bytes:
        numbers = [getattr(record, name) for name in NUMBERS]
        absent = sum(1 << place for place, number in enumerate(numbers) if number is None)
        try:
            return LAYOUT.pack(
                record.segment, record.iteration, *record.frames, *record.window, DECISIONS.index(record.decision),
                *(0.0 if number is None else number for number in numbers), record.flops, absent,
                *(self._share(name, getattr(record, name)) for name in SHARED),
            )  # fmt: skip
        except (struct.error, TypeError, OverflowError) as error:
            raise ValueError(f"StepRecord: {shorten(record)} cannot be kept: {error}.") from error

    def _share(self, name: str, value: Any) -> int:
        if value is None:
            return -1
        known, values = self._shared[name], self._values[name]
        place = known.setdefault(value, len(values))
        if place == len(values):
            values.append(value)
        return place

    def _record(self, place: int) -> StepRecord:
        segment, iteration, start, end, first, last, decision, *rest = LAYOUT.unpack_from(
            self._packed, place * LAYOUT.size
        )
        numbers, (flops, absent, *shared) = rest[: len(NUMBERS)], rest[len(NUMBERS) :]
        told = {name: None if absent >> bit & 1 else numbers[bit] for bit, name in enumerate(NUMBERS)}
        told |= {name: None if at < 0 else self._values[name][at] for name, at in zip(SHARED, shared, strict=True)}
        return StepRecord(
            segment=segment, iteration=iteration, frames=(start, end), window=(first, last),
            decision=DECISIONS[decision], flops=flops, **told,
        )  # fmt: skip


class Columns:
    """Columns of a timeline: distinct (segment, iteration), in order of first appearance.

    A run walks through them upwards, so they are searched; one that goes back makes a table of them.
    """

    def __init__(self) -> None:
        self._keys = array("q")
        self._places: dict[int, int] | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, record: StepRecord) -> int:
        """Column of a record.

        Raises:
            KeyError: none was added for it.
        """
        key = _key(record)
        if self._places is not None:
            return self._places[key]
        place = bisect_left(self._keys, key)
        if place == len(self._keys) or self._keys[place] != key:
            raise KeyError((record.segment, record.iteration))
        return place

    def add(self, record: StepRecord) -> None:
        """Makes sure that the record has a column."""
        key = _key(record)
        if self._places is None and self._keys and key < self._keys[-1]:
            self._places = {known: place for place, known in enumerate(self._keys)}
        known = self._keys and (key == self._keys[-1] if self._places is None else key in self._places)
        if not known:
            if self._places is not None:
                self._places[key] = len(self._keys)
            self._keys.append(key)


def _key(record: StepRecord) -> int:
    return record.segment << 32 | record.iteration
