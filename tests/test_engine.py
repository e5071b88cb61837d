import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.call import Decision, Kind
from accel.correct import CorrectionConfig
from accel.engine import Acceleration, HistoryGuidedConfig, SchedulerConfig
from accel.policy import TriModalConfig
from accel.predict import Guards, extrapolate
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing
from accel.schedule import flow_sigmas
from tests.fakes import SmoothDenoiser, make_run, video

PLAN = SegmentPlan(frames=14, segment=8, overlap=2, block=2, ar_step=3, steps=20)
NOISE = torch.randn(1, 3, 14, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TABLE = flow_sigmas(20, 3.0)


def sample(acceleration=None, denoiser=None, plan=PLAN, solver="euler"):
    run = make_run(acceleration, denoiser)
    return video(diffusion_forcing(run, NOISE, plan, flow_sigmas(plan.steps, 3.0), solver)), run


def scheduler(cache, predict, **options):
    options = {"signal": "log-snr", "reach": None} | options
    return Acceleration(scheduler=SchedulerConfig(TriModalConfig(cache, predict), **options))


ALL = {
    "scheduler": scheduler(0.1, 0.8),
    "timestep": scheduler(0.01, 0.1, signal="timestep"),
    "latent newton": scheduler(0.02, 0.2, signal="latent", order="newton2"),
    "history guided": Acceleration(history_guided=HistoryGuidedConfig(0.2)),
    "corrected": Acceleration(history_guided=HistoryGuidedConfig(0.2), correction=CorrectionConfig()),
    "corrected by segment 1": Acceleration(
        history_guided=HistoryGuidedConfig(0.2), correction=CorrectionConfig("seg1_l1")
    ),
    "joined": Acceleration(
        HistoryGuidedConfig(0.3), SchedulerConfig(TriModalConfig(0.1, 0.8), "log-snr"), CorrectionConfig()
    ),
    "suffix": Acceleration(scheduler=SchedulerConfig(TriModalConfig(0.1, 0.8), "log-snr"), suffix_window=True),
}


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("name", ALL)
def test_every_skip_is_accounted_for_and_the_video_stays_close(name, solver):
    full, _ = sample(solver=solver)
    out, run = sample(ALL[name], solver=solver)
    totals = run.timeline.totals()
    calls = totals["calls"]
    assert calls["recompute"] + calls["predict"] + calls["cache"] == 2 * PLAN.calls()
    assert len(run.denoiser.denoised) * 2 == calls["recompute"] < 2 * PLAN.calls()
    assert totals["flops_full"] == sum(100 * matrix.frames * matrix.rows for matrix in PLAN.matrices())
    measured = sum(100 * (call.frames[1] - call.frames[0]) for call in run.denoiser.denoised)
    assert (
        measured
        <= totals["flops"]
        <= measured + sum(record.window[1] - record.window[0] for record in run.timeline.records)
    )
    assert float((out - full).norm() / full.norm()) < 0.2


@pytest.mark.parametrize(
    "acceleration",
    [
        Acceleration(),
        scheduler(0.0, 0.0),
        scheduler(0.0, 0.0, signal="timestep"),
        Acceleration(history_guided=HistoryGuidedConfig(0.0), correction=CorrectionConfig()),
    ],
)
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_off_is_bit_identical_to_the_plain_loop(acceleration, solver):
    assert torch.equal(sample(solver=solver)[0], sample(acceleration, solver=solver)[0])


def test_a_run_repeats_exactly():
    assert torch.equal(sample(ALL["joined"])[0], sample(ALL["joined"])[0])


def test_predicting_beats_holding_at_the_same_calls():
    full, _ = sample()
    plan = tuple(Decision.RECOMPUTE if row % 3 == 0 or row < 2 else Decision.PREDICT for row in range(PLAN.calls()))
    held = tuple(Decision.CACHE if decision is Decision.PREDICT else decision for decision in plan)
    predicted, first = sample(Acceleration(replay=plan))
    cached, second = sample(Acceleration(replay=held))
    assert first.timeline.totals()["calls"]["recompute"] == second.timeline.totals()["calls"]["recompute"]
    assert (predicted - full).norm() < 0.5 * (cached - full).norm()


def test_correction_changes_cached_calls_only_and_helps():
    full, _ = sample()
    plain, first = sample(Acceleration(history_guided=HistoryGuidedConfig(0.3)))
    better, second = sample(Acceleration(history_guided=HistoryGuidedConfig(0.3), correction=CorrectionConfig()))
    assert first.timeline.totals()["calls"]["cache"] > 0
    assert all((record.corrected is not None) == (record.decision == "cache") for record in second.timeline.records)
    assert (better - full).norm() < (plain - full).norm()


def test_new_blocks_the_warm_up_and_the_last_call_are_always_computed():
    _, run = sample(scheduler(0.0, 1e9, warmup=2))
    forced = [record.forced for record in run.timeline.records if record.decision == "recompute"]
    blocks = sum((matrix.frames - matrix.prefix) // 2 for matrix in PLAN.matrices())
    assert forced.count("new frames") == blocks
    assert forced.count("warm-up") == blocks
    assert forced.count("last") == len(PLAN.intervals())


def test_never_more_than_max_skip_calls_in_a_row():
    _, run = sample(Acceleration(scheduler=SchedulerConfig(TriModalConfig(0.0, 1e9, max_skip=3), reach=None)))
    streak = longest = 0
    for record in run.timeline.records:
        streak = streak + 1 if record.decision == "predict" else 0
        longest = max(longest, streak)
    assert longest == 3


def test_no_prediction_reaches_further_than_allowed():
    thresholds = TriModalConfig(0.0, 1e9, max_skip=None)
    _, free = sample(Acceleration(scheduler=SchedulerConfig(thresholds, reach=None)))
    _, run = sample(Acceleration(scheduler=SchedulerConfig(thresholds, reach=1.5)))
    forced = [record.forced for record in run.timeline.records]
    assert forced.count("reach") > 0
    calls = [tested.timeline.totals()["calls"]["recompute"] for tested in (free, run)]
    assert calls[0] < calls[1] < 2 * PLAN.calls()


class RememberingDenoiser(SmoothDenoiser):
    def __init__(self):
        super().__init__()
        self.answers = []

    def velocity(self, call, x):
        self.answers.append(super().velocity(call, x))
        return self.answers[-1]


@pytest.mark.parametrize("order", [None, 1, 2])
def test_a_computed_call_says_how_wrong_a_skip_would_have_been(order):
    plan = SegmentPlan(frames=8, segment=8, block=2, steps=12)
    free = Guards(None, None, None)
    if order is None:
        acceleration = Acceleration(history_guided=HistoryGuidedConfig(1e-9, signal="current"))
    else:
        acceleration = scheduler(0.0, 1e-9, order=order, guards=free)
    denoiser = RememberingDenoiser()
    noise = torch.randn(1, 3, 8, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    run = make_run(acceleration, denoiser)
    video(diffusion_forcing(run, noise, plan, flow_sigmas(12, 3.0)))
    records, true, levels = run.timeline.records, denoiser.answers, [record.sigma for record in run.timeline.records]
    assert {record.decision for record in records} == {"recompute"}
    assert records[0].error is None, "there was nothing to answer with"
    assert records[-1].error is None, "the last call has no later signal to ride on"
    for index in range(1, len(records) - 1):
        newest = [torch.tensor(levels[index - 1 :: -1][:3]), torch.stack(true[index - 1 :: -1][:3])]
        answer = extrapolate(newest[0], newest[1].float(), levels[index], order or 0)
        missed = float((answer - true[index]).norm() / true[index].norm())
        assert records[index].error == pytest.approx(missed, rel=1e-3, abs=1e-6)


def test_a_skipped_call_has_no_error_and_a_better_prediction_has_a_smaller_one():
    means = []
    for order in (1, 2):
        _, run = sample(scheduler(0.0, 0.4, order=order))
        assert all(record.error is None for record in run.timeline.records if record.decision != "recompute")
        errors = [record.error for record in run.timeline.records if record.error is not None]
        assert len(errors) > 10 and all(0 <= error < 1 for error in errors)
        means.append(sum(errors) / len(errors))
    assert means[1] < means[0]
    assert "predicted against true velocity" in run.timeline.summary()


def test_a_velocity_that_is_not_finite_is_never_reused():
    denoiser = SmoothDenoiser(break_at=9)
    _, run = sample(scheduler(0.0, 1e9), denoiser)
    records = run.timeline.records
    broken = [index for index, record in enumerate(records) if record.decision == "recompute"][9]
    assert {record.decision for record in records[broken + 1 :]} == {"recompute"}
    assert "non-finite" in {record.forced for record in records[broken + 1 :]}


def test_commits_are_computed_and_leave_step_state_alone():
    run = make_run(scheduler(0.0, 0.5))
    out = video(causal_blocks(run, NOISE, 2, TABLE))
    kinds = [call.kind for call in run.denoiser.calls]
    assert kinds.count(Kind.COMMIT) == 7 == run.timeline.totals()["calls"]["commit"] // 2
    assert out.shape == NOISE.shape and bool(out.isfinite().all())


def test_with_fresh_noise_only_x0_is_held_which_equals_dropping_the_step():
    run = make_run(
        Acceleration(replay=(Decision.RECOMPUTE, Decision.CACHE, Decision.RECOMPUTE, Decision.RECOMPUTE) * 7)
    )
    table = torch.tensor([1.0, 0.9, 0.8, 0.6, 0.0])
    held = video(causal_blocks(run, NOISE.float(), 2, table, renoise_seed=5))
    assert run.timeline.totals()["calls"]["cache"] == 14
    first = run.denoiser.denoised[:3]
    assert [call.sigmas[0] for call in first] == pytest.approx([1.0, 0.8, 0.6])
    assert bool(held.isfinite().all())


@pytest.mark.parametrize("threshold", [0.01, 1e9])
def test_with_fresh_noise_nothing_is_predicted_and_no_threshold_is_blamed(threshold):
    run = make_run(scheduler(0.0, threshold))
    list(causal_blocks(run, NOISE.float(), 2, torch.tensor([1.0, 0.9, 0.8, 0.6, 0.0]), renoise_seed=5))
    assert run.timeline.totals()["calls"]["predict"] == 0
    assert "use fewer steps, or Euler" in run.timeline.summary() and "threshold" not in run.timeline.summary()


def test_joined_policies_skip_only_where_both_agree():
    guided = Acceleration(history_guided=HistoryGuidedConfig(0.05))
    _, alone = sample(guided)
    _, joined = sample(
        Acceleration(HistoryGuidedConfig(0.05), SchedulerConfig(TriModalConfig(0.0, 1e9, max_skip=None), reach=None))
    )
    counts = [run.timeline.totals()["calls"]["recompute"] for run in (alone, joined)]
    assert counts[1] >= counts[0]
    assert joined.timeline.totals()["calls"]["cache"] == 0


@given(
    cache=st.floats(0, 0.5),
    gap=st.floats(0, 2),
    frames=st.sampled_from([8, 14]),
    ar_step=st.sampled_from([0, 1, 7, 30]),
)
def test_calls_always_sum_to_the_schedule(cache, gap, frames, ar_step):
    plan = SegmentPlan(frames, 8, 2, 2, ar_step, 6)
    run = make_run(scheduler(cache, cache + gap))
    list(diffusion_forcing(run, NOISE[:, :, :frames], plan, flow_sigmas(6, 3.0)))
    calls = run.timeline.totals()["calls"]
    assert sum(calls.values()) == 2 * plan.calls()
    assert all(math.isfinite(record.seconds) for record in run.timeline.records)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HistoryGuidedConfig(-0.1), "delta -0.1"),
        (lambda: HistoryGuidedConfig(signal="raw"), "use auto, mod, block0 or current"),
        (lambda: SchedulerConfig(TriModalConfig(0.1, 0.2), signal="noise"), "use one of log-snr"),
        (lambda: SchedulerConfig(TriModalConfig(0.1, 0.2), order=3), "use 1, 2, newton2 or auto"),
        (lambda: SchedulerConfig(TriModalConfig(0.1, 0.2), warmup=0), "at least 1 step"),
        (lambda: SchedulerConfig(TriModalConfig(0.1, 0.2), reach=0.0), "reach is 0.0"),
        (lambda: TriModalConfig(0.3, 0.2), "tau_cache 0.3 is above tau_predict 0.2"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_remedy(make, words):
    with pytest.raises(ValueError, match=words):
        make()


class CutDenoiser(SmoothDenoiser):
    """What is on the screen jumps early in the third segment, and only there."""

    def feature(self, kind, call, x):
        jump = 0.5 * sum(call.sigmas) * (call.segment == 2)
        return super().feature(kind, call, x) + jump * torch.randn(x.shape[2], 2, dtype=x.dtype)


def test_a_scene_cut_switches_the_correction_off_for_its_segment_only():
    torch.manual_seed(0)
    plan = SegmentPlan(frames=26, segment=8, overlap=2, block=2, ar_step=3, steps=20)
    noise = torch.randn(1, 3, 26, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = Acceleration(HistoryGuidedConfig(0.5, signal="current"), correction=CorrectionConfig("sigma_linear"))
    for denoiser, cut in ((SmoothDenoiser(), False), (CutDenoiser(), True)):
        run = make_run(config, denoiser)
        video(diffusion_forcing(run, noise, plan, flow_sigmas(20, 3.0)))
        held = {segment: [] for segment in range(4)}
        for record in run.timeline.records:
            if record.corrected is not None:
                held[record.segment].append(record.corrected)
        assert all(any(value != 1.0 for value in held[segment]) for segment in (1, 3))
        assert all(value == 1.0 for value in held[2]) == cut
        assert ("scene cut" in run.timeline.settings.get("correction", "")) == cut


def test_the_report_says_which_form_every_operation_had():
    _, run = sample(ALL["latent newton"])
    assert run.timeline.settings["kernels"] == "multistep, relative L1 torch (no CUDA device)"
    assert "kernels: multistep, relative L1 torch (no CUDA device)" in run.timeline.summary().splitlines()
