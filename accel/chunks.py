"""Decisions per chunk (FlowCache, arXiv 2602.10825): every chunk of a segment has an accumulator of its own.

A guided call then is one forward of the chunks that have to be computed; the others take a held or a predicted
velocity, and answer the attention of the computed ones with the K/V of their last forward. FlowCache's rule is
``TriModalConfig(t, t, max_skip=None)``, which never predicts, on the ``timestep`` signal (SkyReels-V2, warm-up 5, the
last step of a chunk computed) or on ``latent`` (MAGI-1, warm-up 5, ``last="segment"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .call import Call, Decision, Family
from .policy import TriModalConfig, TriModalPolicy, check_warmup, told_reason
from .predict import Guards, check_prediction
from .signals import HOST_SIGNALS

CHUNK_SIGNALS = (*HOST_SIGNALS, "timestep", "current", "latent")
REFRESH = 2.0  # of the kept K/V, on log-signal, where no Active Frame Window sets it
LAST = ("chunk", "segment", "none")


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """Chunk Cache: hold, predict or compute, chunk by chunk.

    Attributes:
        thresholds: on what a chunk has accumulated, in units of ``signal``.
        signal: ``log-signal``, ``log-snr`` or ``timestep`` (of the noise levels alone: decided before the first call),
            ``current`` or ``latent`` (measured at every call).
        coefficients: polynomial that rescales a change before it is accumulated, highest power first.
        order, guards, reach: of the prediction, as in ``SchedulerConfig``.
        warmup: first solver steps of a chunk that are always computed.
        last: which last step is always computed: each chunk's own (FlowCache on SkyReels-V2), that of the segment and
            its first (on MAGI-1), or none.

    Raises:
        ValueError: an unknown choice, a reach or warm-up out of range, or coefficients that are not finite.
    """

    thresholds: TriModalConfig = TriModalConfig(0.0, 3.0, decay=1.0, max_skip=4)
    signal: str = "log-signal"
    coefficients: tuple[float, ...] = (1.0, 0.0)
    order: int | str = 1
    guards: Guards = field(default_factory=Guards)
    reach: float | None = 1.5
    warmup: int = 1
    last: str = "chunk"

    def __post_init__(self) -> None:
        node = "Chunk Cache"
        for name, value, known in (("signal", self.signal, CHUNK_SIGNALS), ("last", self.last, LAST)):
            if value not in known:
                raise ValueError(f"{node}: {name} is {value!r}; use one of {', '.join(known)}.")
        check_prediction(node, self.order, self.reach)
        check_warmup(node, self.warmup)
        if not self.coefficients or not all(map(math.isfinite, self.coefficients)):
            raise ValueError(f"{node}: coefficients {self.coefficients} must be one or more finite numbers.")

    def rescaled(self, change: float) -> float:
        """The polynomial of a change."""
        total = 0.0
        for coefficient in self.coefficients:
            total = total * change + coefficient
        return total


@dataclass(slots=True)
class ChunkDecision:
    """What becomes of one chunk at one call.

    Attributes:
        frames: its latent frames ``[start, end)`` in the segment. decision: what is done. told: fields of the
            timeline's record.
    """

    frames: tuple[int, int]
    decision: Decision
    told: dict


def active_chunks(call: Call, size: int) -> list[tuple[int, int]]:
    """Latent frames ``[start, end)`` of every chunk of ``size`` that takes a step at this call; chunks begin at
    multiples of ``size`` in the segment, a last one may be shorter."""
    first, last = call.frames
    chunks = []
    for start in range(first - first % size, last, size):
        frames = (max(start, first), min(start + size, last))
        if any(call.active[frame - first] for frame in range(*frames)):
            chunks.append(frames)
    return chunks


class ChunkPolicies:
    """The accumulators of one segment.

    Args:
        config: thresholds and forced steps. frames: latent frames of the segment. size: latent frames of a chunk.
    """

    def __init__(self, config: ChunkConfig, frames: int, size: int) -> None:
        self.config, self.frames, self.size = config, frames, size
        self._policies: dict[int, TriModalPolicy] = {}

    def decide(
        self,
        call: Call,
        changes: Mapping[int, float],
        counts: Callable[[tuple[int, int]], Sequence[int]],
        too_far: Callable[[tuple[int, int]], bool],
    ) -> list[ChunkDecision]:
        """One decision for every active chunk.

        Args:
            call: the call; nothing is counted here, progress is read from it.
            changes: of each active chunk (by its first latent frame) since the call before, as measured.
            counts: how many true velocities are stored of each latent frame of an interval.
            too_far: whether a prediction for an interval would reach too far ahead.
        """
        decisions, renoised = [], call.family is Family.RENOISE
        for frames in active_chunks(call, self.size):
            policy = self._policies.setdefault(frames[0] // self.size, TriModalPolicy(self.config.thresholds))
            change = self.config.rescaled(changes.get(frames[0], math.nan))
            reason = self._forced(call, frames, counts(frames))
            if reason is not None:
                policy.force()
                told = {"forced": reason, "increment": change}
                decisions.append(ChunkDecision(frames, Decision.RECOMPUTE, told))
                continue
            can_predict = min(counts(frames)) >= 2 and not renoised
            decision = policy.decide(change, can_cache=True, can_predict=can_predict)
            if decision is Decision.PREDICT and too_far(frames):
                policy.force()
                decision, policy.reason = Decision.RECOMPUTE, "reach"
            told = {"discrepancy": policy.accumulated, "threshold": policy.threshold, "increment": change}
            told["forced"] = told_reason(policy.reason, renoised, self.config.thresholds.tau_cache > 0.0)
            decisions.append(ChunkDecision(frames, decision, told))
        return decisions

    def compute_all(self, plan: Sequence[ChunkDecision], reason: str) -> None:
        """Turns every skip of ``plan`` into a computed chunk, where something is computed anyway."""
        if all(chunk.decision is not Decision.RECOMPUTE for chunk in plan):
            return
        for chunk in plan:
            if chunk.decision is not Decision.RECOMPUTE:
                chunk.decision, chunk.told = Decision.RECOMPUTE, chunk.told | {"forced": reason}
                self._policies[chunk.frames[0] // self.size].force()

    def _forced(self, call: Call, frames: tuple[int, int], counts: Sequence[int]) -> str | None:
        """Why a chunk must be computed whatever its accumulator says."""
        first = call.frames[0]
        step = min(call.steps[frame - first] for frame in range(*frames) if call.active[frame - first])
        if min(counts) == 0:
            return "new frames"
        if step <= self.config.warmup:
            return "warm-up"
        ends = step == call.total_steps
        if ends and (self.config.last == "chunk" or (self.config.last == "segment" and frames[1] == self.frames)):
            return "last"
        return None
