"""The 257-frame schedule: full-size FLOPs follow from what every call forwarded."""

from __future__ import annotations

import pytest

from accel.timeline import StepRecord
from bench import fullsize as full
from bench.fullschedule import SCENE, fullsize_flops, settings
from bench.rehearsal import rehearse


def test_the_plain_run_costs_what_the_table_of_schedules_says():
    flops = fullsize_flops(rehearse(SCENE).records)
    assert flops == full.run_flops(full.whole_forward(full.WAN_1_3B), full.SKYREELS, full.FULL)
    assert flops / 1e15 == pytest.approx(245.01, rel=0.01), "SCOPE's original"


def test_a_suffix_window_costs_what_its_replayed_decisions_cost():
    name = "fast, suffix window"
    records = rehearse(SCENE, settings()[name]).records
    ratio = fullsize_flops(rehearse(SCENE).records) / fullsize_flops(records)
    assert ratio == pytest.approx(full.replayed([record.decision for record in records], full.SUFFIX))


def test_an_interval_counts_once_however_many_chunks_it_served():
    one = StepRecord(0, 3, (5, 10), "recompute", 0.5, window=(0, 25), queries=((5, 15),))
    two = StepRecord(0, 3, (10, 15), "recompute", 0.5, window=(0, 25), queries=((5, 15),))
    skipped = StepRecord(0, 3, (15, 20), "predict", 0.5, window=(0, 25))
    assert fullsize_flops([one, two, skipped]) == full.WAN_1_3B.forward_flops(
        10, full.TOKENS, 25 * full.TOKENS, branches=2
    )
