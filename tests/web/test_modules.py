"""Runs the vitest tests of ``web/``: timeline logic, drawing and the widget."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fuzzing import counted

HERE = Path(__file__).parent


FUZZED = re.compile(r"fuzz outcomes: (\d+) shown, (\d+) refused")


@pytest.mark.parametrize("cases", [300, pytest.param(5000, marks=pytest.mark.long)])
def test_the_modules_of_web_pass_their_own_tests(loudly_skip, cases: int) -> None:
    node, vitest = shutil.which("node"), HERE / "node_modules" / "vitest" / "vitest.mjs"
    if node is None:
        loudly_skip("there is no node on this machine")
    if not vitest.exists():
        loudly_skip("vitest is not installed; make test installs it where there is npm")
    environment = {**os.environ, "NO_COLOR": "1", "CI": "1", "ARVA_FUZZ_CASES": str(cases)}
    done = subprocess.run([node, vitest, "run"], cwd=HERE, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    shown, refused = map(int, FUZZED.search(done.stdout).groups())
    counted("timelines in the browser", "shown", shown)
    counted("timelines in the browser", "refused", refused)
