"""Shared by all tests: golden numbers and how many examples a property is tried on."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.fuzzing import CASES, summary

settings.register_profile("short", max_examples=50, deadline=None)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile("short")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many fuzz cases there were, by test and by what came of them, and loudly what could not be tested."""
    for line in summary():
        terminalreporter.write_line(line)
    skipped = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])}
    told = {found.group() for reason in skipped if (found := re.search(r"[A-Z]+ TESTS SKIPPED: .*", reason))}
    if importlib.util.find_spec("triton") is None:
        told.add("TRITON IS NOT INSTALLED: no kernel was tested; pip install -r requirements-dev.txt")
    for line in sorted(told):
        terminalreporter.section(line.partition(":")[0], red=True, bold=True)
        terminalreporter.write_line(line, red=True, bold=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes hands on its fuzz cases."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fuzz"] = [[*key, cases] for key, cases in CASES.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over the fuzz cases of one of several processes."""
    for test, outcome, cases in getattr(node, "workeroutput", {}).get("fuzz", []):
        CASES[test, outcome] += cases


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Reads ``tests/golden/<name>.json``: outputs of the public reference implementations."""
    folder = Path(__file__).parent / "golden"
    return lambda name: json.loads((folder / f"{name}.json").read_text())
