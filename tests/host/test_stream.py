"""Segments leave as they finish, and a run that was cut off goes on bit by bit, in the real ComfyUI."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from demo.model import TinyConfig, TinyWan, save_model
from tests.host.comfy import ComfyServer, PromptError, PromptInterrupted
from tests.host.inprocess import ScriptError, run_in_process
from tests.host.workflow_run import load_graph

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


def test_a_video_decoded_piece_by_piece_is_the_video_decoded_at_once(facts: dict[str, Any]) -> None:
    assert facts["codec piece by piece"] == [True, [8, 4, 4, 4, 4]]
    assert facts["strided piece by piece"] == [True, [29, 16, 16, 16, 16]]


def test_a_batch_makes_a_video_a_clip(facts: dict[str, Any]) -> None:
    assert facts["clips"] == [True, True]


def test_without_a_vae_the_latents_are_kept_as_core_saves_them(facts: dict[str, Any]) -> None:
    equal, line, ui, files = facts["latents alone"]
    assert equal and line.startswith("Latents: ") and ui is None
    assert files == ["deep/latents_00001_.latent"]


def test_a_cancelled_run_keeps_what_is_finished_and_goes_on(facts: dict[str, Any]) -> None:
    assert facts["after cancel"] == ["cancelled_00001_.mp4", "cancelled_00001_run"]
    assert facts["video after cancel"] == [12, True] and facts["state after cancel"] == []
    assert facts["torn video"] == [True, True], "a torn last piece costs that piece alone"
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
    line = facts["history guidance"]
    assert line.startswith("Started anew: ") and "settings history_guidance is 0.5, was None" in line
    assert facts["resume off"].endswith("other_00004_.mp4")


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
    equal, line, frames, near = facts["after the end"]
    assert equal and near and frames == 24 and line.startswith("Resumed after 5 "), "cut off behind the last segment"
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
    equal, calls, line, frames, near = facts["start image"]
    assert equal and calls and near and frames == 14 and line.startswith("Resumed after 2 ")


def graph(prefix: str, **changes: Any) -> dict[str, Any]:
    made = load_graph("tiny_stream")
    for node in made.values():
        changed = {"filename_prefix": prefix} if node["class_type"] == "ARVAStreamSegments" else {}
        node["inputs"] |= {key: value for key, value in changes.items() if key in node["inputs"]} | changed
    return made


def streamed(server: ComfyServer, entry: dict[str, Any]) -> Path:
    (video,) = entry["outputs"]["7"]["images"]
    return server.output_dir / video["subfolder"] / video["filename"]


def test_the_same_graph_queued_twice_streams_one_video(server: ComfyServer) -> None:
    first, second = (server.run(graph("twice/a", frames=12)) for _ in range(2))
    (cached,) = server.events_of(second["prompt_id"], "execution_cached")
    assert {"6", "7"} <= set(cached["nodes"]) and second["outputs"]["8"] == first["outputs"]["8"]
    assert [path.name for path in (server.output_dir / "twice").iterdir()] == ["a_00001_.mp4"]
    assert server.get("/view?filename=a_00001_.mp4&subfolder=twice") == streamed(server, first).read_bytes()
    with av.open(str(streamed(server, first))) as video:
        assert json.loads(video.metadata["prompt"])["7"]["class_type"] == "ARVASegmentSampler"


def test_a_run_interrupted_on_the_server_goes_on_and_says_so(server: ComfyServer) -> None:
    long = graph("cut/a", frames=120, steps=6, seed=3) | {
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["7", 2]}}
    }
    prompt = server.queue(long)
    folder = server.output_dir / "cut" / "a_00001_run"
    deadline = time.monotonic() + 60
    while not (folder / "segment-00002.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    server.interrupt(prompt)
    with pytest.raises(PromptInterrupted):
        server.wait(prompt)
    kept = len(list(folder.glob("segment-*")))
    assert 3 <= kept < 30 and "finished segments are kept; queue again with resume" in server.log()
    entry = server.run(long)
    (report,) = entry["outputs"]["report"]["text"]
    assert f"Resumed after {kept} finished segments" in report and f"Video: {streamed(server, entry)}" in report
    assert not folder.exists()


def test_a_prefix_that_leads_out_of_the_output_folder_is_refused(server: ComfyServer) -> None:
    with pytest.raises(PromptError, match="Stream Segments: filename_prefix '../a' leads out of"):
        server.queue(graph("../a"))
