"""Replayed forwards, with a stand-in for CUDA's graphs: the operators that ran are traced and run again on the CPU.

A trace knows addresses and numbers, as a CUDA graph does, and nothing of Python: what does not come in through the
graph's own tensors keeps the value it had when it was recorded.
"""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from accel.acceleration import Acceleration, SchedulerConfig
from accel.attention.ann import AnnConfig
from accel.cuda_graphs import GraphedDenoiser, Replays, supports
from accel.engine import Run
from accel.kv.budget import KVBudgetConfig
from accel.kv.store import KVStore
from accel.sampling import causal_blocks
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.denoiser import TinyDenoiser
from demo.model import TinyConfig, TinyWan
from tests.fakes import video

TABLE = flow_sigmas(2, 3.0)
NOISE = torch.randn(1, 16, 9, 4, 4, generator=torch.Generator().manual_seed(2))
BUDGET = KVBudgetConfig(frames=5, sink=1)
recordings = []


def traced(run):
    """In the place of ``cuda_graphs.record``."""
    result = run().clone()
    graph = make_fx(run)()
    recordings.append(graph)
    return result, lambda: result.copy_(graph())


def anywhere(store, device, model=None):
    """``supports`` of a store on a CPU, as if that were a GPU."""
    ok, reason = supports(store, torch.device("cuda"))
    return ok, reason


def denoiser(guidance: float = 2.0, budget=BUDGET, ann=None, **options) -> TinyDenoiser:
    torch.manual_seed(0)
    config = TinyConfig(24, 24, 2, 2, freq_dim=16, causal_ar=True, block=2)
    model = TinyWan(config).eval().requires_grad_(False)
    prompts = {0: torch.ones(1, 4, 64), 3: torch.zeros(1, 4, 64)}
    return TinyDenoiser(model, prompts, guidance, NOISE.shape[2], budget=budget, ann=ann, **options).sized(NOISE)


def roll(one, acceleration: Acceleration | None = None, block: int = 2):
    run = Run(acceleration or Acceleration(), one, Timeline())
    with torch.no_grad():
        return video(causal_blocks(run, NOISE, block, TABLE)), run


@pytest.mark.parametrize(
    ("guidance", "acceleration", "options"),
    [
        (2.0, Acceleration(), {}),
        (1.0, Acceleration(scheduler=SchedulerConfig(), compute_last=False), {}),
        (2.0, Acceleration(), {"history_guidance": 1.0}),
    ],
    ids=["guided", "with skips", "by history"],
)
def test_a_replayed_rollout_is_the_rollout(guidance, acceleration, options):
    """Over many blocks, prompts that change, a sink that is turned, skips, commits and a shorter last block."""
    plain, expected = roll(denoiser(guidance, **options), acceleration)
    graphed = GraphedDenoiser(denoiser(guidance, **options), traced, anywhere)
    out, run = roll(graphed, acceleration)
    assert torch.allclose(out, plain, atol=1e-5)
    assert [r.decision for r in run.timeline.records] == [r.decision for r in expected.timeline.records]
    assert run.timeline.totals()["flops"] == expected.timeline.totals()["flops"]


def test_one_graph_serves_every_forward_of_a_block_length():
    recordings.clear()
    graphed = GraphedDenoiser(denoiser(), traced, anywhere)
    calls, model = [], graphed._denoiser.model.forward
    graphed._denoiser.model.forward = lambda *given: calls.append(1) or model(*given)
    roll(graphed)
    layout, of_a_block = memory(BUDGET).layout, 2 + 1
    filling = sum(layout.held(end) < layout.whole_frames for end in (2, 4, 6, 8, 9))
    assert graphed.graphs == len(recordings) == 2  # blocks of two latent frames, and the last one of one
    assert 0 < filling < 4 and len(calls) == filling * of_a_block + 2 * len(recordings)
    assert graphed.reason == ""


def test_the_graph_reads_its_own_tensors_alone():
    """What it was recorded with may be overwritten."""
    replays = Replays(traced)
    weight, given = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    first = replays("key", lambda x: x * weight, [given])
    given.fill_(float("nan"))
    second = replays("key", lambda x: x * weight, [torch.tensor([5.0, 6.0])])
    assert (first.tolist(), second.tolist()) == ([3.0, 8.0], [5.0, 12.0])
    weight.mul_(2)  # an address the graph knows
    assert replays("key", lambda x: x * weight, [torch.tensor([5.0, 6.0])]).tolist() == [10.0, 24.0]
    assert first.tolist() == [3.0, 8.0], "an answer is not overwritten by the next replay"


def test_the_stand_in_keeps_python_numbers_as_a_cuda_graph_would():
    place, replays = [0], Replays(traced)
    for place[0] in (0, 1):
        answer = replays("key", lambda x: x.narrow(0, place[0], 1), [torch.tensor([1.0, 2.0])])
    assert answer.tolist() == [1.0], "the number of the recording, so a forward that uses one would be found out"


def test_buckets_are_keys_shapes_and_dtypes():
    replays = Replays(traced)
    for key, given in (("a", torch.ones(2)), ("a", torch.ones(3)), ("b", torch.ones(2)), ("a", torch.ones(2).double())):
        for _ in range(3):
            replays(key, torch.neg, [given])
    assert len(replays) == 4
    replays.forget()
    assert len(replays) == 0


def test_graphs_are_dropped_when_the_store_moves():
    recordings.clear()
    graphed = GraphedDenoiser(denoiser(budget=KVBudgetConfig(frames=6, sink=1)), traced, anywhere)
    segments = causal_blocks(Run(Acceleration(), graphed, Timeline()), NOISE, 2, TABLE)
    with torch.no_grad():
        pieces = [next(segments) for _ in range(4)]
        before = graphed._addresses
        assert graphed.graphs == 1 and graphed.lower() is not None
        pieces += list(segments)
    assert graphed._addresses != before and video(pieces).isfinite().all()
    assert graphed.graphs == 1 and len(recordings) == 2  # the old one is gone, the last block has its own


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (lambda: KVStore(1, 4), "KVStore grows with the video; keep K/V within a budget"),
        (lambda: memory(KVBudgetConfig(frames=8, keep="temporal-merge", recent=1)), "keep is 'temporal-merge'"),
        (lambda: memory(KVBudgetConfig(frames=11, storage="8-bit")), "8-bit or offloaded K/V"),
        (lambda: memory(KVBudgetConfig(frames=6, keep="head-groups", near=1)), "keep is 'head-groups'"),
        (lambda: memory(BUDGET, AnnConfig(0.5, shortest=1, tile=16)), "sparse attention picks"),
    ],
)
def test_what_cannot_be_replayed_says_why(store, words):
    ok, reason = supports(store(), torch.device("cuda"))
    assert not ok and words in reason


def test_a_model_that_a_graph_would_not_see_whole_is_refused():
    store, model = memory(BUDGET), torch.nn.Linear(2, 2)
    assert supports(store, torch.device("cpu"), model) == (
        False, "CUDA graphs need a CUDA device, the latents are on cpu",
    )  # fmt: skip
    assert "not on the device" in supports(store, torch.device("cuda"), model)[1]
    assert supports(store, torch.device("cuda"))[0]


def test_where_nothing_can_be_replayed_it_is_the_denoiser_it_wraps():
    plain, _ = roll(denoiser())
    graphed = GraphedDenoiser(denoiser())
    out, _ = roll(graphed)
    assert torch.equal(out, plain) and graphed.graphs == 0 and "CUDA device" in graphed.reason


def memory(budget, ann=None):
    one = denoiser(budget=budget, ann=ann)
    return one._open(NOISE.shape[2])
