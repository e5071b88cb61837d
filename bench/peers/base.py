"""What all peers share: one decision per guided call, the engine's records, and velocities kept per latent frame.

A peer says when a call is computed (``decide``), what stands in for the model (``answer``) and what it keeps of a
computed call (``learn``). Everything else, records and FLOPs included, is the engine's, so a peer's totals can be laid
beside ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accel.call import Call, Decision, Family, Kind
from accel.engine import Acceleration, Denoiser, Run
from accel.history import VelocityHistory
from accel.predict import hold
from accel.sampling import SegmentPlan
from accel.timeline import Timeline

MakeRun = Callable[[Denoiser, Timeline], Run]
REGIMES = ("tiny-df", "tiny-next-clip", "tiny-causal")


@dataclass(frozen=True, slots=True)
class Peer:
    """A published method to compare with.

    Attributes:
        name: as printed in tables. source: paper or code that defines it.
        settings: values of its one knob, mild first.
        make: from a setting to what makes the engine of a run (``demo.generate.sample(make_run=...)``).
        regimes: tiny models it is defined on; ``tiny-causal`` with Euler steps only.
        note: our reading where the source is silent.
        steps: solver steps to sample with, from those of the full run and a setting; None leaves them.
    """

    name: str
    source: str
    settings: tuple
    make: Callable[[Any], MakeRun]
    regimes: tuple[str, ...] = REGIMES
    note: str = ""
    steps: Callable[[int, Any], int] | None = None

    def plan(self, plan: SegmentPlan, setting: Any) -> SegmentPlan:
        """The plan to sample with: the given one, or one with fewer steps and ``ar_step`` scaled with them."""
        if self.steps is None:
            return plan
        steps = self.steps(plan.steps, setting)
        ar_step = max(1, round(plan.ar_step * steps / plan.steps)) if plan.ar_step else 0
        return replace(plan, steps=steps, ar_step=ar_step)


class PeerRun(Run):
    """An engine whose decisions and answers are a peer's.

    The state of a segment is forgotten at ``begin_segment``; a commit or prefill is computed and leaves it alone. A
    call is computed whatever the method says while an active latent frame has nothing to be answered with.

    Class attributes:
        title: name in messages. depth: true velocities kept per latent frame, 0 for none.
    """

    title = "Peer"
    depth = 1

    def __init__(self, denoiser: Denoiser, timeline: Timeline) -> None:
        super().__init__(Acceleration(), denoiser, timeline)
        self.spent, self.told = 0, {}
        self.history: VelocityHistory | None = None

    def begin_segment(self, segment: int, frames: int, prefix: int) -> None:
        """Forgets everything: a segment of ``frames`` latent frames starts."""
        self._frames = frames
        if self.depth and (self.history is None or self.history.frames != frames):
            self.history = VelocityHistory(frames, self.depth)
        elif self.history is not None:
            self.history.clear()
        self.known: set[int] = set()
        self.reset(frames)

    def step(self, call: Call, x: Tensor) -> tuple[Tensor, bool]:
        """As ``Run.step``.

        Raises:
            ValueError: the sampler re-noises, after which no stored velocity means anything.
        """
        if call.kind is not Kind.DENOISE:
            return super().step(call, x)
        if call.family is Family.RENOISE:
            raise ValueError(f"{self.title}: holds velocities, which fresh noise forbids; sample with Euler steps.")
        started = time.perf_counter()
        self.spent, self.told = 0, {}
        decision = self.decide(call, x)
        velocity = self.answer(call, x, decision)
        if decision is Decision.RECOMPUTE:
            self.known |= set(active_frames(call))
            self.learn(call, x, velocity)
        self._record(call, decision, started, flops=self.spent, **self.told)
        return velocity, decision is Decision.RECOMPUTE

    def reset(self, frames: int) -> None:
        """Forget the state of the method."""

    def decide(self, call: Call, x: Tensor) -> Decision:
        """Decision for the whole guided call; may write ``told`` (fields of the record) and add to ``spent``."""
        raise NotImplementedError

    def answer(self, call: Call, x: Tensor, decision: Decision) -> Tensor:
        """Velocity of the window ``[B, C, T, H, W]``; what it costs is added to ``spent``."""
        return self.compute(call, x) if decision is Decision.RECOMPUTE else self.held(call, x)

    def learn(self, call: Call, x: Tensor, velocity: Tensor) -> None:
        """A computed call's velocity."""
        if self.history is not None:
            self.history.push(call.frames, call.sigmas, velocity, call.active)

    @property
    def state_bytes(self) -> int:
        return 0 if self.history is None else self.history.nbytes

    def compute(self, call: Call, x: Tensor) -> Tensor:
        """The model's own velocity, counted."""
        self.spent += self.denoiser.flops(call, x.shape[2])
        return self.denoiser.velocity(call, x)

    def feature(self, kind: str, call: Call, x: Tensor) -> Tensor:
        """What a signal looks at, counted."""
        self.spent += self.denoiser.feature_flops(kind, call, x.shape[2])
        return self.denoiser.feature(kind, call, x)

    def held(self, call: Call, x: Tensor) -> Tensor:
        """Newest true velocity of every active latent frame, zero elsewhere."""
        return self.placed(call, x, hold(self.history, call.active_frames))

    @staticmethod
    def placed(call: Call, x: Tensor, part: Tensor) -> Tensor:
        """``part``, of the active interval, in a window of zeros."""
        first, last = (frame - call.frames[0] for frame in call.active_frames)
        if (first, last) == (0, x.shape[2]):
            return part
        velocity = torch.zeros(x.shape, dtype=part.dtype, device=part.device)
        velocity[:, :, first:last] = part
        return velocity

    def forced(self, call: Call) -> str | None:
        """Why the call is computed whatever the method measures: an active latent frame not computed before, or the
        last call of the segment."""
        frames = active_frames(call)
        if not frames or not self.known.issuperset(frames):
            return "new frames"
        return "last" if active_steps(call)[0] == call.total_steps else None

    def compute_by_force(self, reason: str) -> Decision:
        """RECOMPUTE, with the reason in the record."""
        self.told["forced"] = reason
        return Decision.RECOMPUTE


def active_frames(call: Call) -> list[int]:
    """Latent frames of the segment that take a solver step after this call."""
    return [frame for frame, flag in enumerate(call.active, call.frames[0]) if flag]


def active_steps(call: Call) -> list[int]:
    """Local solver steps (1..N) of the active latent frames, ascending."""
    return sorted(step for step, flag in zip(call.steps, call.active, strict=True) if flag)
