"""Recomputing tokens: what is chosen, what it costs, and that everything chosen is the frozen window."""

from __future__ import annotations

import pytest
import torch

from accel.engine import Acceleration
from accel.kv.frozen import FrozenConfig
from accel.sampling import SegmentPlan
from bench.motion_tokens import WARMUP, WEIGHTINGS, IndexedKV, make
from demo.generate import sample
from demo.model import TinyConfig, TinyWan

PLAN = SegmentPlan(frames=8, segment=8, overlap=2, block=2, ar_step=2, steps=12)
NOISE = torch.randn(1, 16, 8, 4, 4, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> TinyWan:
    torch.manual_seed(2)
    return TinyWan(TinyConfig(dim=48, ffn_dim=64, num_layers=2, num_heads=2)).eval().requires_grad_(False)


def test_all_tokens_are_the_window_whose_idle_frames_keep_their_kv(model):
    frozen = Acceleration(frozen_window=FrozenConfig(commit=False))
    expected = sample(model, CONTEXT, NOISE, frozen, PLAN)
    made = sample(model, CONTEXT, NOISE, plan=PLAN, make_run=make(0.0, "even", 2))
    assert float((made.latents - expected.latents).norm() / expected.latents.norm()) < 1e-4
    assert made.timeline.totals()["flops"] == expected.timeline.totals()["flops"]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_higher_threshold_computes_fewer_tokens_and_none_is_lost(model, weighting):
    runs = [sample(model, CONTEXT, NOISE, plan=PLAN, make_run=make(level, weighting, 2)) for level in (0.05, 0.3, 1e9)]
    costs = [run.timeline.totals()["flops"] for run in runs]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    assert all(bool(run.latents.isfinite().all()) for run in runs)
    records = runs[-1].timeline.records
    assert len(records) == PLAN.calls()
    chunks = 4 * (WARMUP + 1)
    assert sum(record.decision == "recompute" for record in records) <= chunks


def test_keys_are_written_where_the_tokens_are():
    store, index = IndexedKV(1, 3, 4), torch.tensor([1, 6])
    everything = torch.arange(12.0).view(1, 12, 1)
    store.exchange_tokens(0, everything, everything, torch.arange(12), (0, 3))
    new = torch.tensor([[[100.0], [200.0]]])
    keys, values = store.exchange_tokens(0, new, -new, index, (1, 3))
    assert keys.flatten().tolist() == [4, 100, 6, 7, 8, 9, 200, 11]
    assert values.flatten().tolist() == [4, -100, 6, 7, 8, 9, -200, 11]
