"""Runs the vitest tests of ``web/``: timeline logic, drawing and the widget."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def test_the_modules_of_web_pass_their_own_tests(loudly_skip) -> None:
    node, vitest = shutil.which("node"), HERE / "node_modules" / "vitest" / "vitest.mjs"
    if node is None:
        loudly_skip("there is no node on this machine")
    if not vitest.exists():
        loudly_skip("vitest is not installed; make test installs it where there is npm")
    environment = {**os.environ, "NO_COLOR": "1", "CI": "1"}
    done = subprocess.run([node, vitest, "run"], cwd=HERE, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
