"""TeaCache (arXiv 2411.19108): hold the hidden residual while the accumulated change of the modulated input stays
below a threshold.

    A += poly(mean|m_i - m_{i-1}| / mean|m_{i-1}|);   A < threshold reuses, else computes and A = 0.

Reading: m is the first block's modulated input of the latent frames being denoised, and poly, which the paper fits for
each model, the identity, as in ARCache's comparison. One decision per guided call, so that both CFG branches agree; the
call says which step it is, nothing counts forwards. m is remembered at every call, skipped or not. The first solver
step of each chunk and the last call of a segment are computed.
"""

from __future__ import annotations

from torch import Tensor

from accel.call import Call, Decision
from accel.engine import Denoiser
from accel.signals import SignalMeter
from accel.timeline import Timeline

from .base import MakeRun, Peer
from .residual import ResidualRun


class TeaCacheRun(ResidualRun):
    """``threshold`` on the accumulated relative L1 change."""

    title = "TeaCache"
    meter: SignalMeter | None = None

    def __init__(self, denoiser: Denoiser, timeline: Timeline, threshold: float) -> None:
        super().__init__(denoiser, timeline)
        self.threshold = threshold

    def reset(self, frames: int) -> None:
        super().reset(frames)
        self.meter, self.sum = SignalMeter(["current"], frames), 0.0

    def decide(self, call: Call, x: Tensor) -> Decision:
        feature = self.feature("modulated", call, x)
        increment = float(self.meter.measure({"modulated": feature}, call))
        self.told = {"increment": increment, "threshold": self.threshold}
        if reason := self.forced(call):
            self.sum = 0.0
            return self.compute_by_force(reason)
        self.sum += increment
        self.told["discrepancy"] = self.sum
        if self.sum < self.threshold:
            return Decision.CACHE
        self.sum = 0.0
        return Decision.RECOMPUTE

    @property
    def state_bytes(self) -> int:
        return super().state_bytes + (0 if self.meter is None else self.meter.nbytes)


def make(threshold: float) -> MakeRun:
    """TeaCache with this threshold."""
    return lambda denoiser, timeline: TeaCacheRun(denoiser, timeline, threshold)


PEER = Peer(
    name="TeaCache",
    source="arXiv 2411.19108",
    settings=(0.05, 0.08, 0.12, 0.16, 0.2, 0.3),
    make=make,
    note="modulated input of the active latent frames, no polynomial, one decision per guided call",
)
