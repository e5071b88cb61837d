"""Decisions one step late: what they are made of, and that what they change is counted right."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.acceleration import Acceleration, HistoryGuidedConfig, SchedulerConfig
from accel.call import Decision
from accel.engine import Run
from accel.kv.frozen import FrozenConfig
from accel.late import LATE, UNMEASURED, LateDecisions
from accel.policy import ThresholdPolicy, TriModalConfig, TriModalPolicy, ask
from accel.run_state import continue_timeline
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing
from accel.schedule import flow_sigmas
from accel.signals import SignalMeter
from accel.timeline import Timeline
from tests.fakes import SmoothDenoiser, make_run, video

PLAN = SegmentPlan(frames=10, segment=6, overlap=2, block=2, ar_step=2, steps=12)
TABLE = flow_sigmas(12, 3.0)
NOISE = torch.randn(1, 2, 10, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
THRESHOLDS = TriModalConfig(0.02, 0.09, decay=0.6, max_skip=3)
FORCED = ("new frames", "warm-up", "last")


def scheduler(decision: str = LATE, **options) -> SchedulerConfig:
    return SchedulerConfig(THRESHOLDS, "current", reach=None, decision=decision, **options)


def sample(acceleration: Acceleration, denoiser: SmoothDenoiser | None = None):
    run = make_run(acceleration, denoiser)
    return video(diffusion_forcing(run, NOISE, PLAN, TABLE)), run


def measured_by(monkeypatch) -> list[float]:
    """What the meter measures from now on, in order."""
    seen, measure = [], SignalMeter.measure

    def watch(self, *given):
        values = measure(self, *given)
        seen.append(float(values[0]))
        return values

    monkeypatch.setattr(SignalMeter, "measure", watch)
    return seen


def exact_rule(total: float, skips: int, increment: float, many: bool) -> Decision:
    """SCOPE eq. 3 written out once more, as ``TriModalPolicy`` answers with two thresholds."""
    r = total + increment
    if not math.isfinite(r) or r >= THRESHOLDS.tau_predict or skips >= THRESHOLDS.max_skip:
        return Decision.RECOMPUTE
    if r < THRESHOLDS.tau_cache:
        return Decision.CACHE
    if many:
        return Decision.PREDICT
    return Decision.CACHE if r < 0.5 * (THRESHOLDS.tau_cache + THRESHOLDS.tau_predict) else Decision.RECOMPUTE


def test_the_count_of_differing_decisions_is_that_of_a_replay_by_hand(monkeypatch):
    seen = measured_by(monkeypatch)
    _, run = sample(Acceleration(scheduler=scheduler()))
    records = list(run.timeline.records)
    assert len(seen) == len(records)
    decisions = differ = skips = 0
    total, computed = 0.0, 0
    for index, (record, increment) in enumerate(zip(records, seen, strict=True)):
        if record.iteration == 0:
            total, skips, computed = 0.0, 0, 0
        if record.forced not in (*FORCED, UNMEASURED):
            decisions += 1
            differ += exact_rule(total, skips, increment, computed > 1).value != record.decision
            older, newest = seen[index - 2], seen[index - 1]
            guess = max(0.0, 2 * newest - older) if math.isfinite(older) else newest
            assert record.increment == pytest.approx(guess)
            assert record.discrepancy == pytest.approx(total + guess)
        if record.decision == "recompute":
            total, skips, computed = 0.0, 0, computed + 1
        else:
            total = (total + increment) * (THRESHOLDS.decay if record.decision == "predict" else 1.0)
            skips += 1
    assert run.timeline.late == {"decisions": decisions, "differ": differ}
    assert 0 < differ < decisions


def test_it_skips_about_as_much_and_stays_as_close():
    full, _ = sample(Acceleration())
    runs = {when: sample(Acceleration(scheduler=scheduler(when))) for when in ("exact", LATE)}
    calls = {when: run.timeline.totals()["calls"] for when, (_, run) in runs.items()}
    assert calls[LATE]["recompute"] <= 1.3 * calls["exact"]["recompute"]
    errors = {when: float((out - full).norm() / full.norm()) for when, (out, _) in runs.items()}
    assert errors[LATE] < 2 * errors["exact"]


@pytest.mark.parametrize("part", [{"scheduler": scheduler("exact")}, {"history_guided": HistoryGuidedConfig(0.3)}])
def test_exact_decisions_do_not_depend_on_when_the_signal_is_sent(part, monkeypatch):
    early, run = sample(Acceleration(**part))
    monkeypatch.setattr(Run, "ahead", lambda *_: None)
    late, other = sample(Acceleration(**part))
    assert torch.equal(early, late) and run.timeline.late is None
    told = [
        [repr((r.decision, r.increment, r.discrepancy, r.error, r.flops)) for r in x.timeline.records]
        for x in (run, other)
    ]
    assert told[0] == told[1]


def test_forced_calls_stay_forced():
    _, exact = sample(Acceleration(scheduler=scheduler("exact", warmup=2)))
    _, late = sample(Acceleration(scheduler=scheduler(warmup=2)))
    told = [[r.forced if r.forced in FORCED else None for r in run.timeline.records] for run in (exact, late)]
    assert told[0] == told[1] and set(FORCED) <= set(told[0])


def test_a_segment_begins_computed_where_nothing_is_measured_yet():
    run = make_run(Acceleration(scheduler=scheduler(), compute_last=False))
    one_step_in = SegmentPlan(frames=4, segment=4, block=4, steps=12)
    video(diffusion_forcing(run, NOISE[:, :, :4], one_step_in, TABLE))
    first = [(record.decision, record.forced) for record in list(run.timeline.records)[:3]]
    assert first[:2] == [("recompute", "new frames"), ("recompute", UNMEASURED)]


class Broken(SmoothDenoiser):
    """Gives a signal that is not finite at one look."""

    looks = 0

    def feature(self, kind, call, x):
        self.looks += 1
        return super().feature(kind, call, x) * (math.nan if self.looks == 9 else 1.0)


def test_a_signal_that_is_not_finite_is_no_skip_from_the_call_that_knows_of_it():
    config = SchedulerConfig(TriModalConfig(5.0, 9.0), "current", reach=None, decision=LATE)
    _, run = sample(Acceleration(scheduler=config), Broken())
    records = list(run.timeline.records)
    bad = [record.forced for record in records]
    assert records[8].decision == "cache", "decided before the host could know"
    assert bad[9] == "non-finite" and records[9].decision == "recompute"
    assert run.timeline.late["differ"] >= 1


def test_a_velocity_that_is_not_finite_is_never_built_upon():
    config = SchedulerConfig(TriModalConfig(5.0, 9.0), "current", reach=None, decision=LATE)
    _, run = sample(Acceleration(scheduler=config), SmoothDenoiser(break_at=1))
    known = next(index for index, record in enumerate(run.timeline.records) if record.forced == "non-finite")
    rest = [record for record in list(run.timeline.records)[known:] if record.segment == 0]
    assert {record.decision for record in rest} == {"recompute"}


INCREMENTS = st.lists(st.floats(0.0, 0.2), min_size=4, max_size=12)


@given(INCREMENTS, st.lists(st.booleans(), min_size=12, max_size=12), st.floats(0.05, 0.3))
def test_after_every_call_the_policies_stand_where_the_true_increments_put_them(increments, forced, delta):
    """Two policies together, some calls forced: state is that of policies told the truth and made to do the same."""
    policies = [(TriModalPolicy(THRESHOLDS), "a"), (ThresholdPolicy(delta), "b")]
    twins = [TriModalPolicy(THRESHOLDS), ThresholdPolicy(delta)]
    timeline = Timeline()
    late = LateDecisions(timeline)
    late.arrived({"a": math.nan, "b": math.nan})
    late.arrived({"a": increments[0], "b": increments[0]})
    taken = []
    for value, stop in zip(increments[1:], forced, strict=False):
        if stop:
            for policy in (*(p for p, _ in policies), *twins):
                policy.force()
        else:
            decision, *_ = late.ask(policies, {}, True, False)
            expected, *_ = ask([(twin, value) for twin in (_copy(t) for t in twins)], True, False)
            taken.append(decision is not expected)
            if decision is expected:
                ask([(twin, value) for twin in twins], True, False)
            else:
                for twin in twins:
                    twin.impose(decision, value)
        late.arrived({"a": value, "b": value})
        for (policy, _), twin in zip(policies, twins, strict=True):
            assert (policy._sum, policy._skips) == (twin._sum, twin._skips)
    assert timeline.late == {"decisions": len(taken), "differ": sum(taken)}


def _copy(policy):
    twin = object.__new__(type(policy))
    vars(twin).update(vars(policy))
    return twin


@pytest.mark.parametrize(
    "acceleration",
    [
        Acceleration(scheduler=SchedulerConfig(THRESHOLDS, "log-snr", decision=LATE)),
        Acceleration(scheduler=scheduler(), history_guided=HistoryGuidedConfig(0.3)),
        Acceleration(
            history_guided=HistoryGuidedConfig(0.3, decision=LATE), frozen_window=FrozenConfig(1.0, "history")
        ),
    ],
    ids=["known beforehand", "one of two is exact", "kept K/V need it"],
)
def test_where_something_is_needed_in_time_all_is_exact(acceleration):
    parts = {name: getattr(acceleration, name) for name in ("scheduler", "history_guided")}
    told = {name: replace(part, decision="exact") for name, part in parts.items() if part is not None}
    out, run = sample(acceleration)
    assert torch.equal(out, sample(replace(acceleration, **told))[0]) and run.timeline.late is None


def test_the_count_is_in_the_totals_and_the_report_and_goes_on_with_a_resumed_run():
    _, run = sample(Acceleration(scheduler=scheduler()))
    late = run.timeline.totals()["late"]
    assert f"{late['differ']} of {late['decisions']} decisions differ" in run.timeline.summary()
    again = Timeline.from_json(run.timeline.to_json())
    assert again.late == late
    resumed = make_run(Acceleration(scheduler=scheduler()))
    continue_timeline(resumed.timeline, again)
    video(causal_blocks(resumed, NOISE[:, :, :4], 2, TABLE))
    assert resumed.timeline.late["decisions"] > late["decisions"]
    assert "late" not in sample(Acceleration(scheduler=scheduler("exact")))[1].timeline.totals()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: SchedulerConfig(decision="soon"),
            "Tri-Modal Scheduler: decision is 'soon'; use exact or one step late.",
        ),
        (lambda: HistoryGuidedConfig(decision=""), "History-Guided Cache: decision is ''; use exact or one step late."),
        (
            lambda: SchedulerConfig(quality="high", decision=LATE),
            "a quality target needs the errors of the call before",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
