"""MagCache (arXiv 2506.09045): hold the hidden residual while its calibrated magnitude is expected to have changed
little.

    ratio *= gamma_i;   error += |1 - ratio|;   error < E and skips <= K reuses, else computes and both start again.

Reading for chunks at different steps: gamma is a table over the local step of a chunk (the whole table of the paper is
one trajectory, and a chunk is one); each active latent frame keeps its own ratio and error, and the call is skipped
while all of them are below E. Calls are computed while the oldest active chunk is in the first fifth of its steps
(retention 0.2), when a chunk enters and at the end of a segment.
"""

from __future__ import annotations

from torch import Tensor

from accel.call import Call, Decision
from accel.engine import Denoiser
from accel.timeline import Timeline

from .base import MakeRun, Peer, active_steps
from .calibration import Calibration, calibration_of
from .residual import ResidualRun

MAX_SKIP = 4
RETENTION = 0.2


class MagCacheRun(ResidualRun):
    """``threshold`` is E, ``max_skip`` K (None for no cap), ``retention`` the share of the steps always computed."""

    title = "MagCache"

    def __init__(
        self,
        denoiser: Denoiser,
        timeline: Timeline,
        threshold: float,
        calibration: Calibration,
        max_skip: int | None = MAX_SKIP,
        retention: float = RETENTION,
    ) -> None:
        super().__init__(denoiser, timeline)
        self.threshold, self.calibration = threshold, calibration
        self.max_skip, self.retention = max_skip, retention

    def reset(self, frames: int) -> None:
        super().reset(frames)
        self._restart()

    def _restart(self) -> None:
        self.ratio: dict[int, float] = {}
        self.error: dict[int, float] = {}
        self.skips = 0

    def decide(self, call: Call, x: Tensor) -> Decision:
        self.told = {"threshold": self.threshold}
        reason = self.forced(call)
        if reason is None and active_steps(call)[-1] <= self.retention * call.total_steps:
            reason = "warm-up"
        if reason is None:
            worst = self._expect(call)
            self.told["discrepancy"] = worst
            capped = self.max_skip is not None and self.skips >= self.max_skip
            if worst < self.threshold and not capped:
                self.skips += 1
                return Decision.CACHE
            reason = "cap" if worst < self.threshold else None
        self._restart()
        return Decision.RECOMPUTE if reason is None else self.compute_by_force(reason)

    def _expect(self, call: Call) -> float:
        """Largest expected error of an active latent frame, were this call skipped too."""
        worst = 0.0
        for frame, (step, active) in enumerate(zip(call.steps, call.active, strict=True), call.frames[0]):
            if active:
                gamma = self.calibration.magnitude(step, call.total_steps)
                self.ratio[frame] = self.ratio.get(frame, 1.0) * gamma
                self.error[frame] = self.error.get(frame, 0.0) + abs(1.0 - self.ratio[frame])
                worst = max(worst, self.error[frame])
        return worst


def make(threshold: float) -> MakeRun:
    """MagCache with this E, calibrated for the denoiser's model."""
    return lambda denoiser, timeline: MagCacheRun(denoiser, timeline, threshold, calibration_of(denoiser))


PEER = Peer(
    name="MagCache",
    source="arXiv 2506.09045",
    settings=(0.03, 0.06, 0.12, 0.24, 0.48),
    make=make,
    note="gamma per local step of a chunk, the worst active latent frame decides, K = 4, retention 0.2 (oldest chunk)",
)
