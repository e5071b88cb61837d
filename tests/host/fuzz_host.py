"""A ComfyUI process that executes fuzz cases one after the other; a case that hangs or kills it is a fault."""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from demo.model import TinyConfig, TinyWan, save_model
from tests.host.comfy import PACK_ROOT, comfy_python, host_environment, make_base_directory
from tests.host.inprocess import BOOTSTRAP

WORKER = Path(__file__).with_name("fuzz_worker.py")
START_SECONDS, CASE_SECONDS = 240.0, 30.0
SMALL = {"dim": 48, "ffn_dim": 64, "num_layers": 2, "num_heads": 2}


class FuzzHost:
    """For the length of a ``with`` block.

    Attributes:
        nodes: what every node of the pack says of itself, by id: ``title``, ``inputs`` and ``outputs``. cases: the
            strategies made from that.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nodes: dict[str, dict[str, Any]] = {}
        self.cases: Any = None
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> FuzzHost:
        self._folder = tempfile.TemporaryDirectory(prefix="comfy-fuzz-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name).resolve()
        self.base, self.work = folder / "base", folder / "work"
        self.work.mkdir()
        self.links = make_base_directory(self.base, [PACK_ROOT])
        self.checkpoints = [folder / "fuzz-frames.safetensors", folder / "fuzz-causal.safetensors"]
        torch.manual_seed(0)
        for path, causal in zip(self.checkpoints, (False, True), strict=True):
            kind = "tiny-causal" if causal else "tiny-df"
            save_model(TinyWan(TinyConfig(**SMALL, kind=kind, causal_ar=causal)), path)
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
        self._folder.cleanup()

    def run(self, node: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """What came of executing ``node`` with ``inputs``, see ``fuzz_worker.answer``."""
        if self._process is None:
            self._start()
        self._process.stdin.write(json.dumps({"node": node, "inputs": inputs}) + "\n")
        self._process.stdin.flush()
        answer = self._answer(CASE_SECONDS)
        if answer is None:
            code = self._process.poll()
            self._stop()
            how = f"no answer within {CASE_SECONDS:g} s" if code is None else f"the process ended with {code}"
            return {"outcome": "fault", "type": "Hang", "message": how, "strays": [], "seconds": CASE_SECONDS}
        return json.loads(answer)

    def _start(self) -> None:
        command = [str(comfy_python(self.root)), str(BOOTSTRAP), "--root", str(self.root), "--base", str(self.base)]
        command += [*(f"--pack={link}" for link in self.links), "--nodes", "nodes_ar_video.py", str(WORKER)]
        self._log = (Path(self._folder.name) / "worker.log").open("a")
        self._process = subprocess.Popen(
            [*command, *map(str, self.checkpoints)], cwd=self.work, env=host_environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()
        hello = self._answer(START_SECONDS)
        if hello is None:
            log = Path(self._log.name).read_text()[-4000:]
            self._stop()
            raise RuntimeError(f"The host did not start.\n{log}")
        self.nodes = {told["node"]: told for told in json.loads(hello)}

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def _answer(self, seconds: float) -> str | None:
        try:
            return self._lines.get(timeout=seconds) or None
        except queue.Empty:
            return None

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._log.close()
        self._process = None
