from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from accel.call import Call, Decision, Kind
from accel.flops import attention_flops, linear_flops
from accel.sampling import SegmentPlan, causal_blocks
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from bench.peers import PEERS, REGIMES, calibration
from bench.peers.base import active_frames
from bench.peers.calibration import Calibration, calibrate, calibration_of
from bench.peers.delta_dit import DeltaRun
from bench.peers.differences import Differences
from bench.peers.magcache import MagCacheRun
from bench.peers.pab import BroadcastRun
from bench.peers.parts import close_forward, open_forward, run_blocks
from bench.peers.taylorseer import LayerTaylorSeerRun, TaylorSeerRun
from bench.peers.teacache import TeaCacheRun
from demo.denoiser import TinyDenoiser
from demo.generate import sample, sample_causal
from demo.model import TinyConfig, TinyWan
from tests.fakes import SmoothDenoiser

PLAN = SegmentPlan(frames=6, segment=4, overlap=2, block=2, ar_step=2, steps=10)
CONTEXT = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(2))
NOISE = torch.randn(1, 16, 6, 4, 4, generator=torch.Generator().manual_seed(0))
TOKENS, LAYERS, DIM, FFN = 6 * 4, 2, 48, 64
COUNTING = {"fixed interval", "TaylorSeer-lite", "TaylorSeer per layer", "PAB", "Delta-DiT"}
NOTHING = {name: 1 if name in COUNTING else 0.0 for name in PEERS} | {"fewer-steps": 1.0, "random schedule": 1.0}
BOLDEST = {name: 10**9 if name in COUNTING else 1e9 for name in PEERS} | {"random schedule": 0.0}
PARTIAL = ("PAB", "Delta-DiT")


def tiny(regime: str) -> TinyWan:
    torch.manual_seed(1)
    config = TinyConfig(DIM, FFN, LAYERS, 2, causal_ar=regime == "tiny-causal", block=2, kind=regime)
    return TinyWan(config).eval().requires_grad_(False)


MODELS = {regime: tiny(regime) for regime in REGIMES}


@pytest.fixture(autouse=True, scope="module")
def calibrated(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "FOLDER", tmp_path_factory.mktemp("calibration"))
        patch.setattr(calibration, "STEPS", 8)
        yield


def plan_of(regime: str) -> SegmentPlan:
    return replace(PLAN, ar_step=0) if regime == "tiny-next-clip" else PLAN


def make(regime, make_run=None, peer=None, setting=None):
    model = MODELS[regime]
    if regime == "tiny-causal":
        steps = PLAN.steps if peer is None or peer.steps is None else peer.steps(PLAN.steps, setting)
        return sample_causal(model, CONTEXT, NOISE[:, :, :4], steps=steps, guidance=2.0, make_run=make_run)
    plan = plan_of(regime) if peer is None else peer.plan(plan_of(regime), setting)
    return sample(model, CONTEXT, NOISE, plan=plan, make_run=make_run)


def run_of(peer, regime, setting):
    return make(regime, peer.make(setting), peer, setting)


FULL = {regime: make(regime) for regime in REGIMES}
CALLS = {regime: FULL[regime].timeline.totals()["calls"]["recompute"] for regime in REGIMES}
CASES = [(name, regime) for name, peer in PEERS.items() for regime in peer.regimes]


@pytest.mark.parametrize(("name", "regime"), CASES)
def test_every_peer_accounts_for_every_call(name, regime):
    peer = PEERS[name]
    result = run_of(peer, regime, peer.settings[-1])
    totals = result.timeline.totals()
    calls = totals["calls"]
    if peer.steps is None:
        assert calls["recompute"] + calls["predict"] + calls["cache"] == CALLS[regime]
        assert totals["flops_full"] == FULL[regime].timeline.totals()["flops"]
    assert calls["commit"] == FULL[regime].timeline.totals()["calls"]["commit"]
    assert totals["flops"] < FULL[regime].timeline.totals()["flops"]
    assert result.latents.shape == FULL[regime].latents.shape and bool(result.latents.isfinite().all())


@pytest.mark.parametrize(("name", "regime"), CASES)
def test_the_setting_that_skips_nothing_is_the_plain_loop_bit_for_bit(name, regime):
    result = run_of(PEERS[name], regime, NOTHING[name])
    assert torch.equal(result.latents, FULL[regime].latents)
    assert result.timeline.totals()["calls"] == FULL[regime].timeline.totals()["calls"]
    costs = [sum(record.flops for record in each.timeline.records) for each in (result, FULL[regime])]
    assert costs[0] == costs[1] or name.startswith(("SCOPE", "TeaCache")), "a signal is all that may cost more"


@pytest.mark.parametrize(("name", "regime"), [case for case in CASES if case[0] != "fewer-steps"])
def test_the_boldest_setting_computes_forced_calls_only(name, regime):
    result = run_of(PEERS[name], regime, BOLDEST[name])
    for record in result.timeline.records:
        if record.decision == "recompute" and name not in PARTIAL:
            assert record.forced is not None
    if name in PARTIAL:
        part = [record.flops for record in result.timeline.records if record.forced is None]
        assert part and max(part) <= max(record.flops for record in result.timeline.records)
    elif name != "MagCache":
        assert result.timeline.totals()["calls"]["recompute"] < CALLS[regime]


def test_settings_go_from_mild_to_bold():
    for peer in PEERS.values():
        assert len(peer.settings) > 2 and peer.source and peer.note
        rising = peer.name != "random schedule"
        assert list(peer.settings) == sorted(peer.settings, reverse=not rising)


def test_fresh_noise_is_refused_with_the_remedy():
    denoiser = SmoothDenoiser()
    run = PEERS["fixed interval"].make(2)(denoiser, Timeline())
    with pytest.raises(ValueError, match="sample with Euler"):
        list(causal_blocks(run, NOISE[:, :3], 2, flow_sigmas(4), renoise_seed=3))


def test_state_of_a_segment_is_forgotten_at_the_next():
    run = PEERS["EasyCache"].make(1e9)(SmoothDenoiser(), Timeline())
    list(causal_blocks(run, NOISE[:, :3, :4].double(), 2, flow_sigmas(12)))
    forced = [record.forced for record in run.timeline.records if record.decision == "recompute"]
    assert forced.count("new frames") == 2 and forced.count("warm-up") == 2 and forced.count("last") == 2


def test_a_velocity_that_is_not_finite_is_never_taken_for_small_change():
    run = PEERS["EasyCache"].make(1e9)(SmoothDenoiser(break_at=1), Timeline())
    list(causal_blocks(run, NOISE[:, :3, :2].double(), 2, flow_sigmas(12)))
    decisions = [record.decision for record in run.timeline.records]
    assert decisions.count("recompute") == 12


def test_the_random_schedule_computes_its_share_and_repeats():
    for share in (0.25, 0.5):
        decisions = []
        for _ in range(2):
            run = PEERS["random schedule"].make(share)(SmoothDenoiser(), Timeline())
            list(causal_blocks(run, NOISE[:, :3, :2].double(), 2, flow_sigmas(60)))
            decisions.append([record.decision for record in run.timeline.records if record.decision != "commit"])
        assert decisions[0] == decisions[1]
        assert abs(decisions[0].count("recompute") - 60 * share) <= 1


def test_differences_follow_a_polynomial_by_the_formula():
    def value(step):
        return torch.tensor([2.0, -1.0]).reshape(1, 1, 2, 1, 1).double() * (3 * step**2 - step + 4)

    features = Differences(2, axis=2)
    for step in (1, 4, 7):
        features.push(value(step), [step, step], [True, True])
    f0, f1 = value(7), (value(7) - value(4)) / 3
    f2 = (f1 - (value(4) - value(1)) / 3) / 3
    for k in (1, 2, 5):
        expected = f0 + f1 * k + f2 * k**2 / 2
        assert torch.allclose(features.at([7 + k, 7 + k]), expected, rtol=1e-12)
    assert features.nbytes == 3 * f0.nbytes


def test_differences_of_order_one_are_exact_on_a_line_and_per_frame():
    features = Differences(1, axis=0)
    features.push(torch.tensor([1.0, 50.0]).double(), [1, 0], [True, False])
    features.push(torch.tensor([5.0, 7.0]).double(), [3, 1], [True, True])
    assert features.at([6, 2]).tolist() == [11.0, 7.0], "a frame that has just started has no difference yet"


def test_smoothed_slopes_are_the_average_of_this_one_and_the_last():
    features = Differences(1, axis=0, smoothing=0.5)
    for level, value in ((1.0, 0.0), (0.8, 1.0), (0.7, 2.0)):
        features.push(torch.tensor([value]).double(), [level], [True])
    slope = (1.0 / -0.1 + 1.0 / -0.2) / 2
    assert float(features.at([0.65])) == pytest.approx(2.0 + slope * -0.05)


class LineDenoiser(SmoothDenoiser):
    """A velocity that is a line in the local solver step."""

    def velocity(self, call, x):
        steps = torch.tensor(call.steps, dtype=x.dtype)[None, None, :, None, None]
        return (2.0 * steps + 1.0).expand(x.shape)


def test_taylorseer_lite_holds_then_forecasts_a_line_between_its_intervals():
    run = TaylorSeerRun(LineDenoiser(), Timeline(), 5)
    run.begin_segment(0, 6, 0)
    answers = [float(run.step(call_at(step), NOISE.double())[0].mean()) for step in range(1, 21)]
    computed = [step for step, record in enumerate(run.timeline.records, 1) if record.decision == "recompute"]
    assert computed == [1, 6, 11, 16, 20]
    assert answers[:5] == [3.0] * 5
    assert answers[5:] == pytest.approx([2.0 * step + 1.0 for step in range(6, 21)])


def denoiser_of(regime: str = "tiny-df") -> TinyDenoiser:
    return TinyDenoiser(MODELS[regime], CONTEXT, 2.0, rollout=6).sized(NOISE)


def call_at(step: int, iteration: int | None = None, sigma: float = 0.7) -> Call:
    iteration = step - 1 if iteration is None else iteration
    return Call(Kind.DENOISE, 0, iteration, (0, 6), (sigma,) * 6, (step,) * 6, (True,) * 6, total_steps=20)


def test_the_parts_of_a_forward_are_the_forward():
    denoiser, call = denoiser_of(), call_at(3)
    opened = open_forward(denoiser, call, NOISE)
    plain = run_blocks(opened, opened.tokens, range(LAYERS))
    provided = run_blocks(opened, opened.tokens, range(LAYERS), lambda layer, module, run: run())
    assert torch.equal(plain, provided)
    assert torch.equal(close_forward(opened, plain), denoiser.velocity(call, NOISE))


def by_hand(self_attention: bool, cross_attention: bool) -> int:
    square = 2 * DIM * DIM
    total = linear_flops(TOKENS, 16 * 4, DIM) + linear_flops(TOKENS, DIM, 16 * 4)
    total += linear_flops(6, 256, DIM) + linear_flops(6, DIM, DIM) + linear_flops(6, DIM, 6 * DIM)
    total += LAYERS * 2 * linear_flops(TOKENS, DIM, FFN)
    if self_attention:
        total += LAYERS * (4 * TOKENS * square + attention_flops(TOKENS, TOKENS, DIM))
    if cross_attention:
        total += LAYERS * (2 * TOKENS * square + attention_flops(TOKENS, 64, DIM) + 2 * 64 * square)
        total += linear_flops(64, 64, DIM) + linear_flops(64, DIM, DIM)
    return 2 * total


def test_pab_counts_what_it_computes():
    run = BroadcastRun(denoiser_of(), Timeline(), {"self": 2, "cross": 6})
    run.begin_segment(0, 6, 0)
    for step in range(1, 10):
        run.step(call_at(step), NOISE)
    flops = [record.flops for record in run.timeline.records]
    full, cross_only, neither = by_hand(True, True), by_hand(True, False), by_hand(False, False)
    assert full == run.denoiser.flops(call_at(1), 6)
    assert flops == [full, neither, cross_only, neither, cross_only, neither, full, neither, cross_only]
    assert {record.decision for record in run.timeline.records} == {"recompute"}
    assert run.state_bytes == 2 * LAYERS * 2 * TOKENS * DIM * 4


@pytest.mark.parametrize("sigma", [0.2, 0.97])
def test_pab_broadcasts_inside_its_band_only(sigma):
    run = BroadcastRun(denoiser_of(), Timeline(), {"self": 2, "cross": 6})
    run.begin_segment(0, 6, 0)
    for step in range(1, 5):
        run.step(call_at(step, sigma=sigma), NOISE)
    assert {record.flops for record in run.timeline.records} == {by_hand(True, True)}


def block_flops_on_meta() -> int:
    """Counted by torch on the meta device; on the CPU its counter takes fused attention for 0."""
    block = TinyWan(TinyConfig(DIM, FFN, 1, 2)).blocks[0].to("meta")
    tokens, e = torch.empty(2, TOKENS, DIM, device="meta"), torch.empty(2, 6, 6, DIM, device="meta")
    rotations = torch.empty(TOKENS, DIM // 4, 2, device="meta")
    with FlopCounterMode(display=False) as counter:
        block(tokens, e, rotations, torch.empty(2, 64, DIM, device="meta"))
    return counter.get_total_flops()


def test_delta_dit_counts_the_blocks_that_ran_and_changes_its_side():
    run = DeltaRun(denoiser_of(), Timeline(), 3)
    run.begin_segment(0, 6, 0)
    stages = []
    for step in range(1, 21):
        run.step(call_at(step), NOISE)
        stages.append(run._stage)
    full = run.denoiser.flops(call_at(1), 6)
    part = full - LAYERS // 2 * block_flops_on_meta()
    flops = [record.flops for record in run.timeline.records]
    assert flops == [full, part, part] * 3 + [full] + [full, part, part] * 3 + [full]
    assert stages == ["rear"] * 10 + ["front"] * 10
    assert run.state_bytes == 2 * TOKENS * DIM * 4


def test_delta_dit_repeats_a_call_exactly():
    run = DeltaRun(denoiser_of(), Timeline(), 9)
    run.begin_segment(0, 6, 0)
    first, _ = run.step(call_at(2), NOISE)
    again, _ = run.step(call_at(3), NOISE)
    assert torch.allclose(first, again, atol=1e-5)


def test_taylorseer_per_layer_holds_order_plus_one_of_every_module():
    run = LayerTaylorSeerRun(denoiser_of(), Timeline(), 2)
    run.begin_segment(0, 6, 0)
    for step in range(1, 5):
        run.step(call_at(step), NOISE)
    assert run.state_bytes == 2 * 3 * LAYERS * 2 * TOKENS * DIM * 4
    decisions = [record.decision for record in run.timeline.records]
    assert decisions == ["recompute", "predict"] * 2
    ends = by_hand(False, False) - 2 * LAYERS * 2 * linear_flops(TOKENS, DIM, FFN)
    assert [record.flops for record in run.timeline.records][1::2] == [ends] * 2


def test_holding_the_residual_costs_the_embeddings_and_the_head():
    run = TeaCacheRun(denoiser_of(), Timeline(), 1e9)
    run.begin_segment(0, 6, 0)
    for step in (1, 2):
        run.step(call_at(step), NOISE)
    signal = run.denoiser.feature_flops("modulated", call_at(1), 6)
    ends = by_hand(False, False) - 2 * LAYERS * 2 * linear_flops(TOKENS, DIM, FFN)
    assert [record.flops for record in run.timeline.records] == [by_hand(True, True) + signal, ends + signal]


def test_magcache_follows_its_formula():
    table = Calibration(tuple(1.0 if step < 4 else 0.9 for step in range(20)))
    run = MagCacheRun(denoiser_of(), Timeline(), 0.35, table, max_skip=5)
    run.begin_segment(0, 6, 0)
    decisions = [run.decide(call_at(step), NOISE) for step in (1,)]
    run.known = set(range(6))
    decisions += [run.decide(call_at(step), NOISE) for step in range(2, 13)]
    skip, compute = Decision.CACHE, Decision.RECOMPUTE
    assert decisions == [compute] * 4 + [skip, skip, compute] * 2 + [skip, skip]
    assert run.error[0] == pytest.approx(0.1 + (1 - 0.81))
    capped = MagCacheRun(denoiser_of(), Timeline(), 1e9, table, max_skip=2)
    capped.begin_segment(0, 6, 0)
    capped.known = set(range(6))
    assert [capped.decide(call_at(step), NOISE) for step in range(5, 9)] == [skip, skip, compute, skip]


def test_calibration_reads_the_residual_of_each_local_step():
    made = calibrate(MODELS["tiny-df"], 2.0, steps=6)
    assert len(made.magnitudes) == 6 and made.magnitudes[0] == 1.0
    assert all(0.3 < value < 3 for value in made.magnitudes)
    denoiser, ratios, before = denoiser_of(), [], None
    levels = flow_sigmas(6, 3.0).tolist()
    assert made.magnitude(1, 50) == 1.0 and made.magnitude(50, 50) == made.magnitudes[-1]
    x = NOISE
    for step in (1, 2):
        opened = open_forward(denoiser, call_at(step, sigma=levels[step - 1]), x)
        residual = run_blocks(opened, opened.tokens, range(LAYERS)) - opened.tokens
        if before is not None:
            ratios.append(float((residual.norm(dim=-1) / before.norm(dim=-1)).mean()))
        before = residual
    assert ratios[0] == pytest.approx(made.magnitudes[1], rel=0.2)


def test_a_calibration_is_kept_by_the_weights_and_made_anew_when_they_change():
    calibration._known.cache_clear()
    model = tiny("tiny-causal")
    denoiser = TinyDenoiser(model, CONTEXT, 2.0)
    first = calibration_of(denoiser)
    assert len(first.magnitudes) == 8
    files = set(calibration.FOLDER.glob("tiny-causal-*.json"))
    calibration._known.cache_clear()
    assert calibration_of(denoiser) == first and set(calibration.FOLDER.glob("tiny-causal-*.json")) == files
    model.head.head.bias.data += 1.0
    calibration_of(denoiser)
    assert len(set(calibration.FOLDER.glob("tiny-causal-*.json")) - files) == 1


def test_active_frames_are_of_the_segment():
    call = Call(Kind.DENOISE, 0, 0, (2, 5), (0.0, 0.5, 1.0), (21, 4, 0), (False, True, False), total_steps=20)
    assert active_frames(call) == [3]
