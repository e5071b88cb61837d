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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder carries the ``host`` marker."""
    folder = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(folder):
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session")
def comfy_root() -> Path:
    """The ComfyUI checkout."""
    root = find_comfy()
    if root is None:
        pytest.skip(f"HOST TESTS SKIPPED: {NO_COMFY}")
    return root


@pytest.fixture(scope="session")
def chromium_browser(comfy_root: Path) -> Iterator[Any]:
    """Debian's Chromium."""
    reason = missing()
    if reason:
        pytest.skip(f"BROWSER TESTS SKIPPED: {reason}")
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def server(comfy_root: Path) -> Iterator[ComfyServer]:
    """One ComfyUI server with this pack, shared by all tests of the session; its node cache outlives a test."""
    with ComfyServer(comfy_root) as running:
        yield running
