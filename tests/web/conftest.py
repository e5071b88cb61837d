"""The tests of the JavaScript modules need node; without it they are skipped, and the summary says so."""

from __future__ import annotations

import pytest

skipped = pytest.StashKey[str]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reason = config.stash.get(skipped, None)
    if reason:
        terminalreporter.section("WEB TESTS SKIPPED", red=True, bold=True)
        terminalreporter.write_line(f"WEB TESTS SKIPPED: {reason}", red=True, bold=True)


@pytest.fixture
def loudly_skip(request: pytest.FixtureRequest):
    """Skips a test and repeats the reason in the summary."""

    def skip(reason: str) -> None:
        request.config.stash[skipped] = reason
        pytest.skip(f"WEB TESTS SKIPPED: {reason}")

    return skip
