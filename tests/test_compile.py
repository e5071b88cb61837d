"""torch.compile'd models in our loops: the same results, and compiled once for a kind of forward, not for every step.

Graphs are counted by a backend that runs them as they are; ``long`` adds the real compiler.
"""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo

from accel.acceleration import Acceleration
from accel.attention.ann import AnnConfig
from accel.chunks import ChunkConfig
from accel.kv.budget import KVBudgetConfig
from accel.kv.frozen import FrozenConfig
from demo.denoiser import TinyDenoiser
from tests.test_stalls import MEASURED, PLANNED, run_it

WINDOWS = {
    "whole window": ("staircase", Acceleration(scheduler=PLANNED)),
    "suffix window": ("staircase", Acceleration(scheduler=PLANNED, suffix_window=True)),
    "frozen K/V": ("staircase", Acceleration(scheduler=PLANNED, frozen_window=FrozenConfig(1.0))),
    "chunks": ("staircase", Acceleration(chunks=ChunkConfig(), frozen_window=FrozenConfig(1.0))),
    "next clip": ("next clip", Acceleration(scheduler=PLANNED)),
    "causal, all K/V": ("causal blocks", Acceleration(scheduler=MEASURED)),
    "causal, budget": ("long rollout", Acceleration(kv_budget=KVBudgetConfig(frames=6))),
    "causal, sparse": ("long rollout", Acceleration(ann=AnnConfig(0.4, shortest=1, tile=16))),
}
QUICK = ("causal, budget",)
# Pieces of a block: one where no K/V are kept, else what stands before and behind the store. Each is compiled for its
# first shape and once more for sizes that change; layers after the first add one of the piece that has their number.
MOST = {False: 2, True: 5}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled_by(backend, monkeypatch):
    """Every tiny model made from now on has its blocks compiled."""
    make = TinyDenoiser.__init__

    def compiling(self, model, *given, **named):
        for block in model.blocks:
            block.compile(backend=backend)
        make(self, model, *given, **named)

    monkeypatch.setattr(TinyDenoiser, "__init__", compiling)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in WINDOWS]
)
def test_results_are_the_same_and_graphs_do_not_grow_with_the_steps(name, monkeypatch):
    loop, acceleration = WINDOWS[name]
    plain, expected = run_it(loop, acceleration)
    graphs = []

    def count(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    compiled_by(count, monkeypatch)
    out, run = run_it(loop, acceleration)
    assert torch.allclose(out, plain, atol=1e-5)
    assert [r.decision for r in run.timeline.records] == [r.decision for r in expected.timeline.records]
    stored = name.startswith("causal") or acceleration.frozen_window is not None
    assert 1 <= len(graphs) <= MOST[stored]
    assert not torch._dynamo.utils.counters["frames"].get("recompile_limit")
    made = len(graphs)
    run_it(loop, acceleration)
    assert len(graphs) == made, "a second run, with its own stores and seeds, compiles nothing"


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="NO C COMPILER: inductor cannot run")
def test_the_real_compiler_gives_the_same_video(monkeypatch):
    loop, acceleration = WINDOWS["causal, budget"]
    plain, _ = run_it(loop, acceleration)
    compiled_by("inductor", monkeypatch)
    out, _ = run_it(loop, acceleration)
    assert torch.allclose(out, plain, atol=1e-4)
