"""Runs a Python file with the host's interpreter inside ComfyUI's process and returns the JSON it printed last."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.host.comfy import PACK_ROOT, comfy_python, find_comfy, host_environment, make_base_directory

BOOTSTRAP = Path(__file__).absolute().with_name("run_in_comfy.py")
WARM_SECONDS = 300.0


class ScriptError(RuntimeError):
    """The script, or the host before it, failed; the message ends with what it wrote."""


def run_in_process(
    script: Path,
    *args: str,
    root: Path | None = None,
    pack: Path | None = PACK_ROOT,
    core_nodes: str | Sequence[str] = "all",
    timeout: float = 300.0,
    base: Path | None = None,
    bytecode: Path | None = None,
    warm: bool = True,
) -> Any:
    """Runs ``script`` in a fresh ComfyUI process and returns the JSON on the last line it printed.

    The script finds ``comfy`` importable, ``nodes.NODE_CLASS_MAPPINGS`` filled and, through
    ``from run_in_comfy import pack_module``, the pack as core's loader imported it. Its working directory is an empty
    folder, and models, input and output lie in a throwaway base directory.

    Args:
        script: the Python file; it runs as ``__main__``.
        args: its command line.
        root: the ComfyUI checkout; found when None.
        pack: the custom node pack to load, None for none.
        core_nodes: ``"all"``, or the files of ``comfy_extras`` to load (fewer load faster), e.g. ``["nodes_wan.py"]``.
        timeout: seconds until the process is ended.
        base: the base directory, kept afterwards, where a later process goes on; a throwaway one when None.
        bytecode: folder that Python keeps compiled modules in, as it does beside them for users; None for one that
            warm processes share, and otherwise leaves it to the environment.
        warm: whether the process is forked from one that has imported ComfyUI's packages (`WarmHost`), where the
            system can; one that is started takes ten seconds more.

    Raises:
        ScriptError: it failed, or its last line is no JSON.
    """
    root = root or find_comfy()
    if root is None:
        raise ScriptError("No ComfyUI found; set COMFYUI_PATH.")
    chosen = core_nodes if isinstance(core_nodes, str) else ",".join(core_nodes) or "none"
    with tempfile.TemporaryDirectory(prefix="comfy-test-", ignore_cleanup_errors=True) as folder:
        base, work = base or Path(folder).resolve() / "base", Path(folder).resolve() / "work"
        work.mkdir()
        links = make_base_directory(base, [pack] if pack else [])
        arguments = ["--root", str(root), "--base", str(base), *(f"--pack={link}" for link in links)]
        arguments += ["--nodes", chosen, str(script.absolute()), *args]
        if warm and hasattr(os, "fork"):
            return _last_line(warm_host(comfy_python(root)).run(arguments, work, timeout, bytecode))
        environment = host_environment()
        if bytecode is not None:
            environment |= {"PYTHONPYCACHEPREFIX": str(bytecode), "PYTHONDONTWRITEBYTECODE": ""}
        command = [str(comfy_python(root)), str(BOOTSTRAP), *arguments]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=timeout)
    return _last_line(done)


class WarmHost:
    """A process of the host's interpreter that has imported the packages ComfyUI needs, and nothing of ComfyUI, and
    forks itself for each script: ten seconds of a start once and not each time.

    Attributes:
        imported: names of all modules that a forked process starts with.
    """

    def __init__(self, python: Path) -> None:
        self.served = subprocess.Popen(
            [str(python), str(BOOTSTRAP), "--warm"], env=host_environment(), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
        )  # fmt: skip
        self.bytecode = tempfile.TemporaryDirectory(prefix="comfy-test-", ignore_cleanup_errors=True)
        self.imported: list[str] = self._answer(WARM_SECONDS)["imported"]

    def run(
        self, arguments: list[str], folder: Path, timeout: float, bytecode: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs ``run_in_comfy.py`` with these arguments in ``folder``.

        Raises:
            subprocess.TimeoutExpired: it took longer and was killed.
        """
        written = {name: folder.parent / name for name in ("stdout", "stderr")}
        request = {name: str(path) for name, path in written.items()}
        request |= {"argv": arguments, "folder": str(folder), "environment": host_environment()}
        request["bytecode"] = str(bytecode or self.bytecode.name)
        self.served.stdin.write(json.dumps(request).encode() + b"\n")
        child = self._answer(WARM_SECONDS)["pid"]
        try:
            code = self._answer(timeout)["code"]
        except subprocess.TimeoutExpired:
            os.kill(child, signal.SIGKILL)
            self._answer(WARM_SECONDS)
            raise
        texts = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in written.items()}
        return subprocess.CompletedProcess(arguments, code, **texts)

    def _answer(self, timeout: float) -> dict[str, Any]:
        if not select.select([self.served.stdout], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.served.args, timeout)
        line = self.served.stdout.readline()
        if not line:
            raise ScriptError(f"The host's interpreter ended with exit code {self.served.wait()}.")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.served.stdin.close()
        self.served.wait()
        self.bytecode.cleanup()


@cache
def warm_host(python: Path) -> WarmHost:
    """The one that serves all scripts of this process; it ends with it."""
    host = WarmHost(python)
    atexit.register(host.close)
    return host


def _last_line(done: subprocess.CompletedProcess[str]) -> Any:
    if done.returncode:
        raise ScriptError(f"The script ended with exit code {done.returncode}.\n{done.stdout}\n{done.stderr}")
    lines = done.stdout.strip().splitlines() or [""]
    try:
        return json.loads(lines[-1])
    except json.JSONDecodeError:
        raise ScriptError(f"The last line is no JSON: {lines[-1]!r}.\n{done.stdout}\n{done.stderr}") from None
