"""Pyramid Attention Broadcast (arXiv 2408.12588): inside a band of timesteps, attention outputs are broadcast to the
next calls, cross-attention's further than self-attention's.

Reading: the tiny models attend over space and time together, so there is one range for self-attention (the paper's
spatial one) and one for cross-attention, four calls longer, as in the paper's 2-4-6 and 5-7-9. Timesteps are 1000
times the noise level, a call's the mean over its active latent frames, the band 450 to 930. A range of n computes a
module and broadcasts its output, before its gate, to the next n - 1 calls. The feed-forward layers are always computed
(the paper broadcasts a few of them in one of its models only). Every call is a RECOMPUTE with what it computed as its
FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from accel.call import Call, Decision
from accel.engine import Denoiser
from accel.timeline import Timeline

from .base import MakeRun, Peer, PeerRun
from .parts import MODULES, close_forward, ends_flops, module_flops, open_forward, run_blocks, text_flops

BAND = (450.0, 930.0)
FURTHER = 4


class BroadcastRun(PeerRun):
    """``ranges``: calls from one computation of a module to the next, 1 for a module that is always computed."""

    title = "PAB"
    depth = 0

    def __init__(
        self,
        denoiser: Denoiser,
        timeline: Timeline,
        ranges: dict[str, int],
        band: tuple[float, float] = BAND,
    ) -> None:
        super().__init__(denoiser, timeline)
        self.ranges, self.band = ranges, band
        self.reset(0)

    def reset(self, frames: int) -> None:
        self.outputs: dict[tuple[int, str], Tensor] = {}
        self.computed_at: dict[str, int] = {}

    def decide(self, call: Call, x: Tensor) -> Decision:
        self.broadcast = set() if (reason := self.forced(call)) or not self._inside(call) else self._reach(call)
        self.told["forced"] = reason
        return Decision.RECOMPUTE

    def answer(self, call: Call, x: Tensor, decision: Decision) -> Tensor:
        frames, layers = x.shape[2], self.denoiser.shape.layers
        opened = open_forward(self.denoiser, call, x)
        run = [module for module in MODULES if module not in self.broadcast]
        self.spent += ends_flops(self.denoiser, frames)
        self.spent += layers * sum(module_flops(self.denoiser, call, frames, module) for module in run)
        self.spent += text_flops(self.denoiser, frames) if "cross" in run else 0
        self.computed_at |= dict.fromkeys(run, call.iteration)

        def provide(layer: int, module: str, compute: Callable[[], Tensor]) -> Tensor:
            if module in self.broadcast:
                return self.outputs[layer, module]
            output = compute()
            if self.ranges.get(module, 1) > 1:
                self.outputs[layer, module] = output
            return output

        return close_forward(opened, run_blocks(opened, opened.tokens, range(layers), provide))

    @property
    def state_bytes(self) -> int:
        return sum(output.nbytes for output in self.outputs.values())

    def _inside(self, call: Call) -> bool:
        levels = [sigma for sigma, active in zip(call.sigmas, call.active, strict=True) if active]
        return self.band[0] < 1000.0 * sum(levels) / len(levels) < self.band[1]

    def _reach(self, call: Call) -> set[str]:
        return {
            module
            for module, reach in self.ranges.items()
            if module in self.computed_at and call.iteration - self.computed_at[module] < reach
        }


def make(reach: int) -> MakeRun:
    """PAB with this range of self-attention; 1 broadcasts nothing."""
    ranges = {"self": reach, "cross": reach + FURTHER} if reach > 1 else {}
    return lambda denoiser, timeline: BroadcastRun(denoiser, timeline, ranges)


PEER = Peer(
    name="PAB",
    source="arXiv 2408.12588",
    settings=(2, 3, 5, 8),
    make=make,
    note="self-attention range n, cross-attention n + 4, timesteps 450 to 930, feed-forward always computed",
)
