"""Models compiled by core's Torch Compile Model give the same video in our loops, inside ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .inprocess import run_in_process
from .test_nodes import checkpoints  # noqa: F401

pytestmark = pytest.mark.long
SCRIPT = Path(__file__).with_name("compile_runs.py")
CASES = (
    "plain", "suffix window", "frozen K/V", "next clip", "core's store", "bounded store", "history guidance",
    "history guidance, store",
)  # fmt: skip


@pytest.fixture(scope="module")
def host(comfy_root: Path, checkpoints) -> dict[str, Any]:  # noqa: F811
    """Facts of ``compile_runs.py``, which counts graphs in the place of a compiler."""
    if not (comfy_root / "comfy_extras" / "nodes_torch_compile.py").exists():
        pytest.skip("THIS COMFYUI HAS NO Torch Compile Model: compiled models are not checked inside it")
    files = [str(checkpoints["frames"]), str(checkpoints["causal"]), "count"]
    extras = ["nodes_ar_video.py", "nodes_torch_compile.py"]
    return run_in_process(SCRIPT, *files, root=comfy_root, core_nodes=extras, timeout=1500)


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_model_makes_the_same_video_in_the_same_calls(host, name) -> None:
    told = host[name]
    assert "error" not in told, told
    assert told["difference"] < 1e-5 and told["same calls"]


@pytest.mark.parametrize("name", ["plain", "suffix window", "next clip", "core's store", "history guidance"])
def test_it_is_compiled_for_kinds_of_forwards_and_not_for_steps(host, name) -> None:
    assert 1 <= host[name]["graphs"] <= 8
