"""Shared by all tests: golden numbers and how many examples a property is tried on."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.fuzzing import summary

settings.register_profile("short", max_examples=50, deadline=None)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile("short")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many fuzz cases there were, by test and by what came of them, and whether kernels could be tested."""
    for line in summary():
        terminalreporter.write_line(line)
    if importlib.util.find_spec("triton") is None:
        terminalreporter.write_line(
            "TRITON IS NOT INSTALLED: no kernel was tested; pip install -r requirements-dev.txt", red=True, bold=True
        )


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Reads ``tests/golden/<name>.json``: outputs of the public reference implementations."""
    folder = Path(__file__).parent / "golden"
    return lambda name: json.loads((folder / f"{name}.json").read_text())
