"""The full-size cost table reproduces the published counts and the counts of the reference implementations."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

import bench.cost as cost
import bench.fullsize as full
from accel.flops import WAN_1_3B

COUNTED = {  # PFLOP of the transformer blocks: full, suffix window, active frames with K/V of finished ones, causal K/V
    "ar_step 5, blocks of 5": (200, 244.77, 207.88, 151.45, 117.24),
    "ar_step 5, blocks of 1": (460, 562.96, 341.64, 125.67, 108.03),
    "ar_step 2, blocks of 1": (274, 335.33, 246.80, 143.00, 108.03),
    "synchronous": (150, 183.58, 183.58, 159.10, 108.03),
}
TOKENS = {
    "ar_step 5, blocks of 5": (20.40, 18.16, 13.26, 13.30),
    "ar_step 5, blocks of 1": (46.92, 33.05, 13.26, 13.30),
}


@pytest.mark.parametrize("name", COUNTED)
def test_every_schedule_costs_what_was_counted_for_it(name):
    calls, *petaflop = COUNTED[name]
    plan = cost.PLANS[name]
    assert plan.calls() == calls
    alone, whole = full.blocks_alone(WAN_1_3B), full.whole_forward(WAN_1_3B)
    for scheme, expected in zip(cost.SCHEMES, petaflop, strict=True):
        assert full.run_flops(alone, plan, scheme) / 1e15 == pytest.approx(expected, abs=0.0051)
        assert full.run_flops(whole, plan, scheme) / 1e15 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", TOKENS)
def test_token_forwards_are_those_counted(name):
    millions = [full.token_forwards(cost.PLANS[name], scheme) / 1e6 for scheme in cost.SCHEMES]
    assert [round(value, 2) for value in millions] == list(TOKENS[name])


def test_scopes_original_is_reproduced():
    assert full.run_flops(full.whole_forward(WAN_1_3B), full.SKYREELS, full.FULL) / 1e15 == pytest.approx(
        245.01, rel=0.01
    )


def test_states_are_those_counted():
    megabytes = [round(count / 1e6, 1) for count in full.states().values()]
    assert megabytes == pytest.approx([39.2, 19.6, 78.3, 313.3, 626.7, 84603, 3760, 1.8, 18801], abs=0.5)


def test_magi_reproduces_its_published_count():
    everything = full.magi()
    assert (everything["forwards"], full.magi(extra=False)["chunk forwards"]) == (208, 640)
    petaflop = {name: (counts["linear"] + counts["self-attention"]) / 1e15 for name, counts in _magi().items()}
    assert petaflop["all"] == pytest.approx(80.5, abs=0.1) and petaflop["all"] == pytest.approx(81.09, rel=0.01)
    assert petaflop["short"] == pytest.approx(60.6, rel=0.01)
    assert petaflop["plain"] == pytest.approx(71.1, rel=0.01)


def _magi() -> dict[str, dict[str, int]]:
    return {"all": full.magi(), "short": full.magi((5, 4, 3, 2)), "plain": full.magi(extra=False)}


def test_a_decision_list_saves_what_it_skips():
    calls = full.SKYREELS.calls()
    everything = ["recompute"] * calls
    assert full.replayed(everything) == 1.0
    assert full.replayed(everything, full.SUFFIX) == pytest.approx(244.77 / 207.88, abs=1e-3)
    assert full.replayed(everything, full.ACTIVE) == pytest.approx(244.77 / 151.45, abs=1e-3)
    half = ["recompute", "predict"] * (calls // 2)
    assert full.replayed(half) == 2.0
    ratios = [full.replayed(half, windows) for windows in (full.FULL, full.SUFFIX, full.ACTIVE_WHOLE, full.ACTIVE)]
    assert ratios == sorted(ratios)


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 decisions for a schedule of 200 calls"):
        full.replayed(["recompute"] * 3)
    with pytest.raises(ValueError, match="no call is computed"):
        full.replayed(["cache"] * 200)


def test_a_window_without_waiting_frames_saves_nothing():
    plan = replace(full.SKYREELS, ar_step=0)
    forward = full.whole_forward(WAN_1_3B)
    assert full.run_flops(forward, plan, full.SUFFIX) == full.run_flops(forward, plan, full.FULL)


def test_the_command_writes_its_tables(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["cost", "--output", str(tmp_path)])
    cost.main()
    told = json.loads((tmp_path / "cost.json").read_text())
    assert {row["method"] for row in told["lists"]} == set(cost.LISTS)
    assert all(row["flop_ratio"][full.SUFFIX] > row["flop_ratio"][full.FULL] > 1 for row in told["lists"])
    text = (tmp_path / "cost.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "244.78 (1.00x) | 207.89 (1.18x) | 151.46 (1.62x) | 117.26 (2.09x)" in text
