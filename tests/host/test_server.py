"""The harness drives a real ComfyUI server: it answers, runs graphs, reports failures, and can be interrupted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.host.comfy import PACK_NAME, PACK_ROOT, ComfyServer, PromptError, PromptInterrupted, find_comfy

INVERT = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 8, "batch_size": 1, "color": 0xFF0000}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "inverted"}},
}
SLOW_NODE = '''
import time
import comfy.model_management


class Slow:
    """Sleeps until it is interrupted."""
    INPUT_TYPES = classmethod(lambda cls: {"required": {"seconds": ("INT", {"default": 60})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "testing"

    def run(self, seconds):
        for _ in range(seconds * 100):
            time.sleep(0.01)
            comfy.model_management.throw_exception_if_processing_interrupted()
        raise ValueError("nobody interrupted")


NODE_CLASS_MAPPINGS = {"Slow": Slow}
'''


def slow(seconds: int) -> dict:
    return {"1": {"class_type": "Slow", "inputs": {"seconds": seconds}}}


@pytest.fixture(scope="module")
def slow_server(comfy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    pack = tmp_path_factory.mktemp("packs") / "slow-pack"
    pack.mkdir()
    (pack / "__init__.py").write_text(SLOW_NODE)
    with ComfyServer(comfy_root, packs=[pack]) as running:
        yield running


def test_core_nodes_are_offered(server: ComfyServer) -> None:
    assert {"SamplerARVideo", "EmptyARVideoLatent", "SamplerCustomAdvanced"} <= server.object_info().keys()
    assert server.object_info("NoSuchNode") == {}


def test_the_host_imports_the_pack_and_all_of_its_own_nodes(server: ComfyServer) -> None:
    assert PACK_NAME in server.log()
    if not (PACK_ROOT / "__init__.py").exists():
        pytest.skip("the pack has no __init__.py")
    assert server.failed_imports() == []


def test_a_graph_runs_and_leaves_its_image(server: ComfyServer) -> None:
    entry = server.run(INVERT)
    (saved,) = entry["outputs"]["3"]["images"]
    with Image.open(server.output_dir / saved["subfolder"] / saved["filename"]) as image:
        assert image.size == (16, 8)
        assert image.convert("RGB").getpixel((0, 0)) == (0, 255, 255)


def test_events_tell_the_course_of_a_prompt(server: ComfyServer) -> None:
    prompt_id = server.run(INVERT)["prompt_id"]
    told = [event for event in server.events if isinstance(event["data"], dict)]
    kinds = [event["type"] for event in told if event["data"].get("prompt_id") == prompt_id]
    assert kinds[0] == "execution_start"
    assert "execution_success" in kinds
    assert server.events_of(prompt_id, "executing")[-1]["node"] is None


def test_an_unknown_node_is_a_prompt_error(server: ComfyServer) -> None:
    with pytest.raises(PromptError, match="NoSuchNode"):
        server.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_a_value_out_of_range_is_a_prompt_error_that_names_the_node(server: ComfyServer) -> None:
    graph = {**INVERT, "1": {**INVERT["1"], "inputs": {**INVERT["1"]["inputs"], "width": 0}}}
    with pytest.raises(PromptError, match=r"node 1 \(EmptyImage\).*width"):
        server.run(graph)


def test_an_exception_in_a_node_is_a_prompt_error_with_its_message(slow_server: ComfyServer) -> None:
    with pytest.raises(PromptError, match="nobody interrupted") as caught:
        slow_server.run(slow(0))
    assert caught.value.details["node_type"] == "Slow"


def test_interrupt_stops_the_running_prompt(slow_server: ComfyServer) -> None:
    prompt_id = slow_server.queue(slow(60))
    while not slow_server.events_of(prompt_id, "executing"):
        time.sleep(0.01)
    slow_server.interrupt(prompt_id)
    with pytest.raises(PromptInterrupted):
        slow_server.wait(prompt_id, timeout=10)


def test_a_prompt_that_takes_too_long_is_interrupted(slow_server: ComfyServer) -> None:
    prompt_id = slow_server.queue(slow(61))
    with pytest.raises(TimeoutError):
        slow_server.wait(prompt_id, timeout=0.5)
    with pytest.raises(PromptInterrupted):
        slow_server.wait(prompt_id, timeout=10)


def test_a_server_that_cannot_start_says_why(comfy_root: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-flag"), ComfyServer(comfy_root, extra_args=["--no-such-flag"]):
        pass


def test_find_comfy_refuses_a_path_without_comfy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="COMFYUI_PATH"):
        find_comfy()
