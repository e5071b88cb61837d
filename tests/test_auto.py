"""A quality target: the error stays within it, a higher one computes more, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel.auto import PIXEL_DB, QUALITIES, AutoConfig, AutoPolicy
from accel.call import Call, Decision, Kind
from accel.correct import CorrectionConfig
from accel.engine import Acceleration, HistoryGuidedConfig, Run, SchedulerConfig
from accel.history import VelocityHistory
from accel.presets import quality_target
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing
from accel.schedule import flow_sigmas
from bench.auto import HAND, at_ratio, table
from tests.fakes import SmoothDenoiser, make_run, video

STAIRCASE = SegmentPlan(frames=14, segment=8, overlap=2, block=2, ar_step=3, steps=40)
SYNCHRONOUS = SegmentPlan(frames=14, segment=8, overlap=2, block=2, ar_step=0, steps=40)
NOISE = torch.randn(1, 3, 14, 4, 4, generator=torch.Generator().manual_seed(0))


def sample(acceleration=None, plan=STAIRCASE, denoiser=None, solver="euler"):
    run = make_run(acceleration, denoiser)
    return video(diffusion_forcing(run, NOISE, plan, flow_sigmas(plan.steps, 3.0), solver)), run


def decibels(made, exact):
    return PIXEL_DB - 20.0 * math.log10(float((made - exact).pow(2).mean().sqrt()))


def computed(run):
    return run.timeline.totals()["calls"]["recompute"]


@pytest.mark.parametrize("plan", [STAIRCASE, SYNCHRONOUS])
def test_the_error_stays_within_the_target_and_a_higher_target_computes_more(plan):
    exact, full = sample(plan=plan)
    counts = []
    for quality in (30.0, 40.0, 50.0):
        made, run = sample(quality_target(quality), plan)
        assert quality <= decibels(made, exact) < math.inf
        counts.append(computed(run))
        assert f"quality target {quality:g} dB: predicted" in run.timeline.summary()
    assert counts == sorted(set(counts)) and counts[-1] < computed(full)


def test_names_stand_for_numbers():
    for name, quality in QUALITIES.items():
        assert AutoConfig(name).decibels == quality
    assert torch.equal(sample(quality_target("fast"))[0], sample(quality_target(QUALITIES["fast"]))[0])


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_an_infinite_target_is_bit_identical_to_the_plain_loop(solver):
    made, run = sample(quality_target(math.inf), solver=solver)
    assert torch.equal(made, sample(solver=solver)[0])
    assert "Nothing was skipped" in run.timeline.summary()


def test_calls_sum_up_and_records_carry_the_predicted_error_and_the_allowance():
    _, run = sample(quality_target(35.0))
    assert sum(run.timeline.totals()["calls"].values()) == 2 * STAIRCASE.calls()
    skipped = [record for record in run.timeline.records if record.decision == "predict"]
    assert skipped and all(0.0 <= record.discrepancy <= record.threshold for record in skipped)


def test_state_belongs_to_the_run():
    acceleration = quality_target(35.0)
    first, run = sample(acceleration)
    second, again = sample(acceleration)
    assert torch.equal(first, second)
    assert [record.decision for record in run.timeline.records] == [r.decision for r in again.timeline.records]
    assert run.state_bytes > NOISE[:, :, :8].nbytes


@pytest.mark.parametrize("break_at", [0, 3, 9])
def test_a_velocity_that_is_not_finite_is_never_reused(break_at):
    denoiser = SmoothDenoiser(break_at)
    _, run = sample(quality_target(30.0), denoiser=denoiser)
    records = run.timeline.records
    broken = [index for index, record in enumerate(records) if record.decision == "recompute"][break_at]
    assert {record.decision for record in records[broken + 1 :]} == {"recompute"}


def call_at(step, sigma):
    return Call(Kind.DENOISE, 0, step - 1, (0, 1), (sigma,), (step,), (True,), total_steps=10)


def ready_policy(levels=(0.9, 0.8)):
    policy, history = AutoPolicy(AutoConfig(20.0)), VelocityHistory(1)
    for step, sigma in enumerate(levels, 1):
        policy.look(call_at(step, sigma), history)
        policy.force()
        history.push((0, 1), (sigma,), torch.ones(1, 1, 1, 2, 2))
    policy.look(call_at(3, 0.7), history)
    return policy, history


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_that_is_not_finite_never_leads_to_a_skip(value):
    policy, history = ready_policy()
    assert policy.decide() is Decision.PREDICT
    policy.learn((0, 1), torch.full((1, 1, 1, 2, 2), 0.01), 1)
    policy.told([value, 0.0])
    policy.look(call_at(4, 0.6), history)
    assert policy.decide() is Decision.RECOMPUTE and policy.reason == "non-finite"
    assert ready_policy()[0].decide(math.nan) is Decision.RECOMPUTE


def test_what_a_skip_brought_in_is_known_at_the_next_computed_call():
    policy, history = ready_policy()
    policy.decide()
    policy.look(call_at(4, 0.6), history)
    policy.force()
    miss, spent = policy.learn((0, 1), torch.full((1, 1, 1, 2, 2), 0.04), 1).tolist()
    gains = [((0.8 - s) * (0.9 - s) / (1 - s) ** 2) ** 0.75 for s in (0.7, 0.6)]
    assert miss == pytest.approx(0.04)
    assert spent == pytest.approx(0.04 * gains[0] / gains[1] * 0.1 / 0.4, rel=1e-5)
    assert policy.predicted is None
    policy.told([miss, spent])
    assert policy.predicted == pytest.approx(PIXEL_DB - 20 * math.log10(spent))


def test_a_large_measured_error_lowers_what_is_skipped():
    for error, decision in ((1e-4, Decision.PREDICT), (10.0, Decision.RECOMPUTE)):
        policy, history = ready_policy()
        policy.learn((0, 1), torch.full((1, 1, 1, 2, 2), error), 1)
        policy.told([error, 0.0])
        policy.look(call_at(4, 0.6), history)
        assert policy.decide() is decision


def test_where_nothing_can_be_predicted_the_last_velocity_is_held():
    policy, _ = ready_policy((0.9,))
    assert policy.decide(can_predict=False) is Decision.CACHE


def test_fresh_noise_is_never_skipped_and_said_so():
    run = make_run(quality_target(20.0))
    list(causal_blocks(run, NOISE, 2, torch.tensor([1.0, 0.9, 0.8, 0.6, 0.0]), renoise_seed=5))
    assert computed(run) == 2 * 4 * 7
    assert "use fewer steps, or Euler" in run.timeline.summary()


@pytest.mark.parametrize(
    "parts",
    [
        {"suffix_window": True},
        {"history_guided": HistoryGuidedConfig(0.3), "correction": CorrectionConfig()},
        {"scheduler": SchedulerConfig(signal="latent", order=2, quality=35.0)},
    ],
)
def test_it_joins_with_every_other_part(parts):
    acceleration = Acceleration(**{"scheduler": quality_target(35.0).scheduler} | parts)
    made, run = sample(acceleration)
    exact = sample(Acceleration(suffix_window=acceleration.suffix_window))[0]
    assert computed(run) < 2 * STAIRCASE.calls() and decibels(made, exact) >= 35.0


class DeviceReads(TorchDispatchMode):
    """Counts scalars that are read from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_there_is_one_read_a_step_at_most(monkeypatch):
    reads, inside, measure, tolist = [], [], Run._measure, torch.Tensor.tolist

    def counted(tensor):
        if inside:
            reads[-1] += 1
        return tolist(tensor)

    def measured(run, call, x):
        reads.append(0)
        inside.append(True)
        with DeviceReads() as mode:
            answer = measure(run, call, x)
        inside.pop()
        reads[-1] += mode.count
        return answer

    def learned(policy, *arguments):
        with DeviceReads() as mode:
            answer = learn(policy, *arguments)
        assert mode.count == 0
        return answer

    learn = AutoPolicy.learn
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    monkeypatch.setattr(Run, "_measure", measured)
    monkeypatch.setattr(AutoPolicy, "learn", learned)
    _, run = sample(quality_target(35.0))
    assert max(reads) == 1 and sum(reads) < computed(run)


@pytest.mark.parametrize("quality", [0.0, -3.0, math.nan, "best"])
def test_a_target_that_cannot_be_is_refused_with_the_remedy(quality):
    with pytest.raises(ValueError, match="use a number of dB above 0"):
        quality_target(quality)


def test_the_chunk_with_least_left_decides_for_a_staircase():
    decisions = []
    for spent in (0.0, 1e6):
        policy, history = AutoPolicy(AutoConfig(20.0)), VelocityHistory(2)
        for step, sigmas in ((1, (0.6, 0.9)), (2, (0.5, 0.8)), (3, (0.4, 0.7))):
            call = Call(Kind.DENOISE, 0, step, (0, 2), sigmas, (step + 3, step), (True, True), total_steps=10)
            policy.look(call, history)
            if step == 3:
                break
            policy.force()
            history.push((0, 2), sigmas, torch.ones(1, 1, 2, 2, 2))
        policy.learn((0, 2), torch.zeros(1, 1, 2, 2, 2), 2)
        policy.told([0.01, 2.0, 0.0, spent])
        policy.look(call, history)
        decisions.append(policy.decide())
    assert decisions == [Decision.PREDICT, Decision.RECOMPUTE]


def test_the_measurement_compares_at_equal_flops():
    curve = [(2.0, 50.0), (4.0, 40.0), (8.0, 20.0)]
    assert at_ratio(8 / 3, curve) == pytest.approx(45.0)
    assert at_ratio(4.0, curve) == 40.0
    assert at_ratio(1.5, curve) is None and at_ratio(9.0, curve) is None
    rows = [
        {"model": "tiny-df", "method": name, "flop_ratio": 2.0 + index, "psnr": 50.0 - index, "note": None}
        for index, name in enumerate([*HAND, "target 40"])
    ]
    assert table(rows, ["tiny-df"], [40.0])[-1] == "| tiny-df | 40 | 8.00x | 44.00 (44.0 to 44.0) | 44.00 | - |"
