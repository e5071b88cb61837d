"""Acceleration beside what else people put on a MODEL: each row of README's table "Works with" that was tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.host.inprocess import run_in_process
from tests.host.test_nodes import checkpoints

__all__ = ["checkpoints"]

SCRIPT = Path(__file__).with_name("neighbour_runs.py")
CORE_NODES = [
    "nodes_custom_sampler.py", "nodes_cfg.py", "nodes_apg.py", "nodes_slg.py", "nodes_context_windows.py",
    "nodes_easycache.py", "nodes_model_merging.py",
]  # fmt: skip
STEPS = 8
SKIPPING = (
    "nothing", "LoRA", "fp8", "compiled", "ControlNet", "VACE", "mask", "batch", "CFGZeroStar", "APG",
    "SkipLayerGuidanceDiT", "SkipLayerGuidanceDiT from the middle", "static windows",
)  # fmt: skip


@pytest.fixture(scope="module")
def facts(comfy_root: Path, checkpoints: dict[str, Path]) -> dict[str, Any]:
    return run_in_process(SCRIPT, str(checkpoints["frames"]), root=comfy_root, core_nodes=CORE_NODES)


@pytest.mark.parametrize("name", [*SKIPPING, "moving windows"])
def test_thresholds_of_zero_change_nothing_beside_it(facts: dict[str, Any], name: str) -> None:
    assert facts[name]["off"]
    assert len(facts[name]["decisions"]) == facts[name]["full"][0] == facts[name]["spent"][0] == STEPS


@pytest.mark.parametrize("name", SKIPPING)
def test_calls_are_skipped_beside_it_with_all_their_forwards(facts: dict[str, Any], name: str) -> None:
    told = facts[name]
    computed, forwards = told["decisions"].count("recompute"), told["full"][1] // STEPS
    assert computed < STEPS and 0.0 < told["error"] < 1.0
    late = name.endswith("from the middle")
    assert told["spent"][1] == (6 if late else computed * forwards)


def test_a_guidance_pass_that_begins_later_is_computed_until_it_has_something_to_reuse(facts: dict[str, Any]) -> None:
    told = facts["SkipLayerGuidanceDiT from the middle"]
    assert told["full"][1] == STEPS + 3
    assert told["decisions"][-3:] == ["cache", "recompute", "recompute"]


def test_lora_acts_before_and_behind_the_acceleration_nodes(facts: dict[str, Any]) -> None:
    assert facts["LoRA changes it"] and facts["LoRA before or behind"]
    assert facts["LoRA in segments"] == [True, False]


def test_fp8_weights_stay_fp8(facts: dict[str, Any]) -> None:
    assert facts["fp8 is fp8"] == "torch.float8_e4m3fn"


def test_a_merged_model_has_the_acceleration_of_its_first(facts: dict[str, Any]) -> None:
    assert "cache" in facts["merged, accelerated first"]
    assert facts["merged, accelerated second"] is False


def test_a_control_model_that_ends_while_sampling_is_not_answered_from_before(facts: dict[str, Any]) -> None:
    told = facts["ControlNet"]
    assert told["full"] == [8, 16], "the two branches are not one batch here"
    assert "it changed at noise level" in told["conditioning"]


def test_vace_frames_reach_the_model(facts: dict[str, Any]) -> None:
    assert facts["VACE changes it"]


def test_context_windows_that_move_are_computed_and_the_segment_sampler_refuses_them(facts: dict[str, Any]) -> None:
    assert facts["static windows"]["full"][1] == 3 * STEPS
    told = facts["moving windows"]
    assert told["decisions"] == ["recompute"] * STEPS and told["spent"] == told["full"]
    assert facts["windows in segments"].startswith("AR Segment Sampler: context windows are on the model")


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_cores_own_caches_are_refused_in_both_orders_and_left_alone_without_ours(
    facts: dict[str, Any], name: str
) -> None:
    under, above, segments, alone = facts["caches"][name]
    assert under == above
    assert under.startswith(f"Tri-Modal Scheduler: {name} is on the model too") and f"remove {name}" in under
    assert segments.startswith(f"AR Segment Sampler: {name} is on the model too")
    assert alone == "nothing was refused"


def test_two_samplers_on_one_model_know_nothing_of_each_other(facts: dict[str, Any]) -> None:
    assert facts["two samplers"] == [True, False]
    assert facts["halves off"]
    for half in facts["halves"]:
        assert len(half) == 4 and half[0] == half[-1] == "recompute" and "cache" in half


def test_the_plain_model_is_as_before(facts: dict[str, Any]) -> None:
    assert facts["nothing outlives it"] == [[], True]
