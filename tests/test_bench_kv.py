"""The K/V measurements in their quick form: every part has its figures, and what must be equal is checked."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

import bench.kv as command
from accel.engine import Acceleration
from bench.kv_bytes import MovedBytes, clone_and_roll
from bench.kv_counts import check_growth, full_size, moved, tiny_growth
from bench.kv_findings import decibel, findings, ranges, stands, told
from bench.kv_quality import CLOSED, SAME, TRUE, Clip, roll
from bench.kv_rollout import BLOCK, NO_SINK, QUICK, SHIFT, STEPS, UNBOUNDED, WHOLE, WINDOW, Rollout, bounded, compared
from bench.kv_speed import told as long_rollout
from bench.scenes import CAUSAL, loaded
from demo.generate import sample_causal
from demo.prompt import embed_scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the quick form has written what it found."""
    target = tmp_path_factory.mktemp("kv")
    command.run(QUICK, list(command.PARTS), target, lambda line: None)
    return target


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "kv.json").read_text())


def test_every_part_says_when_and_on_what_it_was_measured(found):
    assert list(found) == list(command.PARTS)
    assert all(part["date"] and "one thread" in part["conditions"] for part in found.values())


def test_what_is_finished_is_not_measured_again(folder, monkeypatch):
    before = (folder / "kv.md").read_text()
    monkeypatch.setattr(command, "PARTS", dict.fromkeys(command.PARTS))
    command.run(QUICK, list(command.PARTS), folder, lambda line: None)
    assert (folder / "kv.md").read_text() == before
    assert all((folder / f"kv-{name}.svg").read_text().startswith("<svg") for name in ("true-history", "same-history"))


def test_bounded_stores_keep_and_cost_the_same_whatever_the_length(found):
    rows = {one["store"]: one for one in found["growth"]["tiny"]}
    assert set(rows) == {one.name for one in bounded(QUICK.budget)}
    for store in bounded(QUICK.budget):
        assert rows[store.name]["kv_bytes"] <= rows[store.name]["planned_bytes"]
        assert rows[store.name]["exactly_equal"] or not store.fixed
    assert rows[WINDOW]["full_from"] <= QUICK.budget


def test_thirteen_latent_frames_of_wan_take_less_than_four_gigabytes():
    rows = {(one["model"], one["store"], one["latents"]): one for one in full_size()}
    assert rows["Wan 1.3B", "window", 13]["kv_bytes"] <= 4.0e9
    assert rows["Wan 1.3B", "unbounded", 2500]["kv_bytes"] == pytest.approx(719e9, rel=1e-3)
    assert rows["Wan 14B", "window", 16]["flops"] < rows["Wan 14B", "unbounded", 100]["flops"]


def test_growth_stops_at_a_block_that_keeps_or_costs_too_much_or_differs():
    strategy, extent = bounded(QUICK.budget)[0], replace(QUICK, real=4, growth=24)
    rollout = Rollout(strategy, 1, extent.growth)
    clean = torch.zeros(1, 16, BLOCK, 8, 8)
    rollout.commit(clean)
    memory, shape = rollout.store, rollout.denoiser.shape
    good = [{"latent": 4 * n, "flops": 10**9, "kv_bytes": memory.nbytes, "keys": 1.0} for n in range(8)]
    assert check_growth(strategy, good, memory, extent, shape)["exactly_equal"]
    for wrong in ({"kv_bytes": memory.planned_bytes + 1}, {"flops": 10**12}, {"flops": 10**9 + 1}):
        with pytest.raises(AssertionError, match=r"planned|at most|not equal"):
            check_growth(strategy, [*good[:-1], good[-1] | wrong], memory, extent, shape)


def test_a_store_that_leaks_stops_the_measurement(monkeypatch):
    monkeypatch.setattr("accel.kv.memory.KVMemory.nbytes", property(lambda self: 1000 * self.stores[0].frames))
    with pytest.raises(AssertionError, match="not equal"):
        tiny_growth(bounded(QUICK.budget)[0], replace(QUICK, real=4, growth=40))


def test_an_append_moves_its_block_and_the_usual_one_the_whole_store():
    one = moved(3)
    fused, turned = one["ring_with_sink_turned_fused"], one["ring_with_sink_turned"]
    assert one["ring"] == 2 * one["block_bytes"] < fused < turned < one["ring_when_positions_turn"]
    assert turned < one["clone_and_roll"] / 10 and one["clone_and_roll"] == one["clone_and_roll_formula"]


def test_the_kernel_that_turns_the_sink_moves_its_time_channels_twice():
    """Of 1560 tokens, 12 heads, 44 channels, 2 bytes, in 30 layers; the angles are a thousandth."""
    one = moved(3)
    turned = one["ring_with_sink_turned_fused"] - one["ring"]
    assert turned == pytest.approx(30 * 2 * 1560 * 12 * 44 * 2, rel=1e-3)
    ring = one["ring_when_positions_turn_fused"] - one["ring_with_sink_turned_fused"]
    assert ring == pytest.approx(20 * turned, rel=1e-3)


def test_moved_bytes_are_what_is_read_and_written():
    keys, new = torch.zeros(1, 6, 1, 2), torch.ones(1, 2, 1, 2)
    with MovedBytes() as counted:
        keys[:, :2] = new
    assert counted.total == 2 * new.nbytes
    with MovedBytes() as counted:
        torch.mul(new, new[:, :1], out=keys[:, :2])
    assert counted.total == 2.5 * new.nbytes
    keys[:, :2] = 1.0
    clone_and_roll(keys, keys.clone(), 2 * new)
    assert keys.flatten().tolist() == [0.0] * 8 + [2.0] * 4


def test_blocks_are_timed_at_every_length_beside_the_unbounded_store(found):
    rows = found["speed"]["rows"]
    assert {one["latents"] for one in rows} == set(QUICK.histories)
    window = [one for one in rows if one["store"] == WINDOW]
    assert len({one["flops"] for one in window}) == 1
    assert window[0]["flop_ratio"] < window[-1]["flop_ratio"] and all(one["seconds"] > 0 for one in rows)


def test_the_long_rollout_says_how_memory_and_blocks_grow(found):
    assert found["endless"]["kv_bytes"] and len(found["endless"]["seconds_by_decile"]) == 10
    blocks = [(1.0, 1000)] * 2 + [(1.0 + n / 10, 2000 + n) for n in range(100)]
    one = long_rollout(QUICK, blocks, [(n, 1.0) for n in range(2, 102, 5)], 7)
    assert one["growth_percent"] == pytest.approx(100 * 99 / 2000)
    assert one["last_over_first"] == pytest.approx((1.0 + 9.45) / (1.0 + 0.45))
    assert one["last_over_first_against_still"] == pytest.approx(one["last_over_first"])


@pytest.mark.parametrize("strategy", compared(8, 16), ids=lambda one: one.name)
def test_a_rollout_is_the_samplers_bit_by_bit(strategy):
    clip = Clip.of(3, 16)
    made, rollout = roll(strategy, clip, None)
    told_to = Acceleration(kv_budget=strategy.config, ann=strategy.ann)
    prefix, context = clip.latents[:, :, :BLOCK], embed_scenes(clip.scenes)
    options = {"steps": STEPS, "renoise_seed": 3, "shift": SHIFT, "prefix": prefix}
    expected = sample_causal(loaded(CAUSAL), context, clip.noise, told_to, **options)
    assert torch.equal(made, expected.latents)
    assert rollout.flops == expected.timeline.totals()["flops"]


def test_every_store_has_a_row_of_every_clip(found):
    part, blocks = found["quality"], QUICK.frames // BLOCK - 1
    names = [one.name for one in compared(QUICK.budget, QUICK.frames)]
    assert [row["strategy"] for row in part["rows"]] == names == list(part["planned_bytes"])
    for row in part["rows"]:
        lists = (row[SAME]["to_unbounded"], row[TRUE]["to_simulation"], row[TRUE]["centre"], row[CLOSED]["accuracy"])
        assert all(len(one) == blocks for one in lists)
    assert part["rows"][0]["strategy"] == UNBOUNDED and not any(part["rows"][0][SAME]["to_unbounded"])


def test_bounded_stores_answer_as_the_unbounded_one_until_they_are_full(found):
    for row in found["quality"]["rows"]:
        if row["strategy"] == NO_SINK:
            first, *_, last = row[SAME]["to_unbounded"]
            assert first < 1e-8 < last


def test_findings_name_the_best_at_equal_bytes(found):
    lines = findings(found["quality"], QUICK)
    assert len(lines) == len(ranges(QUICK)) + 3 and all("best at equal bytes" in line for line in lines)
    assert ranges(WHOLE) == [(16, 32), (32, 64)]
    assert stands([3.0, 4.0], [1.0, 2.0], "it", 1.0) == "above it: +2.00 (+2.00 to +2.00) dB, within 1 dB of it"
    assert "below it" in stands([1.0, 1.0], [4.0, 4.0], "it", 1.0) and "not within" in stands([1.0], [4.0], "it", 1.0)
    assert told([math.inf]) == "-" and decibel([0.0]) == math.inf and decibel([0.01]) == pytest.approx(20.0)


def test_the_command_refuses_parts_that_do_not_exist(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kv", "growth", "speeds"])
    with pytest.raises(SystemExit):
        command.main()
