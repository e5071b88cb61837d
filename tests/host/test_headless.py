"""Without a browser: the Python example and the README's curl lines run as they are printed, and tell the truth."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest

from accel.timeline import Timeline
from tests.host.comfy import PACK_ROOT, ComfyServer
from tests.host.workflow_run import load_graph, nodes_of, with_saved_latents

EXAMPLE = PACK_ROOT / "headless" / "run_workflow.py"
ADDRESS = "127.0.0.1:8188"
FRAMES, BLOCK, STEPS = 12, 4, 4
CALLS = FRAMES // BLOCK * (STEPS + 1)


def run_example(server: ComfyServer, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), "--server", server.url.removeprefix("http://"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def example(server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the example printed, and the folder it filled."""
    folder = tmp_path_factory.mktemp("headless")
    done = run_example(server, "--set", f"4.frames={FRAMES}", "--set", "5.seed=11", "--target", "made", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder / "made"


@pytest.fixture(scope="module")
def timeline(example: tuple[str, Path]) -> dict[str, Any]:
    (path,) = example[1].glob("*.json")
    return json.loads(path.read_text())


def test_progress_is_counted_in_the_guided_calls_of_the_timeline(
    example: tuple[str, Path], timeline: dict[str, Any]
) -> None:
    ticks = [(int(a), int(b)) for a, b in re.findall(r"^AR Segment Sampler: (\d+)/(\d+)$", example[0], re.MULTILINE)]
    calls = sum(timeline["totals"]["calls"].values())
    assert calls == len(timeline["records"]) == timeline["columns"] == CALLS
    assert {total for _, total in ticks} == {calls}
    assert [value for value, _ in ticks] == sorted({value for value, _ in ticks}) and ticks[-1] == (calls, calls)


def test_the_report_is_printed_and_saved(example: tuple[str, Path], timeline: dict[str, Any]) -> None:
    printed, folder = example
    report = Timeline.from_json(json.dumps(timeline)).summary()
    assert (folder / "report.txt").read_text() == report + "\n"
    assert report in printed


def test_video_and_timeline_are_fetched(example: tuple[str, Path]) -> None:
    printed, folder = example
    (video,), (picture,) = folder.glob("*.mp4"), folder.glob("*.svg")
    with av.open(str(video)) as container:
        assert len(list(container.decode(video=0))) == FRAMES
    assert "<svg" in picture.read_text()
    saved = {Path(path).name for path in re.findall(r"^saved (.+)$", printed, re.MULTILINE)}
    assert saved == {path.name for path in folder.iterdir()} and len(saved) == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["5.history_noise=0.5"], "AR Segment Sampler: history_noise is 0.5, but causal blocks keep clean history"),
        (["2.text=red cube"], "refused"),
        (["5.steeps=9"], "the workflow has no input '5.steeps'"),
    ],
)
def test_the_example_ends_with_one_and_says_why(
    server: ComfyServer, settings: list[str], words: str, tmp_path: Path
) -> None:
    done = run_example(server, *(word for setting in settings for word in ("--set", setting)), cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr and "Traceback" not in done.stderr


def test_report_and_timeline_are_string_outputs(server: ComfyServer) -> None:
    graph = with_saved_latents(load_graph("tiny_causal"))
    (sampler,), (shown,), (latent,) = (
        nodes_of(graph, kind) for kind in ("ARVASegmentSampler", "ARVATimeline", "ARVATinyLatent")
    )
    graph[latent]["inputs"]["frames"] = FRAMES
    for name, source in {"report": [sampler, 2], "same report": [shown, 0], "json": [shown, 1]}.items():
        graph[name] = {"class_type": "PreviewAny", "inputs": {"source": source}}
    made = server.run(graph)["outputs"]
    assert made["report"]["text"] == made["same report"]["text"] == made[shown]["text"]
    assert made["json"]["text"][0] == saved_timeline(server, made[shown])


def saved_timeline(server: ComfyServer, shown: dict[str, Any]) -> str:
    """The JSON file that an AR Timeline's output names."""
    saved = shown["arva_timeline"][0]["json"]
    return (server.output_dir / saved["subfolder"] / saved["filename"]).read_text()


def readme_block(word: str) -> str:
    """The indented block with ``word`` in the README's section on working without a browser."""
    section = re.search(r"^## Without a browser\n(.*?)^## ", (PACK_ROOT / "README.md").read_text(), re.M | re.S)
    blocks = re.findall(r"(?:^    .*\n)+", section.group(1), re.MULTILINE)
    (found,) = (block for block in blocks if word in block)
    return re.sub("^    ", "", found, flags=re.MULTILINE)


def test_the_python_line_of_the_readme_works(server: ComfyServer, tmp_path: Path) -> None:
    program, script, *arguments = readme_block("headless/").split()
    assert program == "python" and PACK_ROOT / script == EXAMPLE
    workflow = PACK_ROOT / arguments.pop()
    done = run_example(server, *arguments, str(workflow), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "48 latent frames" in (tmp_path / "made" / "report.txt").read_text()


def test_the_curl_lines_of_the_readme_work(server: ComfyServer, tmp_path: Path) -> None:
    if not (shutil.which("curl") and shutil.which("bash")):
        pytest.skip("CURL TEST SKIPPED: curl or bash is not on this machine")
    server.free()  # nothing is served from the node cache, and the last line's file is the first of its name
    shutil.rmtree(server.output_dir / "timeline", ignore_errors=True)
    shutil.copytree(PACK_ROOT / "workflows" / "api", tmp_path / "workflows" / "api")
    lines = readme_block("curl").replace(ADDRESS, server.url.removeprefix("http://"))
    assert ADDRESS not in lines
    done = subprocess.run(
        ["bash", "-euc", lines + "\necho\necho $id"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *printed, prompt_id = done.stdout.strip().splitlines()
    entry = server.history(prompt_id)
    assert entry["status"]["status_str"] == "success"
    (shown,) = (shown for shown in entry["outputs"].values() if "arva_timeline" in shown)
    assert (tmp_path / "timeline.json").read_text() == saved_timeline(server, shown)
    assert json.dumps(shown["text"][0]).strip('"') in "\n".join(printed)
