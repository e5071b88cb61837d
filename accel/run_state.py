"""What of a run crosses the border between two segments, as tensors and plain JSON: enough to go on bit by bit.

Everything else is made anew when a segment begins: velocity history, policies, signals, frozen K/V, solvers. Random
numbers have no state of their own to save: start noise and fresh noise come from private generators seeded with the
run's seed and the place in the run, so they are drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .timeline import Timeline

CORRECTION, DENOISER = "correction.", "denoiser."


@dataclass(frozen=True, slots=True)
class RunState:
    """State of a run after a finished segment.

    Attributes:
        tensors: by name; views of what the run keeps, so use them before it goes on. facts: plain JSON.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Resumable:
    """Saving and loading of a ``Run``; the run's own members are what is saved."""

    def state(self) -> RunState:
        """What the next segment needs of those before it; ask between two segments.

        Raises:
            ValueError: a model that keeps history of its own which it cannot give away.
        """
        give = getattr(self.denoiser, "state", None)
        if give is None and not self.denoiser.recomputes_history:
            raise ValueError(
                f"Run state: {type(self.denoiser).__name__} keeps the history's keys and values and has no state() "
                "and load(), so its runs cannot be saved; add them (accel.denoiser.KeepsState)."
            )
        tensors = {} if give is None else {DENOISER + name: tensor for name, tensor in give().items()}
        facts = {"timeline": self.timeline.to_json()} | self._learned()
        if self._correction is not None:
            trajectory, facts["correction"] = self._correction.state()
            tensors |= {CORRECTION + name: tensor for name, tensor in trajectory.items()}
        return RunState(tensors, facts)

    def within_memory(self, segment: int, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` returns. Where it runs out of memory and the denoiser has a K/V budget, that is lowered, what
        was recorded and learned in the attempt is dropped, and it is made once more."""
        records, full, learned = len(self.timeline.records), self.timeline.flops_full, self._learned()
        late = self.timeline.late and dict(self.timeline.late)
        try:
            return make()
        except torch.OutOfMemoryError:
            if not hasattr(self.denoiser, "lower"):
                raise
        lowered = self.denoiser.lower()
        if lowered is None:
            raise torch.OutOfMemoryError(
                f"Segment {segment} does not fit the memory, and its K/V budget is as low as it can be: use a smaller "
                "video, smaller blocks, 8-bit storage or cfg 1."
            )
        del self.timeline.records[records:]
        self.timeline.flops_full, self.timeline.late = full, late
        self._learn(learned)
        self.timeline.settings["out of memory"] = f"segment {segment} was made again with {lowered}"
        return make()

    def load(self, state: RunState) -> None:
        """Goes on where another run with the same settings stood; call before the first step.

        Raises:
            ValueError: a state that is none of such a run; this one cannot be used then.
        """
        try:
            self._take_over(state)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise ValueError(
                f"Run state: the saved state does not fit this run ({type(error).__name__}: {error}); start the run "
                "anew and remove its folder."
            ) from error

    def _take_over(self, state: RunState) -> None:
        facts = state.facts
        continue_timeline(self.timeline, Timeline.from_json(facts["timeline"]))
        self._learn(facts)
        if self._correction is not None:
            self._correction.load(_below(CORRECTION, state.tensors), facts["correction"])
        if hasattr(self.denoiser, "load"):
            self.denoiser.load(_below(DENOISER, state.tensors))

    def _learned(self) -> dict[str, Any]:
        """What the segments so far have taught, as plain JSON."""
        facts: dict[str, Any] = {"openings": {name: list(values) for name, values in self._openings.items()}}
        facts["kernels"] = self._kernels.state()
        facts["planned"] = [[list(table), _plain(changes)] for table, changes in self._planned.items()]
        if self._replay is not None:
            facts["replayed"] = self._replay.place
        if self._auto is not None:
            facts["auto"] = self._auto.state()
        return facts

    def _learn(self, facts: Mapping[str, Any]) -> None:
        """Takes over what ``_learned`` gave."""
        self._kernels.load(facts["kernels"])
        self._openings = {name: list(values) for name, values in facts["openings"].items()}
        self._planned = {tuple(table): _numbers(changes) for table, changes in facts["planned"]}
        if self._replay is not None:
            self._replay.place = facts["replayed"]
        if self._auto is not None:
            self._auto.load(facts["auto"])


def continue_timeline(timeline: Timeline, earlier: Timeline) -> None:
    """Begins ``timeline``, which has no records, with the records, sums and remarks of an earlier part of the run."""
    for key, value in earlier.settings.items():
        timeline.settings.setdefault(key, value)
    timeline.flops_full += earlier.flops_full
    timeline.state_bytes, timeline.kv_bytes = earlier.state_bytes, earlier.kv_bytes
    timeline.late = earlier.late
    for record in earlier.records:
        timeline.add(record)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _plain(values: list[float]) -> list[float | None]:
    """Numbers as JSON has them; None for NaN."""
    return [None if math.isnan(value) else value for value in values]


def _numbers(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
