"""Fixed interval: every n-th call is computed, the others hold the newest velocity (FORA, arXiv 2407.01425, applied to
the model's output).

Reading: a chunk that enters is computed at its first solver step, and the interval counts from there, so a staircase
whose ``ar_step`` is a multiple of the interval keeps the same rhythm as a synchronous schedule.
"""

from __future__ import annotations

from torch import Tensor

from accel.call import Call, Decision
from accel.engine import Denoiser
from accel.timeline import Timeline

from .base import MakeRun, Peer, PeerRun


class IntervalRun(PeerRun):
    """Computes every ``interval``-th call and the first solver step of each chunk; the others are ``skip``."""

    title = "Fixed interval"
    skip = Decision.CACHE

    def __init__(self, denoiser: Denoiser, timeline: Timeline, interval: int) -> None:
        super().__init__(denoiser, timeline)
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"{self.title}: interval is {interval!r}; use a whole number of 1 or more calls.")
        self.interval = interval

    def decide(self, call: Call, x: Tensor) -> Decision:
        reason = self.forced(call)
        if reason is None and call.iteration - self._computed < self.interval:
            return self.skip
        self._computed = call.iteration
        return Decision.RECOMPUTE if reason is None else self.compute_by_force(reason)


def make(interval: int) -> MakeRun:
    """Holding with this interval."""
    return lambda denoiser, timeline: IntervalRun(denoiser, timeline, interval)


PEER = Peer(
    name="fixed interval",
    source="arXiv 2407.01425",
    settings=(2, 3, 4, 5, 6),
    make=make,
    note="velocity held; the interval starts again when a chunk enters; last call of a segment computed",
)
