"""Frozen K/V: exact where attention is causal over chunks, counted, and renewed when the signal says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accel.call import Call, Decision, Kind
from accel.chunks import ChunkConfig
from accel.engine import Acceleration, Run, SchedulerConfig
from accel.flops import WanShape
from accel.kv.frozen import FrozenConfig, FrozenKV, FrozenWindow, frozen_bytes, hull, runs
from accel.policy import TriModalConfig
from accel.sampling import SegmentPlan, diffusion_forcing
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.denoiser import TinyDenoiser
from demo.model import TinyConfig, TinyWan
from tests.fakes import video

PLAN = SegmentPlan(frames=14, segment=8, overlap=2, block=2, ar_step=3, steps=8)
CONFIG = TinyConfig(dim=48, ffn_dim=64, num_layers=2, num_heads=2, freq_dim=32)
SKIPS = SchedulerConfig(TriModalConfig(0.0, 3.0, 1.0, 4), reach=None)
FROZEN = Acceleration(frozen_window=FrozenConfig())
SHARED = Acceleration(shared_prefix=FrozenConfig())


@pytest.fixture(scope="module")
def model() -> TinyWan:
    torch.manual_seed(3)
    return TinyWan(CONFIG).eval().requires_grad_(False)


def sample(model, acceleration, chunk=0, plan=PLAN, solver="euler"):
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, plan.frames, 4, 4, generator=generator)
    context = torch.randn(1, 64, 64, generator=generator)
    denoiser = TinyDenoiser(model, context, 2.0, chunk=chunk).sized(noise)
    run = Run(acceleration, denoiser, Timeline(row_unit="chunk", frames_per_row=plan.block))
    return video(diffusion_forcing(run, noise, plan, flow_sigmas(plan.steps, 3.0), solver)), run


def error(one, other) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("skips", [None, SKIPS], ids=["every call", "with skips"])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("kept", [FROZEN, SHARED], ids=["frozen window", "shared prefix"])
def test_kept_kv_are_exact_where_attention_is_causal_over_chunks(model, kept, solver, skips):
    plain, whole = sample(model, Acceleration(scheduler=skips), chunk=2, solver=solver)
    out, run = sample(model, replace(kept, scheduler=skips), chunk=2, solver=solver)
    assert error(out, plain) < 1e-5
    assert run.timeline.totals()["calls"] == whole.timeline.totals()["calls"]
    assert run.timeline.totals()["flops"] < whole.timeline.totals()["flops"]


def test_a_frame_kept_at_its_last_step_instead_of_clean_is_not_exact(model):
    plain, _ = sample(model, Acceleration(), chunk=2)
    out, _ = sample(model, Acceleration(frozen_window=FrozenConfig(commit=False)), chunk=2)
    assert 1e-4 < error(out, plain) < 0.1


def test_where_attention_sees_everything_it_is_close_and_refreshing_brings_it_closer(model):
    plain, _ = sample(model, Acceleration())
    errors, costs = [], []
    for refresh in (0.0, 1.0, 0.2, 1e-9):
        out, run = sample(model, Acceleration(frozen_window=FrozenConfig(refresh)))
        errors.append(error(out, plain))
        costs.append(run.timeline.totals()["flops"])
    assert costs == sorted(costs) and costs[0] < costs[-1] == run.timeline.flops_full
    assert errors[-1] < 1e-6 and errors[0] == max(errors) < 0.2


def test_only_frames_that_advance_are_forwarded_and_finished_ones_once_more(model):
    _, run = sample(model, FROZEN)
    first = [record for record in run.timeline.records if record.segment == 0]
    assert first[0].queries == ((0, 8),), "the first call keeps what waits, too"
    assert [record.queries for record in first[1:4]] == [((0, 2),), ((0, 2),), ((0, 4),)]
    finished = next(n for n, record in enumerate(first) if record.frames[0] == 2)
    assert first[finished].queries[0][0] == 0 and first[finished + 1].queries[0][0] == 2
    second = [record for record in run.timeline.records if record.segment == 1]
    assert second[0].queries == ((6, 14),) and all(record.queries[0][0] >= 8 for record in second[1:])


def test_a_shared_prefix_is_forwarded_once_a_segment(model):
    _, run = sample(model, SHARED)
    for segment, (start, end, prefix) in enumerate(PLAN.intervals()):
        asked = [record.queries for record in run.timeline.records if record.segment == segment]
        assert asked[0] == ((start, end),)
        assert set(asked[1:]) == {((start + prefix, end),)}


def test_flops_are_those_of_the_queries_over_the_keys_of_the_window(model):
    _, run = sample(model, FROZEN)
    shape = WanShape(48, 64, 2, 2, 64, in_channels=16, out_channels=16, text_dim=64, freq_dim=32)
    for record in run.timeline.records:
        width = sum(last - first for first, last in record.queries)
        keys = (record.window[1] - record.window[0]) * 4
        assert record.flops == shape.forward_flops(width, 4, keys, branches=2)


def test_the_memory_is_what_was_counted_beforehand(model):
    _, run = sample(model, FROZEN)
    assert run.denoiser.kept_bytes == frozen_bytes(layers=2, tokens=8 * 4, width=48, branches=2, element_bytes=4)
    assert run.timeline.totals()["kv_bytes"] == run.denoiser.kept_bytes and "kept K/V" in run.timeline.summary()
    assert run.state_bytes == 0
    store = FrozenKV(2, 8, 4)
    assert store.nbytes == 0


def test_a_replayed_list_of_skips_takes_the_same_queries(model):
    decisions = (Decision.RECOMPUTE, Decision.PREDICT) * PLAN.calls()
    plain, _ = sample(model, Acceleration(replay=decisions), chunk=2)
    out, _ = sample(model, replace(FROZEN, replay=decisions), chunk=2)
    assert error(out, plain) < 1e-5


def test_what_a_frame_was_kept_at_decides_whether_it_runs():
    window = FrozenWindow(0.0, "log-signal", 6, 2, everything=True)

    def call(sigmas, active):
        return Call(Kind.DENOISE, 0, 0, (0, 6), sigmas, (1,) * 6, active, total_steps=4)

    moving = (False, False, True, True, False, False)
    assert window.queries(call((0, 0, 0.9, 0.9, 1, 1), moving)) == [(0, 6)]
    assert window.queries(call((0, 0, 0.5, 0.5, 1, 1), moving)) == [(2, 4)]
    later = (False, False, False, False, True, True)
    assert window.queries(call((0, 0, 0, 0, 1, 1), later)) == [(2, 6)], "finished at this level for the first time"
    assert window.queries(call((0, 0, 0, 0, 0.5, 0.5), later)) == [(4, 6)]


def test_intervals_of_frames():
    assert runs([5, 1, 2, 2, 7]) == [(1, 3), (5, 6), (7, 8)] and runs([]) == []
    assert hull([5, 1, 2]) == [(1, 6)] and hull([]) == []


@pytest.mark.parametrize("options", [{"refresh": -1.0}, {"refresh": float("nan")}, {"signal": "latent"}])
def test_bad_settings_are_refused_in_a_sentence(options):
    with pytest.raises(ValueError, match=r"^Frozen K/V: .*use"):
        FrozenConfig(**options)


def test_without_room_the_window_stays_whole_and_the_timeline_says_why(model):
    class Full(TinyDenoiser):
        def keep(self, frames):
            return f"off: the K/V of {frames} latent frames find no room"

    noise = torch.randn(1, 16, PLAN.frames, 4, 4, generator=torch.Generator().manual_seed(5))
    context = torch.zeros(1, 64, 64)
    videos = []
    for acceleration in (Acceleration(), FROZEN, Acceleration(chunks=ChunkConfig(TriModalConfig(0.0, 0.0)))):
        run = Run(acceleration, Full(model, context, 2.0).sized(noise), Timeline())
        videos.append(video(diffusion_forcing(run, noise, PLAN, flow_sigmas(PLAN.steps, 3.0))))
        told = run.timeline.settings.get("frozen K/V")
        assert told == (None if acceleration == Acceleration() else "off: the K/V of 8 latent frames find no room")
        assert all(record.queries is None for record in run.timeline.records)
        assert run.timeline.totals()["flops"] == run.timeline.flops_full
    assert torch.equal(videos[0], videos[1]) and torch.equal(videos[0], videos[2])
