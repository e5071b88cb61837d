"""A script runs inside ComfyUI's process, with core's nodes and a pack loaded by core's own loader."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.host.comfy import comfy_python
from tests.host.inprocess import ScriptError, run_in_process, warm_host

PACK = """
from comfy_api.latest import ComfyExtension, io
from .inner import WORD


class Echo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Echo", inputs=[io.String.Input("text")], outputs=[io.String.Output()])

    @classmethod
    def execute(cls, text):
        return io.NodeOutput(text + WORD)


class Extension(ComfyExtension):
    async def get_node_list(self):
        return [Echo]


async def comfy_entrypoint():
    return Extension()
"""
SCRIPT = """
import importlib, json, os, sys
import comfy.sd, nodes
from comfy.cli_args import args
from run_in_comfy import pack_module

inner = importlib.import_module(".inner", pack_module().__name__)
print("not the answer")
print(json.dumps({
    "argv": sys.argv[1:], "cpu": args.cpu, "files": os.listdir("."), "word": inner.WORD,
    "echo": nodes.NODE_CLASS_MAPPINGS["Echo"].execute("a")[0], "ar": "SamplerARVideo" in nodes.NODE_CLASS_MAPPINGS,
    "first": os.path.exists(os.path.join(sys.path[0], "main.py")), "modules": sorted(sys.modules),
}))
"""
KILLED = """
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    folder = tmp_path / "echo.pack"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACK)
    (folder / "inner.py").write_text('WORD = "!"')
    return folder


def write(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("core_nodes", "warm"), [("all", True), (["nodes_ar_video.py"], False)])
def test_a_script_sees_the_host_and_the_pack(
    comfy_root: Path, tmp_path: Path, pack: Path, core_nodes: str | list[str], warm: bool
) -> None:
    script = write(tmp_path, SCRIPT)
    answer = run_in_process(script, "--seed", "3", root=comfy_root, pack=pack, core_nodes=core_nodes, warm=warm)
    modules = answer.pop("modules")
    assert answer == {
        "argv": ["--seed", "3"],
        "cpu": True,
        "files": [],
        "word": "!",
        "echo": "a!",
        "ar": True,
        "first": True,
    }
    if not warm:
        check_a_warm_host(comfy_root, tmp_path, modules)


def check_a_warm_host(comfy_root: Path, tmp_path: Path, modules: list[str]) -> None:
    """It has nothing imported that ComfyUI, which imported ``modules``, does not import by itself, and nothing of
    ComfyUI; a process that is killed or takes too long leaves it as it was."""
    host = warm_host(comfy_python(comfy_root))
    arguments = ["--root", str(comfy_root), "--base", str(tmp_path / "base"), "--nodes", "none"]
    folder = tmp_path / "work"
    folder.mkdir()
    assert "torch" in host.imported and set(host.imported) <= set(modules)
    assert not [name for name in host.imported if name.split(".")[0] in ("comfy", "comfy_api", "nodes", "server")]
    assert host.run([*arguments, str(write(tmp_path, KILLED))], folder, 60.0).returncode == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        host.run([*arguments, str(write(tmp_path, "import time\ntime.sleep(60)"))], folder, 0.5)
    done = host.run([*arguments, str(write(tmp_path, "print(6 * 7)"))], folder, 60.0)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr


def test_a_pack_that_core_cannot_load_is_an_error_with_the_reason(comfy_root: Path, tmp_path: Path, pack: Path) -> None:
    (pack / "inner.py").write_text("raise ImportError('broken on purpose')")
    with pytest.raises(ScriptError, match="broken on purpose"):
        run_in_process(write(tmp_path, SCRIPT), root=comfy_root, pack=pack, core_nodes=[])


def test_a_script_that_ends_without_json_is_an_error(comfy_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match="'done'"):
        run_in_process(write(tmp_path, "print('done')"), root=comfy_root, pack=None, core_nodes=[])
