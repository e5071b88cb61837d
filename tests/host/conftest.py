"""Fixtures of the tests that need the real ComfyUI or a browser; without one they are skipped, and the summary says
so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.host.browser import chromium, missing
from tests.host.comfy import ComfyServer, find_comfy

NO_COMFY = "no ComfyUI found; set COMFYUI_PATH"
_skipped = pytest.StashKey[bool]()
skipped_browser = pytest.StashKey[str]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder carries the ``host`` marker."""
    folder = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(folder):
            item.add_marker(pytest.mark.host)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(_skipped, False):
        terminalreporter.section("HOST TESTS SKIPPED", red=True, bold=True)
        terminalreporter.write_line(f"HOST TESTS SKIPPED: {NO_COMFY}", red=True, bold=True)
    reason = config.stash.get(skipped_browser, None)
    if reason:
        terminalreporter.section("BROWSER TESTS SKIPPED", red=True, bold=True)
        terminalreporter.write_line(f"BROWSER TESTS SKIPPED: {reason}", red=True, bold=True)


@pytest.fixture(scope="session")
def comfy_root(request: pytest.FixtureRequest) -> Path:
    """The ComfyUI checkout."""
    root = find_comfy()
    if root is None:
        request.config.stash[_skipped] = True
        pytest.skip(f"HOST TESTS SKIPPED: {NO_COMFY}")
    return root


@pytest.fixture(scope="session")
def chromium_browser(request: pytest.FixtureRequest, comfy_root: Path) -> Iterator[Any]:
    """Debian's Chromium."""
    reason = missing()
    if reason:
        request.config.stash[skipped_browser] = reason
        pytest.skip(f"BROWSER TESTS SKIPPED: {reason}")
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def server(comfy_root: Path) -> Iterator[ComfyServer]:
    """One ComfyUI server with this pack, shared by all tests of the session; its node cache outlives a test."""
    with ComfyServer(comfy_root) as running:
        yield running
