"""SCOPE (arXiv 2604.02979) with its other predictors: ``momentum`` and ``auto``.

The scheduler is SCOPE's (eq. 3 and 5): the signal is the time embedding's projection over the active latent frames, the
knob is tau_predict, and tau_cache stands to it as the paper's 0.18 to 0.42; decay 0.75, at most 5 skips in a row.

Readings, since only the Taylor predictor has its formula at hand. ``momentum``: the newest velocity plus an exponential
average of the slopes between computed calls, v0 + m D with m = (m + (v0 - v1) / (s0 - s1)) / 2, D the distance in
noise level. ``auto``: order 2 (eq. 7) where the target is at most half as far as the last two computed noise levels
are apart, else order 1, with the guards of ours.
"""

from __future__ import annotations

from torch import Tensor

from accel.call import Call, Decision
from accel.engine import Denoiser
from accel.policy import TriModalConfig, TriModalPolicy
from accel.predict import predict
from accel.signals import SignalMeter
from accel.timeline import Timeline

from .base import MakeRun, Peer, PeerRun
from .differences import Differences

CACHE_SHARE = 0.18 / 0.42
SMOOTHING = 0.5


class AutoRun(PeerRun):
    """SCOPE's scheduler with the order chosen by how far ahead a call is."""

    title = "SCOPE auto"
    depth = 3
    meter: SignalMeter | None = None

    def __init__(self, denoiser: Denoiser, timeline: Timeline, tau_predict: float, max_skip: int | None = 5) -> None:
        super().__init__(denoiser, timeline)
        self.policy = TriModalPolicy(TriModalConfig(CACHE_SHARE * tau_predict, tau_predict, max_skip=max_skip))

    def reset(self, frames: int) -> None:
        self.policy.reset()
        self.meter = SignalMeter(["timestep"], frames)

    def decide(self, call: Call, x: Tensor) -> Decision:
        increment = float(self.meter.measure({"timestep": self.feature("timestep", call, x)}, call))
        self.told["increment"] = increment
        if reason := self.forced(call):
            self.policy.force()
            return self.compute_by_force(reason)
        decision = self.policy.decide(increment, True, self.can_predict(call))
        self.told |= {"discrepancy": self.policy.accumulated, "threshold": self.policy.threshold}
        self.told["forced"] = None if self.policy.reason == "threshold" else self.policy.reason
        return decision

    def can_predict(self, call: Call) -> bool:
        """Whether some active latent frame has two computed velocities."""
        return max(self.history.count(call.active_frames)) > 1

    def answer(self, call: Call, x: Tensor, decision: Decision) -> Tensor:
        if decision is not Decision.PREDICT:
            return super().answer(call, x, decision)
        first, last = (frame - call.frames[0] for frame in call.active_frames)
        self.told["order"] = "auto"
        return self.placed(call, x, predict(self.history, call.active_frames, call.sigmas[first:last], "auto"))

    @property
    def state_bytes(self) -> int:
        return super().state_bytes + (0 if self.meter is None else self.meter.nbytes)


class MomentumRun(AutoRun):
    """SCOPE's scheduler with a velocity that goes on along its averaged slope."""

    title = "SCOPE momentum"
    depth = 0
    slopes: Differences | None = None

    def reset(self, frames: int) -> None:
        super().reset(frames)
        self.slopes, self._computed = Differences(1, axis=2, smoothing=SMOOTHING), 0

    def can_predict(self, call: Call) -> bool:
        return self._computed > 1

    def learn(self, call: Call, x: Tensor, velocity: Tensor) -> None:
        self.slopes.push(velocity, call.sigmas, call.active)
        self._computed += 1

    def held(self, call: Call, x: Tensor) -> Tensor:
        return self.slopes.newest

    def answer(self, call: Call, x: Tensor, decision: Decision) -> Tensor:
        if decision is not Decision.PREDICT:
            return PeerRun.answer(self, call, x, decision)
        self.told["order"] = 1
        return self.slopes.at(call.sigmas)

    @property
    def state_bytes(self) -> int:
        return super().state_bytes + (0 if self.slopes is None else self.slopes.nbytes)


def make_momentum(tau_predict: float) -> MakeRun:
    """SCOPE with momentum and this upper threshold."""
    return lambda denoiser, timeline: MomentumRun(denoiser, timeline, tau_predict)


def make_auto(tau_predict: float) -> MakeRun:
    """SCOPE with the order chosen by distance and this upper threshold."""
    return lambda denoiser, timeline: AutoRun(denoiser, timeline, tau_predict)


SETTINGS = (0.03, 0.06, 0.09, 0.12, 0.15, 0.42)
MOMENTUM = Peer(
    name="SCOPE momentum",
    source="arXiv 2604.02979",
    settings=SETTINGS,
    make=make_momentum,
    note="time embedding, tau_cache 3/7 of tau_predict; slopes averaged by one half",
)
AUTO = Peer(
    name="SCOPE auto",
    source="arXiv 2604.02979",
    settings=SETTINGS,
    make=make_auto,
    note="time embedding, tau_cache 3/7 of tau_predict; order 2 up to half the last distance, else 1",
)
