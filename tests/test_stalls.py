"""How often the host waits for the device over whole runs, counted on a device that is not there (``stand_in``).

The stand-in is a GPU that is always behind: what is sent to the host arrives only when it is waited for. ``read``,
``sized`` and ``upload`` are stalls; they must never happen between the first call of a run and its last.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from accel.acceleration import Acceleration, HistoryGuidedConfig, SchedulerConfig
from accel.attention.ann import AnnConfig
from accel.chunks import ChunkConfig
from accel.correct import CorrectionConfig
from accel.engine import Run
from accel.kv.budget import KVBudgetConfig
from accel.kv.frozen import FrozenConfig
from accel.policy import TriModalConfig
from accel.readback import Label, Readback, on_device
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing, next_clip
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.denoiser import TinyDenoiser
from demo.model import TinyConfig, TinyWan
from tests.stand_in import StandIn, There, device, put

STEPS = 5
TABLE = flow_sigmas(STEPS, 3.0)
STAIRCASE = SegmentPlan(frames=6, segment=4, overlap=2, block=2, ar_step=2, steps=STEPS)
SYNCHRONOUS = SegmentPlan(frames=6, segment=4, overlap=2, block=2, ar_step=0, steps=STEPS)
NOISE = torch.randn(1, 16, 6, 4, 4, generator=torch.Generator().manual_seed(0))
ROLLOUT = torch.randn(1, 16, 6, 4, 4, generator=torch.Generator().manual_seed(1))
LONG = torch.randn(1, 16, 12, 4, 4, generator=torch.Generator().manual_seed(1))
LOOPS = {
    "staircase": ("tiny-df", NOISE, lambda run, x: diffusion_forcing(run, x, STAIRCASE, TABLE, history_noise=0.1)),
    "synchronous, UniPC": ("tiny-df", NOISE, lambda run, x: diffusion_forcing(run, x, SYNCHRONOUS, TABLE, "unipc")),
    "next clip": ("tiny-next-clip", NOISE, lambda run, x: next_clip(run, x, SYNCHRONOUS, TABLE)),
    "causal blocks": ("tiny-causal", ROLLOUT, lambda run, x: causal_blocks(run, x, 2, TABLE)),
    "causal blocks, re-noised": ("tiny-causal", ROLLOUT, lambda run, x: causal_blocks(run, x, 2, TABLE, 5)),
}
ROLLOUTS = {"long rollout": ("tiny-causal", LONG, lambda run, x: causal_blocks(run, x, 2, flow_sigmas(2, 3.0)))}
QUICK = ("staircase", "causal blocks")
EVERY = [loop if loop in QUICK else pytest.param(loop, marks=pytest.mark.long) for loop in LOOPS]
PLANNED = SchedulerConfig()
MEASURED = SchedulerConfig(TriModalConfig(0.02, 0.2), "current")
GUIDED = HistoryGuidedConfig(0.3, warmup=1)
LATE = SchedulerConfig(TriModalConfig(0.02, 0.2), "current", decision="one step late")


def run_it(loop: str, acceleration: Acceleration, place=lambda value: value):
    """A whole run: its latents and the run."""
    kind, noise, segments = (LOOPS | ROLLOUTS)[loop]
    torch.manual_seed(0)
    causal = kind == "tiny-causal"
    config = TinyConfig(12, 12, 2, 2, freq_dim=16, causal_ar=causal, block=2, kind=kind)
    model = place(TinyWan(config).eval().requires_grad_(False))
    denoiser = TinyDenoiser(
        model, place(torch.ones(1, 4, 64)), 2.0, noise.shape[2] if causal else 0, budget=acceleration.kv_budget,
        ann=acceleration.ann,
    ).sized(noise)  # fmt: skip
    run = Run(acceleration, denoiser, Timeline(row_unit="chunk", frames_per_row=2))
    return torch.cat([segment.latents for segment in segments(run, place(noise))], 2), run


@pytest.fixture
def on_stand_in(monkeypatch):
    """A whole run on the stand-in: its latents, the run and what was counted."""

    def go(loop: str, acceleration: Acceleration):
        standin = StandIn(monkeypatch)
        device()
        for method in ("velocity", "feature"):  # without inference mode, which a wrapper cannot enter
            monkeypatch.setattr(TinyDenoiser, method, getattr(TinyDenoiser, method).__wrapped__)
        with torch.no_grad(), standin:
            out, run = run_it(loop, acceleration, put)
        return out.held, run, standin

    yield go
    monkeypatch.undo()


def denoised(run) -> list:
    return [record for record in run.timeline.records if record.decision not in ("commit", "prefill")]


def last_of_segments(run) -> int:
    return len({record.segment for record in denoised(run)})


@pytest.mark.parametrize("loop", EVERY)
def test_the_plain_loops_never_wait_and_send_nothing(loop, on_stand_in):
    _, _, standin = on_stand_in(loop, Acceleration())
    assert standin.told == []


@pytest.mark.parametrize("loop", EVERY)
def test_signals_of_the_noise_levels_never_wait(loop, on_stand_in):
    """What is sent is the error of each computed call, which nobody waits for."""
    _, run, standin = on_stand_in(loop, Acceleration(scheduler=PLANNED, correction=CorrectionConfig()))
    last = {record.segment: record.iteration for record in denoised(run)}
    computed = [r for r in denoised(run) if r.decision == "recompute" and r.iteration < last[r.segment]]
    assert standin.counts() == Counter(sent=len(computed))
    assert "renoised" in loop.replace("-", "") or any(record.decision == "predict" for record in denoised(run))


RUN_TIME = {
    "staircase": Acceleration(scheduler=MEASURED, history_guided=GUIDED, suffix_window=True),
    "synchronous, UniPC": Acceleration(scheduler=MEASURED, frozen_window=FrozenConfig(1.0, "history")),
    "next clip": Acceleration(history_guided=GUIDED, correction=CorrectionConfig(), shared_prefix=FrozenConfig(1.0)),
    "causal blocks": Acceleration(scheduler=MEASURED, history_guided=GUIDED),
    "causal blocks, re-noised": Acceleration(scheduler=MEASURED),
}


@pytest.mark.parametrize("loop", EVERY)
def test_signals_from_the_device_cost_one_vector_and_one_wait_a_call(loop, on_stand_in):
    """All signals and what a computed call tells of itself travel together."""
    _, run, standin = on_stand_in(loop, RUN_TIME[loop])
    calls = len(denoised(run))
    assert standin.counts() == Counter(sent=calls, wait=calls)
    assert {name for kind, name, _ in standin.told if kind == "wait"} == {"0 behind"}


@pytest.mark.parametrize("loop", ["staircase", "causal blocks"])
def test_late_decisions_wait_for_no_call_but_the_one_before(loop, on_stand_in):
    """Whenever the host waits, the device still has the newest vector to make; a segment's end alone catches up."""
    _, run, standin = on_stand_in(loop, Acceleration(scheduler=LATE))
    calls, segments = len(denoised(run)), last_of_segments(run)
    assert standin.counts() == Counter(sent=calls, wait=calls)
    waits = Counter(name for kind, name, _ in standin.told if kind == "wait")
    assert waits == Counter({"1 behind": calls - segments, "0 behind": segments})


NODES = {
    "Chunk Cache on noise levels": ("staircase", Acceleration(chunks=ChunkConfig()), 0),
    "Chunk Cache on latents": ("staircase", Acceleration(chunks=ChunkConfig(signal="latent")), 1),
    "Active Frame Window": ("staircase", Acceleration(scheduler=PLANNED, frozen_window=FrozenConfig(1.0)), 0),
    "Shared Prefix Cache": ("staircase", Acceleration(scheduler=PLANNED, shared_prefix=FrozenConfig(1.0)), 0),
    "KV Cache Budget, window": ("long rollout", Acceleration(kv_budget=KVBudgetConfig(frames=6)), 0),
    "KV Cache Budget, 8-bit": ("long rollout", Acceleration(kv_budget=KVBudgetConfig(frames=11, storage="8-bit")), 0),
    "KV Cache Budget, importance": (
        "long rollout", Acceleration(kv_budget=KVBudgetConfig(frames=8, keep="importance-redundancy", recent=1)), 0,
    ),
    "ANN Attention": ("long rollout", Acceleration(ann=AnnConfig(0.4, shortest=1, tile=16)), 0),
}  # fmt: skip


SLOWER = ("Chunk Cache on noise levels", "Shared Prefix Cache", "KV Cache Budget, window", "KV Cache Budget, 8-bit")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in SLOWER else name for name in NODES]
)
def test_no_node_makes_the_host_wait_more_often(name, on_stand_in):
    loop, acceleration, waits = NODES[name]
    _, run, standin = on_stand_in(loop, acceleration)
    calls = len({(record.segment, record.iteration) for record in denoised(run)})
    counts = standin.counts()
    assert (counts["wait"], standin.places("read", "sized", "upload")) == (waits * calls, Counter())


def test_a_quality_target_waits_once_for_each_computed_call(on_stand_in):
    _, run, standin = on_stand_in("staircase", Acceleration(scheduler=SchedulerConfig(quality="balanced")))
    counts = standin.counts()
    assert counts == Counter(sent=counts["sent"], wait=counts["sent"])
    assert 0 < counts["wait"] <= sum(record.decision == "recompute" for record in denoised(run))


def test_head_groups_are_found_in_one_read_a_branch_and_move_once_a_run(on_stand_in):
    groups = Acceleration(kv_budget=KVBudgetConfig(frames=6, keep="head-groups", near=1))
    _, _, standin = on_stand_in("long rollout", groups)
    places = Counter(where for *_, where in standin.told)
    assert places.pop("accel/kv/head_groups.py:classify") == 2
    assert set(places) == {"accel/kv/grouping.py:_packed"} and places.total() <= 2 * 2 * 2 * 2  # of branches and layers


def test_the_timestep_signal_of_chunks_is_planned_in_one_read(on_stand_in):
    _, _, standin = on_stand_in("staircase", Acceleration(chunks=ChunkConfig(signal="timestep")))
    assert standin.counts()["read"] == 1 and standin.counts()["wait"] == 0
    assert {where for kind, _, where in standin.told if kind == "read"} == {"accel/signals.py:planned_changes"}


def test_temporal_merge_waits_once_a_block_for_all_layers(on_stand_in):
    merging = KVBudgetConfig(frames=8, keep="temporal-merge", recent=1)
    _, run, standin = on_stand_in("long rollout", Acceleration(kv_budget=merging))
    blocks = len({record.segment for record in run.timeline.records})
    counts = standin.counts()
    assert 0 < counts["wait"] <= blocks
    assert standin.places("read", "sized", "upload") == Counter()


@pytest.mark.parametrize(("loop", "config"), [("staircase", MEASURED), ("causal blocks", LATE)], ids=["exact", "late"])
def test_a_device_that_is_behind_decides_as_a_cpu_does(loop, config, on_stand_in):
    acceleration = Acceleration(scheduler=config)
    there, behind, _ = on_stand_in(loop, acceleration)
    here, plain = run_it(loop, acceleration)
    assert torch.allclose(there, here, atol=1e-4)
    assert [r.decision for r in behind.timeline.records] == [r.decision for r in plain.timeline.records]
    assert behind.timeline.late == plain.timeline.late


def test_the_stand_in_gives_nothing_away_unseen(monkeypatch):
    standin = StandIn(monkeypatch)
    device()
    with standin:
        x = put(torch.arange(4.0))
        reads = [x.tolist, x.sum().item, lambda: float(x[0]), lambda: bool((x > 0).all()), x.cpu,
                 lambda: x.to("cpu"), lambda: torch.equal(x, x), lambda: torch.zeros(4).copy_(x)]  # fmt: skip
        sized = [x.nonzero, lambda: x[x > 0], lambda: x.masked_select(x > 0), x.unique]
        uploads = [lambda: torch.ones(4).to(x.device), lambda: x[torch.tensor([0, 1])]]
        for kind, ways in (("read", reads), ("sized", sized), ("upload", uploads)):
            for way in ways:
                before = standin.counts()[kind]
                way()
                assert standin.counts()[kind] == before + 1, (kind, way)
        for refused in (x.numpy, lambda: torch.tensor([1.0], device=x.device), lambda: x + torch.ones(4)):
            with pytest.raises((TypeError, RuntimeError)):
                refused()
        seen = len(standin.told)
        assert isinstance(on_device([1.0], x.device) + x, There)
        assert len(standin.told) == seen
    with pytest.raises(AssertionError, match="outside of a StandIn"):
        x + 1


def test_what_was_sent_reads_as_nothing_until_it_was_waited_for(monkeypatch):
    standin = StandIn(monkeypatch)
    device()
    with standin:
        readback = Readback()
        for value in (1.0, 2.0, 3.0):
            readback.send(put(torch.tensor([value])), Label(1))
        assert all(host.isnan().all() for host, *_ in readback._sent)
        assert readback.arrived() == []
        assert [values for values, _ in readback.arrived(1)] == [[1.0], [2.0]]
        assert readback.arrived(1) == []
        assert [values for values, _ in readback.arrived(0)] == [[3.0]]
    assert standin.counts() == Counter(sent=3, wait=2)
