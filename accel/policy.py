"""Whether a model call is computed, held or predicted, from how much its input changed.

A policy answers one question per denoising call and keeps the accumulated discrepancy between answers. It knows nothing
of tensors: the discrepancy is a host float, so a decision list can be planned, replayed and tested without a model.
Chunk-wise decisions (FlowCache, arXiv 2602.10825) are one policy object per chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .call import Decision

__all__ = [
    "Answers",
    "Decision",
    "FixedPolicy",
    "IntervalPolicy",
    "Policy",
    "ThresholdPolicy",
    "TriModalConfig",
    "TriModalPolicy",
    "ask",
]


@runtime_checkable
class Policy(Protocol):
    """What the engine asks. For every denoising call exactly one of ``decide`` and ``force`` is called.

    Attributes:
        accumulated: the r^- that was last compared; None where nothing was compared (forced call, non-finite signal,
            policies without a threshold).
        threshold: what it was compared with; None for policies without a threshold.
        reason: why the last answer was RECOMPUTE: ``"threshold"``, ``"cap"`` (too many skips in a row),
            ``"no history"`` (a skip was wanted and nothing stored could serve it), ``"non-finite"`` (signal NaN,
            infinite or negative), ``"off"`` (threshold zero); None after a skip, a planned recompute, ``force`` or
            ``reset``.
    """

    accumulated: float | None
    threshold: float | None
    reason: str | None

    def decide(self, discrepancy: float = 0.0, can_cache: bool = True, can_predict: bool = True) -> Decision:
        """Answer for this call; ``discrepancy`` is the increment d_k since the previous call, not the sum."""
        ...

    def force(self) -> None:
        """This call was recomputed by force (warm-up, last call, new frames)."""
        ...

    def reset(self) -> None:
        """Forget everything: a new segment starts."""
        ...


class Answers:
    """Shared bookkeeping: the running sum, the skips in a row and what the timeline is told."""

    def __init__(self, max_skip: int | None) -> None:
        self.max_skip = max_skip
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new segment starts."""
        self._sum = 0.0
        self._skips = 0
        self.accumulated: float | None = None
        self.threshold: float | None = None
        self.reason: str | None = None

    def force(self) -> None:
        """This call was recomputed by force (warm-up, last call, new frames): r = 0 and no skips in a row."""
        self._recompute(None)
        self.accumulated = None

    def impose(self, decision: Decision, discrepancy: float) -> None:
        """In place of ``decide`` or ``force``: what this call does is settled, whatever the policy would say, and this
        was its increment, which is left out if it is not usable."""
        if decision is Decision.RECOMPUTE:
            self.force()
            return
        kept = self._decay if decision is Decision.PREDICT else 1.0
        before = self._sum
        self._skip(decision, kept * self.accumulated if self._add(discrepancy) else before)

    _decay = 1.0  # what a PREDICT leaves of the sum

    @property
    def _capped(self) -> bool:
        return self.max_skip is not None and self._skips >= self.max_skip

    def _recompute(self, reason: str | None) -> Decision:
        self._sum = 0.0
        self._skips = 0
        self.reason = reason
        return Decision.RECOMPUTE

    def _skip(self, decision: Decision, remainder: float) -> Decision:
        self._sum = remainder
        self._skips += 1
        self.reason = None
        return decision

    def _planned(self, planned: Decision, discrepancy: float, can_cache: bool, can_predict: bool) -> Decision:
        """A decision taken beforehand, or RECOMPUTE where it cannot be had."""
        if planned is Decision.RECOMPUTE:
            return self._recompute(None)
        if not self._add(discrepancy):
            return self._recompute("non-finite")
        self.accumulated = None
        if not (can_cache if planned is Decision.CACHE else can_predict):
            return self._recompute("no history")
        return self._skip(planned, 0.0)

    def _add(self, discrepancy: float) -> bool:
        """r^- = r + d. False where d cannot be trusted, which never becomes a skip."""
        increment = float(discrepancy)
        usable = math.isfinite(increment) and increment >= 0.0
        self.accumulated = self._sum + increment if usable else None
        return usable


class ThresholdPolicy(Answers):
    """Reuse while the accumulated discrepancy stays within ``delta``, else recompute and start again from zero.

    The rule of ARCache's History-Guided Cache (CVPR 2026): ``A += d``, and ``A <= delta`` reuses. FlowCache
    (arXiv 2602.10825) reuses on ``A < delta`` and has no cap: ``inclusive=False, max_skip=None``.

    Args:
        delta: threshold >= 0 in units of the signal it was measured for. Zero is off: every call recomputes, also when
            the signal is exactly zero.
        max_skip: most skips in a row, None for no cap.
        inclusive: whether a sum equal to ``delta`` still reuses.

    Raises:
        ValueError: ``delta`` negative or not finite, ``max_skip`` below 1.
    """

    def __init__(self, delta: float, max_skip: int | None = 5, inclusive: bool = True) -> None:
        self.delta = _level("ThresholdPolicy", "delta", delta)
        self.inclusive = inclusive
        super().__init__(_cap("ThresholdPolicy", max_skip))

    def reset(self) -> None:
        """Forget everything: a new segment starts."""
        super().reset()
        self.threshold: float | None = self.delta

    def decide(self, discrepancy: float, can_cache: bool = True, can_predict: bool = True) -> Decision:
        """CACHE or RECOMPUTE; ``can_predict`` is ignored, this policy never predicts."""
        if not self._add(discrepancy):
            return self._recompute("non-finite")
        if self.delta == 0.0:
            return self._recompute("off")
        within = self.accumulated <= self.delta if self.inclusive else self.accumulated < self.delta
        if not within:
            return self._recompute("threshold")
        if self._capped:
            return self._recompute("cap")
        if not can_cache:
            return self._recompute("no history")
        return self._skip(Decision.CACHE, self.accumulated)


@dataclass(frozen=True, slots=True)
class TriModalConfig:
    """Thresholds of SCOPE's tri-modal scheduler (arXiv 2604.02979).

    Attributes:
        tau_cache: below this r^- the last velocity is held; 0 never holds. SCOPE: 0.18 SkyReels-V2, 0.03 MAGI-1.
        tau_predict: below this it is predicted, from here on recomputed; 0 is off. SCOPE: 0.42 and 0.08.
        decay: what a PREDICT leaves of r^-, in (0, 1]. Below 1 it delays the next recompute; ``max_skip`` bounds that.
        max_skip: most skips in a row (SCOPE's H), None for no cap.

    Raises:
        ValueError: a threshold negative or not finite, ``tau_cache > tau_predict``, ``decay`` outside (0, 1],
            ``max_skip`` below 1.
    """

    tau_cache: float
    tau_predict: float
    decay: float = 0.75
    max_skip: int | None = 5

    def __post_init__(self) -> None:
        _level("TriModalConfig", "tau_cache", self.tau_cache)
        _level("TriModalConfig", "tau_predict", self.tau_predict)
        _cap("TriModalConfig", self.max_skip)
        if self.tau_cache > self.tau_predict:
            raise ValueError(
                f"TriModalConfig: tau_cache {self.tau_cache} is above tau_predict {self.tau_predict}; holding must "
                f"stop before predicting does, so lower tau_cache or raise tau_predict."
            )
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(
                f"TriModalConfig: decay {self.decay} is outside (0, 1]; use 0.75 as SCOPE does, or 1 for no decay."
            )


class TriModalPolicy(Answers):
    """CACHE, PREDICT or RECOMPUTE from two thresholds: SCOPE eq. 3 and 5, arXiv 2604.02979.

    ``r^- = r + d``. CACHE where ``r^- < tau_cache``, and ``r = r^-``; PREDICT where
    ``tau_cache <= r^- < tau_predict``, and ``r = decay * r^-``; else RECOMPUTE, and ``r = 0``. Where a prediction is
    wanted but the history is too short, the last velocity is held below the middle of the two thresholds (never with
    ``tau_cache`` 0) and recomputed above it.
    """

    def __init__(self, config: TriModalConfig) -> None:
        self.config, self._decay = config, config.decay
        super().__init__(config.max_skip)

    def decide(self, discrepancy: float, can_cache: bool = True, can_predict: bool = True) -> Decision:
        """Answer for this call; ``can_cache`` and ``can_predict`` say what the stored velocities can serve."""
        tau_cache, tau_predict = self.config.tau_cache, self.config.tau_predict
        self.threshold = tau_predict
        if not self._add(discrepancy):
            return self._recompute("non-finite")
        if tau_predict == 0.0:
            return self._recompute("off")
        if self.accumulated >= tau_predict:
            return self._recompute("threshold")
        if self._capped:
            return self._recompute("cap")
        if self.accumulated < tau_cache:
            self.threshold = tau_cache
            return self._skip(Decision.CACHE, self.accumulated) if can_cache else self._recompute("no history")
        if can_predict:
            return self._skip(Decision.PREDICT, self._decay * self.accumulated)
        middle = 0.5 * (tau_cache + tau_predict)
        if can_cache and tau_cache > 0.0 and self.accumulated < middle:
            self.threshold = middle
            return self._skip(Decision.CACHE, self.accumulated)
        return self._recompute("no history")


class FixedPolicy(Answers):
    """Replays a list of decisions, one entry per call, forced calls included; past its end every call recomputes.

    For replays, oracles and negative controls. A planned skip that the stored velocities cannot serve, or whose signal
    is not finite, recomputes.

    Args:
        decisions: ``Decision`` members or their values (``"cache"``, ``"predict"``, ``"recompute"``).
        rewind: whether ``reset`` starts the list again (one list for every segment) or keeps the place (one list for
            the whole run).

    Attributes:
        place: entries used up.
    """

    def __init__(self, decisions: Iterable[Decision | str], rewind: bool = True) -> None:
        self.decisions = tuple(Decision(entry) for entry in decisions)
        self.rewind = rewind
        self.place = 0
        super().__init__(None)

    def reset(self) -> None:
        """A new segment starts."""
        super().reset()
        if self.rewind:
            self.place = 0

    def force(self) -> None:
        """This call was recomputed by force; its entry is passed over."""
        super().force()
        self.place += 1

    def decide(self, discrepancy: float = 0.0, can_cache: bool = True, can_predict: bool = True) -> Decision:
        """The next entry of the list."""
        planned = self.decisions[self.place] if self.place < len(self.decisions) else Decision.RECOMPUTE
        self.place += 1
        return self._planned(planned, discrepancy, can_cache, can_predict)


class IntervalPolicy(Answers):
    """Recomputes every ``interval``-th call and skips the others: the fixed-interval baseline.

    Args:
        interval: calls from one recompute to the next, >= 1; 1 recomputes every call.
        skip: ``Decision.PREDICT`` or ``Decision.CACHE``, what the calls between do.

    Raises:
        ValueError: ``interval`` below 1, or ``skip`` is RECOMPUTE.
    """

    def __init__(self, interval: int, skip: Decision | str = Decision.PREDICT) -> None:
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise ValueError(f"IntervalPolicy: interval {interval!r} must be a whole number >= 1; 1 skips nothing.")
        self.interval = interval
        self.skip = Decision(skip)
        if self.skip is Decision.RECOMPUTE:
            raise ValueError("IntervalPolicy: skip 'recompute' skips nothing; use 'cache' or 'predict', or interval 1.")
        super().__init__(interval - 1)

    def reset(self) -> None:
        """A new segment starts, with a recompute."""
        super().reset()
        self._started = False

    def force(self) -> None:
        """This call was recomputed by force; the interval counts from it."""
        super().force()
        self._started = True

    def decide(self, discrepancy: float = 0.0, can_cache: bool = True, can_predict: bool = True) -> Decision:
        """RECOMPUTE at the start and after ``interval - 1`` skips, else ``skip``."""
        started, self._started = self._started, True
        if not started:
            return self._recompute("no history")
        if self._capped:
            return self._recompute("cap")
        return self._planned(self.skip, discrepancy, can_cache, can_predict)


def ask(policies: Sequence[tuple[Policy, float]], can_predict: bool, too_far: bool) -> tuple[Decision, Policy, float]:
    """What several policies decide together: the most careful answer, the policy that gave it and its increment.

    Args:
        policies: each with the increment of this call. can_predict: as of ``Policy.decide``. too_far: whether a
            prediction would reach too far ahead, so that the call is computed instead.
    """
    answers = []
    for policy, value in policies:
        decision = policy.decide(value, can_cache=True, can_predict=can_predict)
        if decision is Decision.PREDICT and too_far:
            policy.force()
            decision, policy.reason = Decision.RECOMPUTE, "reach"
        answers.append((decision, policy, value))
    severity = (Decision.CACHE, Decision.PREDICT, Decision.RECOMPUTE)
    chosen = max(answers, key=lambda answer: severity.index(answer[0]))
    if chosen[0] is Decision.RECOMPUTE:
        for _, policy, _ in answers:
            if policy is not chosen[1]:
                policy.force()
    return chosen


def check_warmup(node: str, value: int) -> None:
    """Raises ValueError, in the name of ``node``, for a warm-up that computes no step."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{node}: warm-up is {value!r}; at least 1 step of every chunk must be computed.")


def told_reason(reason: str | None, renoised: bool, holds: bool) -> str | None:
    """What the timeline is told of a policy's ``reason`` to recompute; None where a threshold was passed.

    Args:
        reason: as ``Policy.reason``. renoised: the sampler adds fresh noise, so nothing can be predicted. holds:
            whether the thresholds ever hold a velocity; if not, no threshold is to blame there.
    """
    if renoised and (reason == "no history" or (reason is not None and not holds)):
        return "fresh noise"
    return None if reason == "threshold" else reason


def _level(owner: str, name: str, value: float) -> float:
    if not math.isfinite(value) or value < 0.0:
        raise ValueError(f"{owner}: {name} {value} must be a finite number >= 0; use 0 to turn skipping off.")
    return float(value)


def _cap(owner: str, value: int | None) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(
            f"{owner}: max_skip {value!r} must be a whole number >= 1, or None for no cap; to skip nothing set the "
            f"threshold to 0."
        )
    return value
