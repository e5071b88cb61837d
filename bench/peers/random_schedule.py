"""Negative control: a random schedule with a given share of computed calls, whatever is measured.

The other calls are predicted as ours are (order 1 in the noise level, same guards), or held where a latent frame has
one stored velocity, so what is left of the difference to ours is the choice of calls. The share is kept in every
stretch of 20 calls by drawing without replacement (Knuth, Algorithm S); calls computed by force count towards it.
"""

from __future__ import annotations

import random

from torch import Tensor

from accel.call import Call, Decision
from accel.engine import Denoiser
from accel.predict import predict
from accel.timeline import Timeline

from .base import MakeRun, Peer, PeerRun

STRETCH = 20


class RandomRun(PeerRun):
    """Computes ``share`` of the calls, drawn by ``seed``."""

    title = "Random schedule"
    depth = 2

    def __init__(self, denoiser: Denoiser, timeline: Timeline, share: float, seed: int = 0) -> None:
        super().__init__(denoiser, timeline)
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{self.title}: share is {share}; use a part of the calls from 0 to 1.")
        self.share = share
        self._dice = random.Random(seed)
        self._debt = 0.0

    def decide(self, call: Call, x: Tensor) -> Decision:
        place = call.iteration % STRETCH
        if place == 0:
            self._debt += self.share * STRETCH
            self._due = round(self._debt)
            self._debt -= self._due
        reason = self.forced(call)
        drawn = self._dice.random() * (STRETCH - place) < self._due
        if reason is not None or drawn:
            self._due = max(0, self._due - 1)
            return Decision.RECOMPUTE if reason is None else self.compute_by_force(reason)
        return Decision.PREDICT if min(self.history.count(call.active_frames)) > 1 else Decision.CACHE

    def reset(self, frames: int) -> None:
        self._due = 0

    def answer(self, call: Call, x: Tensor, decision: Decision) -> Tensor:
        if decision is not Decision.PREDICT:
            return super().answer(call, x, decision)
        self.told["order"] = 1
        sigmas = [sigma for sigma, active in zip(call.sigmas, call.active, strict=True) if active]
        return self.placed(call, x, predict(self.history, call.active_frames, sigmas, 1))


def make(share: float) -> MakeRun:
    """A random schedule that computes this share of the calls."""
    return lambda denoiser, timeline: RandomRun(denoiser, timeline, share)


PEER = Peer(
    name="random schedule",
    source="negative control",
    settings=(0.5, 0.4, 0.33, 0.25, 0.2),
    make=make,
    note="same prediction and guards as ours, calls drawn at random",
)
