"""Segments leave as they finish, and a run that was cut off goes on bit by bit, in the real ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from demo.model import TinyConfig, TinyWan, save_model
from tests.host.inprocess import ScriptError, run_in_process

SCRIPT = Path(__file__).with_name("stream_runs.py")


def checkpoint(folder: Path, kind: str) -> str:
    torch.manual_seed(0)
    path = folder / f"{kind}.safetensors"
    save_model(TinyWan(TinyConfig(kind=kind, causal_ar=kind == "tiny-causal", num_layers=2)), path)
    return str(path)


@pytest.fixture(scope="module")
def facts(comfy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = checkpoint(tmp_path_factory.mktemp("stream"), "tiny-df")
    return run_in_process(SCRIPT, "cases", file, root=comfy_root, core_nodes=[])


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_a_streamed_video_is_the_whole_decode_and_leaves_nothing_else(facts: dict[str, Any], kind: str) -> None:
    made = facts[kind]
    assert made["latents"] and made["near"] and made["frames"] == 24
    assert made["files"] == [f"whole_{kind}_00001_.{kind}"]
    assert made["line"].startswith("Video: ") and made["line"].endswith(f"whole_{kind}_00001_.{kind}")
    assert made["ui"] == [{"filename": f"whole_{kind}_00001_.{kind}", "subfolder": "", "type": "output"}]
    assert made["pieces"] == [8, 6, 6, 6, 6], "each segment with two latent frames before it"


def test_the_tiny_codec_decodes_piece_by_piece_what_it_decodes_at_once(facts: dict[str, Any]) -> None:
    assert facts["decoded piece by piece"] == [True, [8, 4, 4, 4, 4]]


def test_without_a_vae_the_latents_are_kept_as_core_saves_them(facts: dict[str, Any]) -> None:
    equal, line, ui, files = facts["latents alone"]
    assert equal and line.startswith("Latents: ") and ui is None
    assert files == ["deep/latents_00001_.latent"]


def test_a_cancelled_run_keeps_what_is_finished_and_goes_on(facts: dict[str, Any]) -> None:
    assert facts["after cancel"] == ["cancelled_00001_.mp4", "cancelled_00001_run"]
    assert facts["video after cancel"] == [12, True]
    resumed = facts["resumed"]
    assert resumed["latents"] and resumed["calls"] and resumed["flops"] and resumed["near"]
    assert resumed["lines"][0].startswith("Resumed after 2 finished segments in ")
    assert resumed["files"] == ["cancelled_00001_.mp4"] and resumed["frames"] == 24
    assert resumed["pieces"] == [8, 6, 6, 6, 6], "no segment is decoded twice"
    assert resumed["first tick"] == 8 + 6 + 1 and resumed["last tick"] == 8 + 6 * 4
    assert facts["cancelled before anything was finished"] == []


def test_a_run_with_other_settings_starts_anew_and_says_what_differs(facts: dict[str, Any]) -> None:
    line, files = facts["another seed"]
    assert line.startswith("Started anew: Checkpoint: ") and "settings seed is 8, was 7; noise is another one" in line
    assert files == ["other_00001_.mp4", "other_00001_run", "other_00002_.mp4"]
    assert facts["resume off"].endswith("other_00003_.mp4")


def test_another_format_makes_the_video_again_from_the_saved_latents(facts: dict[str, Any]) -> None:
    equal, line, frames, near = facts["another format"]
    assert equal and near and frames == 24 and line.startswith("Resumed after 2 ")


def test_a_state_every_other_segment_makes_the_last_one_again(facts: dict[str, Any]) -> None:
    equal, line, frames, near = facts["every two"]
    assert equal and near and frames == 24 and line.startswith("Resumed after 2 ")


def test_a_vae_that_runs_out_of_memory_costs_no_finished_segment(facts: dict[str, Any]) -> None:
    assert [Path(path).name for path in facts["after out of memory"]][-1] == "segment-00002.safetensors"
    equal, line, frames, near = facts["after broken"]
    assert equal and near and frames == 24 and line.startswith("Resumed after 3 ")
    assert facts["nothing left"] == [None, [], []]


def test_a_vae_that_pushes_the_model_out_of_memory_changes_nothing(facts: dict[str, Any]) -> None:
    assert facts["evicted"]


def test_a_vae_for_pictures_is_refused_before_sampling(facts: dict[str, Any]) -> None:
    (message,) = facts["refused"]
    assert message.startswith("Stream Segments: vae decodes 16 channels in 2 dimensions")


def test_a_process_killed_in_the_seventh_segment_goes_on_after_six(comfy_root: Path, tmp_path: Path) -> None:
    file, base = checkpoint(tmp_path, "tiny-causal"), tmp_path / "base"
    with pytest.raises(ScriptError, match="exit code -9"):
        run_in_process(SCRIPT, "killed", file, root=comfy_root, core_nodes=[], base=base)
    facts = run_in_process(SCRIPT, "go on", file, root=comfy_root, core_nodes=[], base=base)
    frames, segments, states = facts["before"]
    assert (frames, segments) == (24, 6)
    assert states == ["killed_00001_run/state-00006.safetensors"]
    assert facts["line"].startswith("Resumed after 6 finished segments in ")
    assert facts["latents"] and facts["calls"] and facts["near"] and facts["frames"] == 32
    assert facts["files"] == ["killed_00001_.mp4"]
