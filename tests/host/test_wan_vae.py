"""Stream Segments with core's Wan 2.1 VAE, whose decoder is carried on from segment to segment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.host.inprocess import run_in_process
from tests.host.test_stream import checkpoint

SCRIPT = Path(__file__).with_name("wan_vae_runs.py")


@pytest.fixture(scope="module")
def facts(comfy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = checkpoint(tmp_path_factory.mktemp("wan-vae"), "tiny-df")
    return run_in_process(SCRIPT, file, root=comfy_root, core_nodes=[])


@pytest.mark.parametrize("size", [1, 3, 4, 14])
def test_a_video_decoded_segment_by_segment_is_the_video_decoded_at_once(facts: dict[str, Any], size: int) -> None:
    difference, spread = facts[f"segments of {size}"]
    assert difference < 1e-5 and spread > 0.01


def test_latent_frames_decoded_again_are_not_the_same(facts: dict[str, Any]) -> None:
    difference, spread = facts["context"]
    assert difference > 0.1 * spread, "otherwise carrying the features on would be for nothing"


def test_a_resumed_decoder_goes_on_where_it_stood(facts: dict[str, Any]) -> None:
    assert facts["resumed"][0] < 1e-5
    assert facts["kind"] == ["carried", 1], "a latent frame without its pair waits"


def test_features_wait_in_main_memory_and_the_vae_is_left_as_it_was(facts: dict[str, Any]) -> None:
    assert facts["devices"] == ["cpu"] and facts["vae kept"] == "WanVAE" and facts["others"] is False


def test_out_of_memory_goes_on_in_tiles(facts: dict[str, Any]) -> None:
    assert facts["tiled"] == [True, "context 4"]


def test_a_run_streams_the_whole_decode_and_so_does_one_that_was_cut_off(facts: dict[str, Any]) -> None:
    assert facts["streamed"][0] < 1e-5 and facts["gone on"][0] < 1e-5
    assert len(facts["pieces"]) >= 2 and facts["kept"] >= 1 and facts["line"].startswith("Resumed after ")
