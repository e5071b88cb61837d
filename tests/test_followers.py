"""Further forwards of one guided call are skipped with the one that leads, and cost what they cost."""

from __future__ import annotations

import pytest
import torch

from accel.call import Call, Decision, Kind
from accel.engine import Acceleration, Run, SchedulerConfig
from accel.policy import TriModalConfig
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from tests.fakes import SmoothDenoiser

FRAMES, STEPS = 4, 12
NOISE = torch.randn(1, 2, FRAMES, 4, 4, generator=torch.Generator().manual_seed(0))
LEVELS = flow_sigmas(STEPS, 3.0).tolist()


def acceleration(cache: float, predict: float) -> Acceleration:
    return Acceleration(scheduler=SchedulerConfig(TriModalConfig(cache, predict), "log-snr", reach=None))


def call(step: int) -> Call:
    return Call(
        Kind.DENOISE, 0, step, (0, FRAMES), (LEVELS[step],) * FRAMES, (step + 1,) * FRAMES, (True,) * FRAMES,
        total_steps=STEPS,
    )  # fmt: skip


class Both:
    """A leading run and one that follows it from ``start`` on, over the same Euler trajectory."""

    def __init__(self, given: Acceleration, start: int = 0) -> None:
        self.timeline = Timeline()
        self.lead, self.follower = (Run(given, SmoothDenoiser(), self.timeline) for _ in range(2))
        self.answers = []
        for run in (self.lead, self.follower):
            run.begin_segment(0, FRAMES, 0)
        x = NOISE
        for step in range(STEPS):
            velocity, true = self.lead.step(call(step), x)
            if step >= start:
                decision = Decision(self.timeline.records[-1].decision)
                followed, computed = self.follower.follow(call(step), x, decision)
                self.answers.append((decision, true, computed, torch.equal(velocity, followed)))
            x = x + (LEVELS[step + 1] - LEVELS[step]) * velocity


@pytest.mark.parametrize(("cache", "predict"), [(0.9, 0.9), (0.0, 1.2), (0.4, 1.5)])
def test_the_same_forward_asked_twice_gives_the_same_answer(cache: float, predict: float) -> None:
    both = Both(acceleration(cache, predict))
    assert all(true == computed and same for _, true, computed, same in both.answers)
    assert {decision for decision, *_ in both.answers} > {Decision.RECOMPUTE}
    assert len(both.follower.denoiser.calls) == len(both.lead.denoiser.calls) < STEPS


def test_the_follower_has_no_record_and_adds_to_that_of_the_call() -> None:
    both = Both(acceleration(0.9, 0.9))
    assert len(both.timeline.records) == STEPS
    for record in both.timeline.records:
        assert record.flops == (200 * FRAMES if record.decision == "recompute" else 0)
    assert both.timeline.totals()["flops_full"] == STEPS * 200 * FRAMES


def test_a_follower_that_joins_late_computes_until_it_has_something_to_reuse() -> None:
    both = Both(acceleration(0.0, 3.0), start=3)
    decision, _, computed, _ = both.answers[0]
    assert decision is Decision.PREDICT and computed
    later = [computed for decision, _, computed, _ in both.answers[2:] if decision is Decision.PREDICT]
    assert later and not all(later)


def test_a_follower_of_a_computed_call_is_computed() -> None:
    both = Both(acceleration(0.0, 0.0))
    assert both.answers == [(Decision.RECOMPUTE, True, True, True)] * STEPS


def test_a_forward_that_is_not_finite_is_never_reused() -> None:
    run = Run(acceleration(0.9, 0.9), SmoothDenoiser(break_at=0), Timeline())
    run.begin_segment(0, FRAMES, 0)
    run.timeline.record(call(0), Decision.RECOMPUTE)
    run.follow(call(0), NOISE, Decision.RECOMPUTE)
    velocity, true = run.follow(call(1), NOISE, Decision.CACHE)
    assert true and velocity.isfinite().all()
