"""Rank correlation, and what a watching run sees."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.sampling import SegmentPlan, diffusion_forcing
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from bench.evidence import NAMES, Watching, correlations, ranks, spearman
from tests.fakes import SmoothDenoiser, make_run, video

PLAN = SegmentPlan(frames=10, segment=6, overlap=2, block=2, ar_step=2, steps=8)
NOISE = torch.randn(1, 2, 10, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_equal_values_share_a_rank():
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]


@given(st.lists(st.floats(-10, 10).map(lambda value: round(value, 3)), min_size=3, max_size=20, unique=True))
def test_a_monotone_relation_has_correlation_one(values):
    assert spearman(values, [value**3 for value in values]) == pytest.approx(1.0)
    assert spearman(values, [-value for value in values]) == pytest.approx(-1.0)
    assert math.isnan(spearman(values, [1.0] * len(values)))


def test_watching_changes_nothing_and_sees_every_call_but_the_first_of_a_segment():
    table = flow_sigmas(8, 3.0)
    plain = video(diffusion_forcing(make_run(), NOISE, PLAN, table))
    run = Watching(SmoothDenoiser(), Timeline())
    assert torch.equal(video(diffusion_forcing(run, NOISE, PLAN, table)), plain)
    assert len(run.seen) == PLAN.calls() - len(PLAN.intervals())
    found = correlations(run.seen)
    assert set(found) == set(NAMES)
    assert all(-1.0001 <= value <= 1.0001 for one in found.values() for value in one.values() if math.isfinite(value))
