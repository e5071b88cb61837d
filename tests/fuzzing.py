"""What all fuzz tests share: damage to files and to JSON, the judgement of a sentence, and the count of cases that the
summary shows."""

from __future__ import annotations

import copy
import re
from collections import Counter
from functools import reduce
from typing import Any

from hypothesis import strategies as st

CASES: Counter[tuple[str, str]] = Counter()
REMEDY = re.compile(
    r"\b(use|connect|give|load|remove|set|turn|choose|write|try|scale|sample|resume|start|convert|lower|check|read|"
    r"download|run|the tiny models know|must be)\b"
)


def counted(test: str, outcome: str, cases: int = 1) -> None:
    """So many more cases of ``test`` ended like this."""
    CASES[test, outcome] += cases


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


NASTY = (
    b"", b"[]", b"null", b"NaN", b"{}", b"[" * 5000, b'{"a":' * 5000, b"1" * 5000, b'{"checksum": 1}',
    b"\xff\xfe{",
    b'{"checksum": "", "checksum": "", "version": 1e999}', b"\x80\x04\x95", b"PK\x03\x04", bytes(64), b"\xff" * 64,
    (1 << 62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}", b'{"version": 1, "records": []}',
)  # fmt: skip
"""Files that are none of ours: empty, deeply nested, huge numbers, pickle, zip, headers that lie about their size."""


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """``data`` cut off, with bits flipped, bytes overwritten, put in or repeated, or another file in its place."""
    place = st.integers(0, max(len(data) - 1, 0))
    head = st.integers(0, min(len(data) - 1, 300)) if data else place
    somewhere = st.one_of(place, head)
    junk = st.binary(max_size=12)
    return st.one_of(
        somewhere.map(lambda at: data[:at]),
        st.tuples(somewhere, st.integers(0, 7)).map(lambda draw: flipped(data, *draw)),
        st.lists(st.tuples(somewhere, st.integers(0, 7)), min_size=2, max_size=4).map(
            lambda draws: reduce(lambda bytes_, draw: flipped(bytes_, *draw), draws, data)
        ),
        st.tuples(somewhere, junk).map(lambda draw: data[: draw[0]] + draw[1] + data[draw[0] + len(draw[1]) :]),
        st.tuples(somewhere, junk).map(lambda draw: data[: draw[0]] + draw[1] + data[draw[0] :]),
        st.tuples(somewhere, somewhere).map(lambda ends: data + data[min(ends) : max(ends)]),
        st.sampled_from(NASTY),
    )


def flipped(data: bytes, at: int, bit: int) -> bytes:
    """``data`` with one bit flipped."""
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.just([]), st.just({}),
    st.sampled_from((-1, 2**31, 2**63, 10**30, 1e308, "nan", [[]], [None], {"a": {}}, [1, 2], [2, 1], [0, 10**9])),
    st.sampled_from(("../x", "/etc/passwd", "segment-00000.safetensors", "run.json", "a\x00b", "CON", "x" * 5000)),
    st.just(reduce(lambda inner, _: [inner], range(40), 0)),
)  # fmt: skip


def altered(content: Any) -> st.SearchStrategy[Any]:
    """Plain JSON with up to three values replaced, removed, added or repeated, wherever they stand."""
    change = st.tuples(st.lists(st.integers(0, 50), max_size=6), st.sampled_from(("set", "drop", "more")), ODD)
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _altered(content, changes))


def _altered(content: Any, changes: list[tuple[list[int], str, Any]]) -> Any:
    content = copy.deepcopy(content)
    for path, kind, odd in changes:
        value = copy.deepcopy(odd)  # one value in two places could come to hold itself
        holder, key, inner = None, None, content
        for step in path:
            if not isinstance(inner, dict | list) or not inner:
                break
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            holder, key = inner, keys[step % len(keys)]
            inner = holder[key]
        if holder is None:
            content = value if kind == "set" else content
        elif kind == "set":
            holder[key] = value
        elif kind == "drop":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[f"more {key}"] = value
    return content
