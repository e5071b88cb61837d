"""On a CUDA device: whole runs with every hidden wait turned into an error, and replayed forwards.

``torch.cuda.set_sync_debug_mode("error")`` raises at copies and reads that wait for the device. Waiting for the event
of a copy into pinned memory, once a call, is what the runs are meant to do and raises nothing.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch

from accel.acceleration import Acceleration
from accel.cuda_graphs import GraphedDenoiser
from accel.engine import Run
from accel.kv.budget import KVBudgetConfig
from accel.sampling import causal_blocks
from accel.timeline import Timeline
from tests.test_cuda_graphs import NOISE, TABLE, denoiser
from tests.test_stalls import LATE, LOOPS, NODES, PLANNED, RUN_TIME, run_it

if not torch.cuda.is_available():
    warnings.warn("NO CUDA DEVICE: that no run waits unseen is checked on a stand-in only", stacklevel=1)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: not checked on a GPU")

RUNS = {f"plain, {loop}": (loop, Acceleration()) for loop in LOOPS}
RUNS |= {f"noise levels, {loop}": (loop, Acceleration(scheduler=PLANNED)) for loop in LOOPS}
RUNS |= {f"measured, {loop}": (loop, acceleration) for loop, acceleration in RUN_TIME.items()}
RUNS |= {f"late, {loop}": (loop, Acceleration(scheduler=LATE)) for loop in ("staircase", "causal blocks")}
RUNS |= {name: (loop, acceleration) for name, (loop, acceleration, _) in NODES.items()}


@contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(value):
    return value.to("cuda")


def brought(value):
    """Model, prompt and noise come to the device before the loop, which may wait."""
    torch.cuda.set_sync_debug_mode("default")
    moved = on_gpu(value)
    torch.cuda.set_sync_debug_mode("error")
    return moved


@pytest.mark.parametrize("name", RUNS)
def test_nothing_waits_between_the_first_call_and_the_last(name):
    loop, acceleration = RUNS[name]
    run_it(loop, acceleration, on_gpu)  # allocates, loads libraries
    with no_waiting():
        out, run = run_it(loop, acceleration, brought)
    here, plain = run_it(loop, acceleration)
    assert [r.decision for r in run.timeline.records] == [r.decision for r in plain.timeline.records]
    assert torch.allclose(out.cpu(), here, atol=1e-2)


def test_replayed_forwards_give_what_the_model_gives():
    def one():
        made = denoiser(budget=KVBudgetConfig(frames=5, sink=1))
        made.model.to("cuda")
        made._prompts = {segment: prompt.to("cuda") for segment, prompt in made._prompts.items()}
        return made

    def roll(model):
        with torch.no_grad():
            segments = causal_blocks(Run(Acceleration(), model, Timeline()), NOISE.to("cuda"), 2, TABLE)
            return torch.cat([segment.latents for segment in segments], 2)

    graphed = GraphedDenoiser(one())
    assert torch.allclose(roll(graphed), roll(one()), atol=1e-3)
    assert graphed.graphs == 2 and graphed.reason == ""
