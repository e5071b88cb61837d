"""EasyCache as in ComfyUI core (arXiv 2507.02860): reuse output minus input while the output is expected to have
changed little.

    rate = mean|v_i - v_last| / mean|x_i - x_last|      of the last two computed calls
    A += rate mean|x_i - x_{i-1}| / mean|v_last|;       A < threshold reuses, else computes and A = 0
    on reuse v = x + (v_last - x_last)

Corrected: core adds the stored difference to the input in place, which with 32-bit models is the very tensor the
sampler goes on with; here the sum is a new tensor. Reading: means over the latent frames being denoised that were
denoised at the earlier call too. A call is computed until the oldest active chunk has passed core's start percent (0.15
of its steps), and again when the youngest has passed the end percent (0.95).
"""

from __future__ import annotations

import math

from torch import Tensor

from accel.call import Call, Decision
from accel.engine import Denoiser
from accel.timeline import Timeline

from .base import MakeRun, Peer, PeerRun, active_frames, active_steps

START, END = 0.15, 0.95


class EasyCacheRun(PeerRun):
    """``threshold`` on the accumulated relative change; ``start`` and ``end`` as parts of a chunk's solver steps."""

    title = "EasyCache"
    depth = 0

    def __init__(
        self, denoiser: Denoiser, timeline: Timeline, threshold: float, start: float = START, end: float = END
    ) -> None:
        super().__init__(denoiser, timeline)
        self.threshold, self.start, self.end = threshold, start, end
        self.reset(0)

    def reset(self, frames: int) -> None:
        self.sum, self.rate = 0.0, math.nan
        self.seen: tuple[set[int], Tensor] | None = None
        self.computed: tuple[set[int], Tensor, Tensor] | None = None

    def decide(self, call: Call, x: Tensor) -> Decision:
        before, self.seen = self.seen, (set(active_frames(call)), x)
        self.told = {"threshold": self.threshold}
        if reason := self.forced(call) or self._outside(call):
            self.sum = 0.0
            return self.compute_by_force(reason)
        frames, size = _shared(call, before[0]), _shared(call, self.computed[0])
        moved = (x - before[1])[:, :, frames].abs().mean() / self.computed[2][:, :, size].abs().mean()
        increment = self.rate * float(moved)
        self.sum += increment
        self.told |= {"increment": increment, "discrepancy": self.sum}
        if self.sum < self.threshold:
            return Decision.CACHE
        self.sum = 0.0
        return Decision.RECOMPUTE

    def held(self, call: Call, x: Tensor) -> Tensor:
        return x + (self.computed[2] - self.computed[1])

    def learn(self, call: Call, x: Tensor, velocity: Tensor) -> None:
        if self.computed is not None:
            frames = _shared(call, self.computed[0])
            change = (velocity - self.computed[2])[:, :, frames].abs().mean()
            self.rate = float(change / (x - self.computed[1])[:, :, frames].abs().mean())
        self.computed = set(active_frames(call)), x, velocity

    @property
    def state_bytes(self) -> int:
        inputs = 0 if self.seen is None else self.seen[1].nbytes
        return inputs + (0 if self.computed is None else self.computed[1].nbytes + self.computed[2].nbytes)

    def _outside(self, call: Call) -> str | None:
        steps = active_steps(call)
        youngest, oldest = ((step - 1) / call.total_steps for step in (steps[0], steps[-1]))
        return "warm-up" if oldest < self.start else "last" if youngest >= self.end else None


def _shared(call: Call, earlier: set[int]) -> list[int]:
    """Window positions of the latent frames active now and at an earlier call."""
    return [frame - call.frames[0] for frame in active_frames(call) if frame in earlier]


def make(threshold: float) -> MakeRun:
    """EasyCache with this threshold."""
    return lambda denoiser, timeline: EasyCacheRun(denoiser, timeline, threshold)


PEER = Peer(
    name="EasyCache",
    source="ComfyUI core, arXiv 2507.02860",
    settings=(0.05, 0.1, 0.2, 0.4, 0.8),
    make=make,
    note="as in core but not in place; active latent frames only; starts with the oldest chunk, ends with the youngest",
)
