"""Delta-DiT (arXiv 2406.01125): between computed calls a range of blocks is replaced by what it added last time.

    delta = blocks' output - blocks' input, of the rear blocks in the early steps (outlines), of the front blocks in the
    late ones (details)

Reading: half of the blocks are cached; the stage changes where the mean local solver step of the active latent frames
passes half of the steps; the interval is counted from the last full call, and a full call is made at the change of
stage, when a chunk enters and at the last call of a segment. A call with cached blocks is a RECOMPUTE with the FLOPs of
the blocks that ran.
"""

from __future__ import annotations

from torch import Tensor

from accel.call import Call, Decision
from accel.engine import Denoiser
from accel.timeline import Timeline

from .base import MakeRun, Peer, PeerRun, active_steps
from .parts import blocks_flops, close_forward, ends_flops, open_forward, run_blocks, text_flops


class DeltaRun(PeerRun):
    """``interval`` calls from one full call to the next, ``cached`` blocks (None: half), ``boundary`` of the stages as
    a part of a chunk's solver steps."""

    title = "Delta-DiT"
    depth = 0

    def __init__(
        self,
        denoiser: Denoiser,
        timeline: Timeline,
        interval: int,
        cached: int | None = None,
        boundary: float = 0.5,
    ) -> None:
        super().__init__(denoiser, timeline)
        layers = denoiser.shape.layers
        self.interval, self.boundary = interval, boundary
        self.cached = max(layers // 2, 1) if cached is None else cached
        if not 0 < self.cached <= layers or interval < 1:
            raise ValueError(
                f"{self.title}: {self.cached} of {layers} blocks every {interval} calls; cache 1 to {layers} blocks at "
                "an interval of 1 or more."
            )
        self.reset(0)

    def reset(self, frames: int) -> None:
        self.delta: Tensor | None = None
        self._stage, self._full_at = "", 0

    def decide(self, call: Call, x: Tensor) -> Decision:
        steps = active_steps(call)
        stage = "front" if sum(steps) > self.boundary * call.total_steps * len(steps) else "rear"
        reason = self.forced(call)
        self.full = bool(reason) or stage != self._stage or call.iteration - self._full_at >= self.interval
        if self.full:
            self._stage, self._full_at = stage, call.iteration
        self.told["forced"] = reason
        return Decision.RECOMPUTE

    def answer(self, call: Call, x: Tensor, decision: Decision) -> Tensor:
        frames, layers = x.shape[2], self.denoiser.shape.layers
        ranges = {
            "front": (range(0), range(self.cached), range(self.cached, layers)),
            "rear": (range(layers - self.cached), range(layers - self.cached, layers), range(0)),
        }
        before, middle, after = ranges[self._stage]
        count = layers if self.full else layers - self.cached
        opened = open_forward(self.denoiser, call, x)
        self.spent += ends_flops(self.denoiser, frames) + blocks_flops(self.denoiser, call, frames, count)
        self.spent += text_flops(self.denoiser, frames) if count else 0
        tokens = run_blocks(opened, opened.tokens, before)
        if self.full:
            out = run_blocks(opened, tokens, middle)
            self.delta = out - tokens
        else:
            out = tokens + self.delta
        return close_forward(opened, run_blocks(opened, out, after))

    @property
    def state_bytes(self) -> int:
        return 0 if self.delta is None else self.delta.nbytes


def make(interval: int) -> MakeRun:
    """Delta-DiT with this interval."""
    return lambda denoiser, timeline: DeltaRun(denoiser, timeline, interval)


PEER = Peer(
    name="Delta-DiT",
    source="arXiv 2406.01125",
    settings=(2, 3, 4, 6),
    make=make,
    note="half of the blocks, rear ones in the first half of a chunk's steps and front ones after",
)
