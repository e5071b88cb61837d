"""TeaCache (arXiv 2411.19108): hold the hidden residual while the accumulated, rescaled change of the modulated input
stays below a threshold.

    A += poly(mean|m_i - m_{i-1}| / mean|m_{i-1}|);   A < threshold reuses, else computes and A = 0.

Reading: m is the first block's modulated input of the latent frames being denoised; the polynomial is fitted to this
model (``calibration``), and a fit below zero counts as no change. One decision per guided call, so that both CFG
branches agree; the call says which step it is, nothing counts forwards. m is remembered at every call, skipped or not.
The first solver step of each chunk and the last call of a segment are computed.
"""

from __future__ import annotations

from torch import Tensor

from accel.call import Call, Decision
from accel.engine import Denoiser
from accel.signals import SignalMeter
from accel.timeline import Timeline

from .base import MakeRun, Peer
from .calibration import Calibration, calibration_of
from .residual import ResidualRun


class TeaCacheRun(ResidualRun):
    """``threshold`` on the accumulated change; ``calibration`` None leaves the change as it is measured."""

    title = "TeaCache"

    def __init__(
        self, denoiser: Denoiser, timeline: Timeline, threshold: float, calibration: Calibration | None = None
    ) -> None:
        super().__init__(denoiser, timeline)
        self.threshold, self.calibration = threshold, calibration

    def reset(self, frames: int) -> None:
        super().reset(frames)
        self.meter, self.sum = SignalMeter(["current"], frames), 0.0

    def decide(self, call: Call, x: Tensor) -> Decision:
        feature = self.feature("modulated", call, x)
        change = float(self.meter.measure({"modulated": feature}, call))
        increment = change if self.calibration is None else self.calibration.rescaled(change)
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
        return super().state_bytes + (self.meter.nbytes if hasattr(self, "meter") else 0)


def make(threshold: float) -> MakeRun:
    """TeaCache with this threshold, calibrated for the denoiser's model."""
    return lambda denoiser, timeline: TeaCacheRun(denoiser, timeline, threshold, calibration_of(denoiser))


PEER = Peer(
    name="TeaCache",
    source="arXiv 2411.19108",
    settings=(0.05, 0.1, 0.2, 0.4, 0.8),
    make=make,
    note="modulated input of the active latent frames, polynomial fitted to this model, one decision per guided call",
)
