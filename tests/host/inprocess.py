"""Runs a Python file with the host's interpreter inside ComfyUI's process and returns the JSON it printed last."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.host.comfy import PACK_ROOT, comfy_python, find_comfy, host_environment, make_base_directory

BOOTSTRAP = Path(__file__).absolute().with_name("run_in_comfy.py")


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
        bytecode: folder that Python keeps compiled modules in, as it does beside them for users; None leaves that to
            the environment.

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
        command = [str(comfy_python(root)), str(BOOTSTRAP), "--root", str(root), "--base", str(base)]
        command += [*(f"--pack={link}" for link in links), "--nodes", chosen, str(script.absolute()), *args]
        environment = host_environment()
        if bytecode is not None:
            environment |= {"PYTHONPYCACHEPREFIX": str(bytecode), "PYTHONDONTWRITEBYTECODE": ""}
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=timeout)
    return _last_line(done)


def _last_line(done: subprocess.CompletedProcess[str]) -> Any:
    if done.returncode:
        raise ScriptError(f"The script ended with exit code {done.returncode}.\n{done.stdout}\n{done.stderr}")
    lines = done.stdout.strip().splitlines() or [""]
    try:
        return json.loads(lines[-1])
    except json.JSONDecodeError:
        raise ScriptError(f"The last line is no JSON: {lines[-1]!r}.\n{done.stdout}\n{done.stderr}") from None
