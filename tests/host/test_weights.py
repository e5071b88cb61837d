"""Acceleration on weights that are offloaded, quantized or moved by other packs: rows of README's "Works with"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.host.inprocess import run_in_process
from tests.host.test_nodes import checkpoints

__all__ = ["checkpoints"]

pytestmark = pytest.mark.long
SCRIPT = Path(__file__).with_name("weight_runs.py")
WAYS = ("KSampler", "shared prefix", "frozen K/V", "K/V budget")
KINDS = ("Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def facts(comfy_root: Path, checkpoints: dict[str, Path]) -> dict[str, Any]:
    given = str(checkpoints["frames"]), str(checkpoints["causal"]), str(comfy_root / "custom_nodes")
    return run_in_process(SCRIPT, *given, root=comfy_root, core_nodes=["nodes_multigpu.py"])


def of_pack(facts: dict[str, Any], name: str, folder: str) -> Any:
    if name not in facts:
        pytest.skip(f"PACK TESTS SKIPPED: {folder} is not among the ComfyUI's custom_nodes (or lacks its packages)")
    return facts[name]


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_find_no_room_on_the_card_change_nothing(facts: dict[str, Any], way: str) -> None:
    told = facts["little room"][way]
    assert told["all"][0] == 0 and told["all"][1] > 100
    assert told["none"][0] == told["none"][1], "core has loaded weights that there was no room for"
    assert told["none"][2] == 2, "the LoRA is not applied at use"
    assert 0 < told["half"][0] < told["half"][1]
    assert told["none, error"] == told["half, error"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_weights(facts: dict[str, Any], kind: str) -> None:
    told = of_pack(facts, f"GGUF {kind}", "ComfyUI-GGUF")
    assert told["off"] and told["full"] == [8, 8] and told["spent"] == [8, told["decisions"].count("recompute")]
    assert "cache" in told["decisions"] and 0.0 < told["error"] < 0.5
    assert 0.0 < facts[f"GGUF {kind} against the source"] < {"Q8_0": 0.005, "Q4_0": 0.05}[kind]
    assert facts[f"GGUF {kind} in segments"] == [True, True]


def test_block_swap(facts: dict[str, Any]) -> None:
    told = of_pack(facts, "block swap", "ComfyUI-wanBlockswap")
    assert facts["block swap was called"] and facts["block swap does not change it"]
    assert told["off"] and "cache" in told["decisions"] and facts["block swap in segments"] == [True, True]


def test_guidance_branches_on_two_cards(facts: dict[str, Any]) -> None:
    assert facts["copies"] == 1
    told = facts["two cards"]
    assert told["off"] and told["full"] == [8, 16] and told["spent"] == [8, 2 * told["decisions"].count("recompute")]
    assert max(facts["two cards, error"].values()) < 1e-5
    for message in facts["two cards, refused"]:
        assert message.startswith("AR Segment Sampler: MultiGPU CFG Split is on the model")


def test_no_run_outlives_its_prompt(facts: dict[str, Any]) -> None:
    assert facts["nothing outlives it"] == []
