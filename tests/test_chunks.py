"""Decisions per chunk: FlowCache's own traces, calls that add up, and plans that need no look at the video."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.call import Call, Decision, Kind
from accel.chunks import ChunkConfig, ChunkPolicies, active_chunks
from accel.engine import Acceleration, HistoryGuidedConfig, Run, SchedulerConfig
from accel.kv.frozen import FrozenConfig
from accel.policy import TriModalConfig
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing
from accel.schedule import flow_sigmas, skyreels_sigmas, step_matrix, timesteps
from accel.signals import SignalMeter, relative_l1
from accel.timeline import Timeline
from demo.denoiser import TinyDenoiser
from tests.fakes import SmoothDenoiser, make_run, video
from tests.test_golden_model import model, text  # noqa: F401

PLAN = SegmentPlan(frames=14, segment=8, overlap=2, block=2, ar_step=3, steps=20)
NOISE = torch.randn(1, 3, 14, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TABLE = flow_sigmas(20, 3.0)


def chunked(cache: float = 0.0, predict: float = 3.0, max_skip: int | None = 4, **options) -> Acceleration:
    return Acceleration(chunks=ChunkConfig(TriModalConfig(cache, predict, 1.0, max_skip), **options))


def sample(acceleration: Acceleration | None = None, solver: str = "euler", plan: SegmentPlan = PLAN):
    run = make_run(acceleration)
    return video(diffusion_forcing(run, NOISE, plan, flow_sigmas(plan.steps, 3.0), solver)), run


class FlooredTime(TinyDenoiser):
    """The reference shows its model whole timesteps."""

    def _told(self, call, x):
        told = timesteps(torch.tensor([call.sigmas], dtype=torch.float64)).float() / 1000
        return told.expand(x.shape[0], -1)


@pytest.mark.parametrize("index", range(3))
def test_traces_equal_flowcache_on_skyreels(index, model, text, golden):  # noqa: F811
    case = golden("flowcache_skyreels_decisions")["runs"][index]
    size, tokens = case["group_size"], case["tokens_per_group"] // case["group_size"]
    frames, prefix = case["groups"] * size, case["prefix_frames"]
    threshold = max(case["thresh"], 0.0)
    chunks = ChunkConfig(
        TriModalConfig(threshold, threshold, max_skip=None), "timestep", tuple(case["coefficients"]), reach=None,
        warmup=case["ret_steps"],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, frames, 4, 6, generator=generator)
    denoiser = FlooredTime(model, text, guidance=2.0, chunk=size).sized(noise)
    run = Run(
        Acceleration(chunks=chunks, frozen_window=FrozenConfig(commit=False), suffix_window=True), denoiser,
        Timeline(row_unit="chunk", frames_per_row=size, branches=2),
    )  # fmt: skip
    plan = SegmentPlan(frames, frames, 0, size, case["ar_step"], case["steps"])
    start = noise[:, :, :prefix] if prefix else None
    video(diffusion_forcing(run, noise, plan, skyreels_sigmas(case["steps"], 8.0), "unipc", prefix=start))

    rows: dict[int, list] = {}
    for record in run.timeline.records:
        rows.setdefault(record.iteration, []).append(record)
    reference = case["log"][::2]
    assert reference == [entry | {"cond": True} for entry in case["log"][1::2]], "both branches decide alike"
    assert len(rows) == len(reference)
    for iteration, entry in enumerate(reference):
        state = ["off"] * case["groups"]
        for record in rows[iteration]:
            for first, last in record.queries or ():
                state[first // size : last // size] = ["calc"] * (last // size - first // size)
        for record in rows[iteration]:
            if record.decision == "cache":
                state[record.frames[0] // size] = "skip"
        assert state == entry["state"], iteration
        reached = [record for record in rows[iteration] if record.forced in (None, "off")]
        assert [record.increment for record in reached] == pytest.approx([pair[1] for pair in entry["dist"]], rel=2e-4)
        seen = [record.frames[1] * tokens for record in rows[iteration] if record.decision == "recompute"]
        unkept = case["compress_blocks"] == 0 and not (prefix and iteration == 0)
        assert not unkept or seen == [count for count in entry["kv_tokens"] if count]


def count(stored: set[int], frames: tuple[int, int]) -> list[int]:
    return [int(frames[0] in stored)]


@pytest.mark.parametrize("index", range(2))
def test_traces_equal_flowcache_on_magi(index, golden):
    case = golden("magi_decisions")["chunkwise"][index]
    chunks, steps, lag = case["chunks"], case["steps"], case["steps"] // case["window"]
    matrix = step_matrix(chunks, steps, lag, 1, 0, case["window"])
    config = ChunkConfig(
        TriModalConfig(case["thresh"], case["thresh"], max_skip=None), "latent", reach=None, warmup=case["warmup"],
        last="segment",
    )  # fmt: skip
    policies, meter, stored = ChunkPolicies(config, chunks, 1), SignalMeter(["latent"], chunks, None), set()
    for row, expected in enumerate(case["log"]):
        index, active = matrix.index[row].tolist(), matrix.active[row].tolist()
        first, last = matrix.active_intervals()[row]
        call = Call(
            Kind.DENOISE, 0, row, (first, last), tuple(1 - 0.01 * n for n in index[first:last]),
            tuple(index[first:last]), tuple(active[first:last]), total_steps=steps,
        )  # fmt: skip
        done = torch.tensor(index[first:last]) - 1
        j = torch.arange(12)
        place = torch.arange(first, last)[:, None]
        features = 1 + 0.5 * torch.sin(j + 0.35 * (place + 1) * done[:, None] ** 1.2)
        parts = active_chunks(call, 1)
        measured = meter.measure({"latent": features[None]}, call, parts).tolist()
        changes = {part[0]: change for part, change in zip(parts, measured, strict=True)}
        plan = policies.decide(call, changes, partial(count, stored), lambda frames: False)
        stored |= {chunk.frames[0] for chunk in plan}
        assert [[chunk.frames[0], int(chunk.decision is Decision.CACHE)] for chunk in plan] == [e[:2] for e in expected]
        reused = {e[0]: e[2] for e in expected if e[1]}
        told = {c.frames[0]: c.told["discrepancy"] for c in plan if c.decision is Decision.CACHE}
        assert told == pytest.approx(reused, rel=1e-5)


CASES = {
    "log-signal": chunked(),
    "timestep": chunked(0.02, 0.1, signal="timestep"),
    "latent": chunked(0.1, 0.3, signal="latent"),
    "hold": chunked(0.8, 0.8, signal="log-snr"),
    "refreshed": Acceleration(chunks=ChunkConfig(), frozen_window=FrozenConfig(1.0)),
    "refreshed by history": Acceleration(chunks=ChunkConfig(), frozen_window=FrozenConfig(0.1, "history")),
    "measured, refreshed by history": Acceleration(
        chunks=ChunkConfig(TriModalConfig(0.1, 0.3), "latent"), frozen_window=FrozenConfig(0.1, "history")
    ),
    "suffix": Acceleration(chunks=ChunkConfig(), suffix_window=True),
}


def chunk_calls(plan: SegmentPlan) -> int:
    return sum(int(matrix.active.sum()) // plan.block for matrix in plan.matrices())


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("name", CASES)
def test_every_chunk_of_every_call_is_accounted_for(name, solver):
    full, _ = sample(solver=solver)
    out, run = sample(CASES[name], solver)
    totals = run.timeline.totals()
    calls = totals["calls"]
    assert sum(calls.values()) == 2 * chunk_calls(PLAN)
    assert f"{2 * chunk_calls(PLAN)} chunk calls, " in run.timeline.summary()
    assert calls["recompute"] < 2 * chunk_calls(PLAN)
    forwarded = sum(100 * (call.queries[1] - call.queries[0]) for call in run.denoiser.denoised)
    assert forwarded <= totals["flops"] < forwarded + 60 * PLAN.calls()
    assert totals["flops_full"] == sum(100 * matrix.frames * matrix.rows for matrix in PLAN.matrices())
    assert float((out - full).norm() / full.norm()) < 0.3
    for record in run.timeline.records:
        assert record.forced != "new frames" or record.decision == "recompute"


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_off_computes_every_chunk_and_changes_nothing(solver):
    """The model of this test looks at the whole window however much of it is forwarded, so the outputs are equal."""
    plain, _ = sample(solver=solver)
    for off in (chunked(0.0, 0.0), chunked(0.0, 0.0, signal="timestep"), chunked(0.0, 0.0, signal="latent")):
        out, run = sample(off, solver)
        assert torch.equal(out, plain)
        assert run.timeline.totals()["calls"]["recompute"] == 2 * chunk_calls(PLAN)


def test_equal_local_steps_get_equal_decisions_where_only_noise_levels_count():
    chunks = ChunkConfig(TriModalConfig(0.02, 0.1, 1.0), signal="timestep")
    _, run = sample(Acceleration(chunks=chunks, frozen_window=FrozenConfig(refresh=0.0)))
    by_chunk: dict[tuple, list] = {}
    for record in run.timeline.records:
        by_chunk.setdefault((record.segment, record.frames), []).append(record.decision)
    assert len({tuple(decisions) for decisions in by_chunk.values()}) == 1


def test_the_chunk_pipeline_runs_a_sliding_window_of_chunks():
    """MAGI-1's schedule: one segment, a chunk every N / W rows, W chunks at work (golden ``magi_schedule``)."""
    plan = SegmentPlan(frames=14, segment=14, overlap=0, block=2, ar_step=5, steps=20)
    acceleration = Acceleration(
        chunks=ChunkConfig(TriModalConfig(0.02, 0.1, 1.0), signal="timestep", last="segment"),
        frozen_window=FrozenConfig(commit=False), suffix_window=True,
    )  # fmt: skip
    _, run = sample(acceleration, plan=plan)
    rows: dict[int, list] = {}
    for record in run.timeline.records:
        rows.setdefault(record.iteration, []).append(record)
    assert max(map(len, rows.values())) == 4 and len(run.timeline.records) == 7 * 20
    intervals = plan.matrices()[0].active_intervals()
    for iteration, (first, last) in enumerate(intervals):
        assert rows[iteration][0].frames[0] == first and rows[iteration][-1].frames[1] == last
        for record in rows[iteration]:
            assert all(first <= start and end <= last for start, end in record.queries or ())
    decisions = [
        [record.decision for record in run.timeline.records if record.frames == (start, start + 2)]
        for start in range(0, 14, 2)
    ]
    assert all(one[:-1] == decisions[0][:-1] for one in decisions) and decisions[-1][-1] == "recompute"
    assert "cache" in decisions[0] and "predict" in decisions[0]


def test_a_plan_made_before_the_first_call_equals_what_is_measured_on_the_way():
    denoiser = SmoothDenoiser()
    call = Call(Kind.DENOISE, 0, 0, (0, 1), (1.0,), (1,), (True,), total_steps=20)
    _, run = sample(chunked(0.0, 0.0, signal="timestep"))
    rows = []
    for sigma in TABLE[:-1].tolist():
        one = Call(Kind.DENOISE, 0, 0, (0, 1), (sigma,), call.steps, call.active, total_steps=20)
        rows.append(denoiser.feature("timestep", one, NOISE[:, :, :1]))
    measured = [float(relative_l1(now, before)) for before, now in pairwise(rows)]
    first = [record for record in run.timeline.records if record.segment == 0 and record.frames == (0, 2)]
    assert math.isnan(first[0].increment)
    assert [record.increment for record in first[1:]] == pytest.approx(measured)


def test_chunks_are_computed_when_no_velocity_of_theirs_is_known_or_finite():
    run = make_run(chunked(1e9, 1e9, max_skip=None), SmoothDenoiser(break_at=1))
    list(diffusion_forcing(run, NOISE, PLAN, TABLE))
    at = [record for record in run.timeline.records if record.iteration == 4 and record.segment == 0]
    assert {(record.decision, record.forced) for record in at} == {("recompute", "non-finite")}


@pytest.mark.parametrize(
    "parts", [{"history_guided": HistoryGuidedConfig()}, {"scheduler": SchedulerConfig()}, {"replay": ()}]
)
def test_two_deciders_are_refused(parts):
    with pytest.raises(ValueError, match=r"Chunk Cache: .*use one of the two"):
        Acceleration(chunks=ChunkConfig(), **parts)


@pytest.mark.parametrize(
    ("options", "names"),
    [({"signal": "input"}, "signal"), ({"order": 5}, "order"), ({"last": "all"}, "last"), ({"reach": 0.0}, "reach"),
     ({"warmup": 0}, "warm-up"), ({"coefficients": ()}, "coefficients"), ({"coefficients": (math.nan,)}, "coef")],
)  # fmt: skip
def test_bad_settings_are_refused_in_a_sentence(options, names):
    with pytest.raises(ValueError, match=rf"^Chunk Cache: .*{names}"):
        ChunkConfig(**options)


@given(coefficients=st.lists(st.floats(-3, 3), min_size=1, max_size=5), change=st.floats(0, 2))
def test_the_polynomial_is_horners(coefficients, change):
    power = len(coefficients) - 1
    expected = sum(c * change ** (power - n) for n, c in enumerate(coefficients))
    assert ChunkConfig(coefficients=tuple(coefficients)).rescaled(change) == pytest.approx(expected, abs=1e-9)


def test_with_fresh_noise_no_chunk_is_predicted_and_no_threshold_is_blamed():
    table = [1.0, 0.9, 0.8, 0.6, 0.0]
    run = make_run(chunked(0.0, 1e9))
    list(causal_blocks(run, NOISE.float(), 2, table, renoise_seed=5))
    assert run.timeline.totals()["calls"]["predict"] == run.timeline.totals()["calls"]["cache"] == 0
    assert "use fewer steps, or Euler" in run.timeline.summary() and "threshold" not in run.timeline.summary()
    held = make_run(chunked(1e9, 1e9))
    list(causal_blocks(held, NOISE.float(), 2, table, renoise_seed=5))
    assert held.timeline.totals()["calls"]["cache"] > 0 == held.timeline.totals()["calls"]["predict"]
