"""Decisions one step late: what is still on its way from the device is guessed, so that nothing waits for it.

The increment ``d_k`` of a call is known to the host only once the device has made the call's input, which it has not
while it still works on the call before. Here call k is decided with ``d_{k-1}`` plus its trend,
``max(0, 2 d_{k-1} - d_{k-2})``. When ``d_k`` has come, the policies ask themselves again, from the state they had
before call k: what they say is what the exact rule would have done there, and is compared with what was done. From
then on they accumulate ``d_k`` and not the guess, so an error of the guess lives for one call.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .call import Decision
from .policy import Answers, ask
from .signals import HOST_SIGNALS

if TYPE_CHECKING:
    from .timeline import Timeline

EXACT, LATE = "exact", "one step late"
WHEN = (EXACT, LATE)
UNMEASURED = "unmeasured"


def check_when(node: str, value: str) -> None:
    """Raises ValueError, in the name of ``node``, for an unknown time of decision."""
    if value not in WHEN:
        raise ValueError(f"{node}: decision is {value!r}; use {' or '.join(WHEN)}.")


@dataclass(slots=True)
class _Asked:
    """A decision whose increments had not come."""

    policies: list[tuple[Answers, str | None]]
    before: list[Answers]
    known: Mapping[str, float]
    can_predict: bool
    too_far: bool
    decision: Decision


class LateDecisions:
    """The decisions of one segment.

    Args:
        timeline: its ``late`` counts the decisions taken and those that the exact rule would have taken otherwise.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._counts = timeline.late = timeline.late or {"decisions": 0, "differ": 0}
        self._measured: list[Mapping[str, float]] = []
        self._open: _Asked | None = None

    @property
    def ready(self) -> bool:
        """Whether there is an increment to guess from: the first call of a segment has none, the second is one."""
        return len(self._measured) > 1

    def arrived(self, measured: Mapping[str, float]) -> None:
        """The increments of the next call in turn have come; empty where none did."""
        if not measured:
            return
        self._measured = [*self._measured[-1:], measured]
        asked, self._open = self._open, None
        if asked is None:
            return
        decision, *_ = self._ask(asked.policies, measured | asked.known, asked.can_predict, asked.too_far, asked.before)
        self._counts["decisions"] += 1
        if decision is not asked.decision:
            self._counts["differ"] += 1
            for (policy, name), state in zip(asked.policies, asked.before, strict=True):
                vars(policy).update(vars(state))
                policy.impose(asked.decision, _value(name, measured | asked.known))

    def ask(
        self, policies: Sequence[tuple[Answers, str | None]], measured: Mapping[str, float], can_predict: bool,
        too_far: bool,
    ) -> tuple[Decision, Answers, float]:  # fmt: skip
        """As ``policy.ask``, of policies and the signals they read, with guesses.

        Args:
            measured: of it only the signals of the noise levels, which are known, are used.
        """
        known = {name: value for name, value in measured.items() if name in HOST_SIGNALS}
        before = [copy.copy(policy) for policy, _ in policies]
        guesses = {name: self.guess(name) for name in self._measured[-1]}
        answer = self._ask(policies, guesses | known, can_predict, too_far)
        self._open = _Asked(list(policies), before, known, can_predict, too_far, answer[0])
        return answer

    def guess(self, name: str) -> float:
        """The newest increment of a signal plus its trend, where there is one; NaN after one that is not finite."""
        older, newest = (measured.get(name, math.nan) for measured in self._measured[-2:])
        return max(0.0, 2.0 * newest - older) if math.isfinite(older) and math.isfinite(newest) else newest

    @staticmethod
    def _ask(policies, values, can_predict, too_far, states=None) -> tuple[Decision, Answers, float]:
        """Asks the policies, from earlier ``states`` where given."""
        for (policy, _), state in zip(policies, states or (), strict=False):
            vars(policy).update(vars(state))
        return ask([(policy, _value(name, values)) for policy, name in policies], can_predict, too_far)


def _value(name: str | None, values: Mapping[str, float]) -> float:
    return 0.0 if name is None else values.get(name, math.nan)
