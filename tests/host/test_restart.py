"""A server that ends between two segments: started again, it makes the rest as if nothing had happened."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.host.comfy import ComfyServer
from tests.host.workflow_run import load_graph

FRAMES = 40


def graph(prefix: str) -> dict[str, Any]:
    """The streaming workflow, longer, with its latents and its report saved."""
    made = load_graph("tiny_stream")
    for node in made.values():
        node["inputs"] |= {"frames": FRAMES} if "frames" in node["inputs"] else {}
        node["inputs"] |= {"filename_prefix": prefix} if node["class_type"] == "ARVAStreamSegments" else {}
    made["latents"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": ["7", 0], "filename_prefix": "latents/restart"},
    }
    made["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["7", 2]}}
    return made


def ended_between_segments(server: ComfyServer, sign: signal.Signals, after: int) -> int:
    """Ends the server while it makes ``graph("cut/a")``, as soon as ``after`` segments or more are finished; returns
    how many were."""
    server.queue(graph("cut/a"))
    manifest = server.output_dir / "cut" / "a_00001_run" / "run.json"
    deadline = time.monotonic() + 120
    while finished(manifest) < after:
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.002)
    server.kill(sign)
    return finished(manifest)


def finished(manifest: Path) -> int:
    return len(json.loads(manifest.read_text())["segments"]) if manifest.exists() else 0


def made(server: ComfyServer, prefix: str) -> tuple[torch.Tensor, list[str]]:
    entry = server.run(graph(prefix), timeout=300)
    (saved,) = entry["outputs"]["latents"]["latents"]
    latents = load_file(server.output_dir / saved["subfolder"] / saved["filename"])["latent_tensor"]
    return latents, entry["outputs"]["report"]["text"][0].splitlines()


@pytest.mark.long
@pytest.mark.parametrize("signs", [(signal.SIGTERM,), (signal.SIGKILL, signal.SIGTERM)], ids=len)
def test_a_server_started_again_goes_on_after_the_last_finished_segment(
    comfy_root: Path, tmp_path: Path, signs: tuple[signal.Signals, ...]
) -> None:
    kept = 0
    for sign in signs:
        with ComfyServer(comfy_root, base=tmp_path / "base") as server:
            before, kept = kept, ended_between_segments(server, sign, kept + 2)
            assert before + 2 <= kept < FRAMES // 4
    with ComfyServer(comfy_root, base=tmp_path / "base") as server:
        latents, report = made(server, "cut/a")
        whole, _ = made(server, "whole/a")
    assert any(line.startswith(f"Resumed after {kept} finished segments in ") for line in report)
    assert torch.equal(latents, whole) and whole.std() > 0
    assert [path.name for path in (tmp_path / "base" / "output" / "cut").iterdir()] == ["a_00001_.mp4"]
