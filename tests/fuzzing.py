"""What all fuzz tests share: how they judge what came of a case, and the count of cases that the summary shows."""

from __future__ import annotations

import re
from collections import Counter

CASES: Counter[tuple[str, str]] = Counter()
REMEDY = re.compile(
    r"\b(use|connect|give|load|remove|set|turn|choose|write|try|scale|sample|resume|start|convert|lower|check|read|"
    r"download|run|the tiny models know|must be)\b"
)


def counted(test: str, outcome: str) -> None:
    """One more case of ``test`` that ended like this."""
    CASES[test, outcome] += 1


def assert_sentence(message: str) -> None:
    """One sentence or two for people: who says it, what is the matter, what to do."""
    assert re.match(r"[A-Z][\w/ -]+: .", message), f"names no node: {message!r}"
    assert REMEDY.search(message), f"gives no remedy: {message!r}"
    assert message.endswith("."), f"is no sentence: {message!r}"
    assert len(message) < 1500, f"is too long ({len(message)} characters): {message[:200]!r}"


def summary() -> list[str]:
    """A line for each test and one for all."""
    lines = []
    for test in sorted({name for name, _ in CASES}):
        outcomes = {outcome: count for (name, outcome), count in CASES.items() if name == test}
        told = ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
        lines.append(f"{test}: {sum(outcomes.values())} ({told})")
    return [*lines, f"FUZZ CASES: {sum(CASES.values())}"] if lines else []
