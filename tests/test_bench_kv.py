"""The K/V measurements: what is written, what holds exactly, and that a breach stops the command."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

import bench.kv as kv
from accel.kv.bounded import BoundedStore
from accel.kv.budget import IMPORTANCE, StoreShape, plan
from accel.kv.memory import dense
from accel.kv.ring import Layout
from accel.kv.rotary import TimeRotary
from accel.kv.slots import PlainSlots
from bench.kv_growth import FULL_BLOCK, appended, check, counted, overheads
from bench.kv_quality import Clips, OnHistory, interval, unbounded, verdict
from bench.kv_runs import (
    ANN,
    BLOCK,
    BYTES,
    EQUAL_BYTES,
    SINK,
    STEPS,
    TOKENS,
    UNBOUNDED,
    Rollout,
    accelerations,
    configurations,
    flops_of_block,
    full_layout,
    tiny_shape,
    with_room_of_full_size,
)  # fmt: skip
from bench.kv_speed import check_endless, deep_size, ratios, trends
from bench.scenes import prompt
from demo.generate import load, sample_causal, start_noise

STRATEGIES = {UNBOUNDED, ANN, *EQUAL_BYTES}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv")
    told = kv.run(kv.QUICK, kv.PARTS, folder, folder / "rows", lambda line: None)
    assert json.loads((folder / "kv.json").read_text()) == told
    return told, folder


def test_every_part_is_written_with_when_and_on_what(quick):
    told, folder = quick
    assert set(told) == {*kv.PARTS, "conditions"} and set(told["conditions"]) == set(kv.PARTS)
    text = (folder / "kv.md").read_text()
    assert all(f"## {part.capitalize()}" in text for part in kv.PARTS)
    assert text.startswith("# K/V of bounded size") and "nan" not in text and "None" not in text


def test_every_strategy_has_every_figure_of_quality(quick):
    quality = quick[0]["quality"]
    assert {row["strategy"] for row in quality["table"]} == STRATEGIES == set(quality["rows"])
    keys = {f"{part}_{what}" for part in ("closed", "open", "truth") for what in ("psnr", "curve", "drift")}
    keys |= {"strategy", "accuracy", "accuracy_curve", "centre_error", "centre_curve"}
    assert all(set(row) == keys for row in quality["table"])
    first = quality["table"][0]
    assert first["strategy"] == UNBOUNDED and first["open_psnr"] is None and first["closed_psnr"] is None
    assert quality["verdict"]["best"] in EQUAL_BYTES and quality["verdict"]["open_best"] in EQUAL_BYTES


def test_every_strategy_is_timed(quick):
    (one,) = quick[0]["speed"]
    rows = {row["strategy"]: row for row in one["rows"]}
    assert set(rows) == STRATEGIES
    assert rows[UNBOUNDED]["flop_ratio_to_unbounded"] == rows[SINK]["time_ratio_to_window"] == 1
    assert rows[SINK]["flops"] == flops_of_block(12 * TOKENS) < rows[UNBOUNDED]["flops"]


def test_bounded_rollouts_keep_their_bytes_and_flops_and_unbounded_ones_grow(quick):
    watched = {row["strategy"]: row for row in quick[0]["growth"]["watched"]}
    for name in (SINK, IMPORTANCE):
        later = [block for block in watched[name]["blocks"] if block["latents"] >= watched[name]["full_from"]]
        assert len(later) > 1 and len({(block["bytes"], block["flops"]) for block in later}) == 1
    for name, row in watched.items():
        if name != UNBOUNDED:
            assert row["most_bytes"] <= row["budget_bytes"] and row["most_flops"] <= row["budget_flops"]
    flops = [block["flops"] for block in watched[UNBOUNDED]["blocks"]]
    assert flops == sorted(set(flops))


def test_a_stopped_run_goes_on_from_what_is_stored(quick, monkeypatch):
    told, folder = quick
    monkeypatch.setattr("bench.kv_runs.Rollout.blocks", None)
    assert kv.run(kv.QUICK, ("speed", "growth"), folder, folder / "rows", lambda line: None)["speed"] == told["speed"]


BLOCKS = [{"latents": 4 * (index + 1), "bytes": 100, "flops": 50} for index in range(5)]
GROWTH = {
    "strategy": SINK, "blocks": BLOCKS, "planned_bytes": 100, "budget_bytes": 101, "budget_flops": 60, "full_from": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": [*BLOCKS, {"latents": 24, "bytes": 99, "flops": 50}]}, "bytes of a block take 2 values"),
        ({"blocks": [*BLOCKS, {"latents": 24, "bytes": 100, "flops": 51}]}, "flops of a block take 2 values"),
        ({"blocks": [*BLOCKS, {"latents": 24, "bytes": 102, "flops": 50}]}, "bytes 102 at latent 24 are over"),
        ({"blocks": [*BLOCKS, {"latents": 24, "bytes": 100, "flops": 61}]}, "flops 61 at latent 24 are over"),
        ({"planned_bytes": 102}, "102 bytes planned"),
        ({"full_from": None}, "never full"),
    ],
)
def test_growth_is_not_let_pass(change, message):
    check(GROWTH, True)
    with pytest.raises(AssertionError, match=message):
        check(GROWTH | change, True)


def test_an_endless_run_that_grows_or_slows_down_is_not_let_pass():
    steady = trends([0.1] * 40, [1000] * 40, 0)
    check_endless(steady)
    check_endless(trends([0.1] * 40, [1000] * 20 + [1050] * 20, 45))
    with pytest.raises(AssertionError, match="memory grew by 5.00 %"):
        check_endless(trends([0.1] * 40, [1000] * 20 + [1050] * 20, 0))
    with pytest.raises(AssertionError, match="1.060 times as long"):
        check_endless(trends([0.1] * 20 + [0.106] * 20, [1000] * 40, 0))


def test_the_size_of_a_list_counts_everything_once():
    shared = "x" * 1000
    assert deep_size([shared, shared]) - deep_size([shared]) == deep_size([None, None]) - deep_size([None])


def test_at_full_size_a_bounded_block_costs_the_same_at_any_length_and_an_unbounded_one_does_not():
    rows = [row for row in counted() if row["model"].startswith("Wan 1.3B")]
    assert [round(row[UNBOUNDED]["gigabytes"], 2) for row in rows] == [28.75, 143.77, 718.85]
    for budget in ("9", "13", "21"):
        assert len({tuple(row[budget].values()) for row in rows}) == 1
    assert 3.7 < rows[0]["13"]["gigabytes"] <= 4.0
    assert all(0 < row[key]["overhead_percent"] < 25 for row in overheads() for key in ("branches_1", "branches_2"))


def test_a_budget_over_four_gigabytes_is_not_let_pass(monkeypatch):
    monkeypatch.setattr("bench.kv_growth.MOST_GIGABYTES", 3.7)
    with pytest.raises(AssertionError, match="over 3.7"):
        counted()


class Counting(PlainSlots):
    """Counts what is written."""

    total = 0

    def write(self, start, keys, values):
        Counting.total += keys.nbytes + values.nbytes
        super().write(start, keys, values)

    def write_time(self, start, time):
        Counting.total += time.nbytes
        super().write_time(start, time)


def test_the_bytes_appended_are_those_that_a_ring_writes():
    shape = StoreShape(1, 2, 12, (1, 2), 1, 4, TimeRotary.of_wan(12))
    expected = appended(shape)
    store = BoundedStore(1, Layout(2, 1, 12, 0, 21), shape.rotary, dense, None, Counting)
    values, end = torch.randn(3, 1, 2 * FULL_BLOCK, 2, 12, generator=torch.Generator().manual_seed(0)), 0
    for index in range(3 * expected["period"]):
        if index == expected["period"]:
            Counting.total = 0
        for _ in range(expected["forwards"]):
            store.begin(end, FULL_BLOCK)
            store.attend(0, *values)
        store.commit()
        end += FULL_BLOCK
    assert pytest.approx(2 * expected["period"] * expected["ring_bytes"]) == Counting.total


@pytest.mark.parametrize("name", EQUAL_BYTES)
def test_a_strategy_has_the_room_that_its_bytes_buy_at_full_size(name):
    config = configurations(16)[name]
    full, made = full_layout(config), with_room_of_full_size(config)
    tiny = plan(made, tiny_shape(), 1, BLOCK, 200)
    assert (tiny.sink, tiny.ring) == (full.sink, full.ring)
    assert tiny.middle / tiny.tokens == pytest.approx(full.middle / full.tokens, abs=0.5 / TOKENS)
    assert full.whole_frames > 16 if name == BYTES else full.places <= 16 * full.tokens


def test_a_rollout_is_the_one_of_the_demo_and_filling_is_committing():
    noise, acceleration = start_noise(3, 16), accelerations(8)[SINK]
    ours = Rollout(acceleration, prompt(3), 16).latents(noise, 3)
    theirs = sample_causal(
        load("tiny-causal"), prompt(3), noise, acceleration, steps=STEPS, renoise_seed=3, shift=5.0
    ).latents
    assert torch.equal(ours, theirs)
    filled = Rollout(acceleration, prompt(3), 16)
    filled.fill(ours[:, :, :12])
    finished = [noise[:, :, first : first + BLOCK] for first in range(0, 12, BLOCK)]
    (last,) = filled.blocks(noise, 3, finished=finished)
    assert torch.equal(last.latents, ours[:, :, 12:])


def test_behind_its_own_history_an_unbounded_store_answers_as_before():
    history, noise, plain = unbounded(3, 12), start_noise(3, 12), accelerations(8)[UNBOUNDED]
    for given in (history, torch.zeros_like(history)):
        rollout = Rollout(plain, prompt(3), 12, partial(OnHistory, given, plain))
        made = rollout.latents(noise, 3)
        assert torch.equal(made[:, :, :BLOCK], history[:, :, :BLOCK])
        assert torch.equal(made, history) == (given is history)


def test_the_verdict_goes_by_the_truth_clip_by_clip():
    def rows(values, near):
        return [{"truth": {"psnr": value}, "open": {"psnr": near}} for value in values]

    told = verdict({
        UNBOUNDED: rows([20.0, 22.0], None), ANN: rows([30.0, 30.0], 50.0), SINK: rows([18.0, 20.0], 30.0),
        IMPORTANCE: rows([19.5, 21.5], 25.0),
    })  # fmt: skip
    assert (told["best"], told["open_best"], told["within"], told["beats"]) == (IMPORTANCE, SINK, True, True)
    assert told["to_unbounded"]["mean"] == -0.5 and told["to_window"]["low"] == 1.5


def test_an_interval_holds_its_mean_and_segments_cover_the_video():
    told = interval([1.0, 2.0, 4.0])
    assert told["mean"] == pytest.approx(7 / 3) and told["low"] < told["mean"] < told["high"]
    assert interval([]) is None
    assert Clips(1, 64, 8).budget == 16 and Clips(1, 22, 8).bounds(4) == [(4, 12), (12, 20), (20, 22)]


def test_ratios_are_taken_round_by_round():
    rows = ratios({UNBOUNDED: 100, SINK: 50}, {UNBOUNDED: [1.0, 2.0, 4.0], SINK: [0.5, 1.0, 1.0]})
    assert (rows[1]["flop_ratio_to_unbounded"], rows[1]["time_ratio_to_unbounded"]) == (2.0, 2.0)
