"""A timeline's JSON goes no further than its reader where anything in it cannot be."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from accel.timeline import StepRecord, Timeline
from tests.fuzzing import assert_sentence


def written() -> dict[str, Any]:
    timeline = Timeline(rows=2, columns=1)
    timeline.add(StepRecord(0, 0, (0, 2), "recompute", 0.5, discrepancy=0.1, sigmas=(0.5, 0.5), queries=((0, 2),)))
    return json.loads(json.dumps(timeline.to_json()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("[" * 5000, "no JSON"),
        ("1" * 5000, "no JSON"),
        ("[]", "is a list, not an object"),
        ('{"version": 2, "version": 3}', "version 3, this release reads version 1"),
        ('{"version": 1}', "records is None"),
    ],
)
def test_what_is_no_timeline_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        Timeline.from_json(text)
    assert_sentence(str(refused.value))


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("rows",), 10**9, "rows is 1000000000, more than"),
        (("rows",), True, "rows is True"),
        (("title",), 3, "title is 3"),
        (("settings",), [[]], "settings is"),
        (("schedule",), {"a": [[[[[[[[[[[[[[[[0]]]]]]]]]]]]]]]]}, "nested more than 16 deep"),
        (("totals",), 1, "totals is 1"),
        (("totals", "flops_full"), math.inf, "totals flops_full is inf"),
        (("records", 0), None, "record 0 is None"),
        (("records", 0, "segment"), 2**31, "record 0 is of segment 2147483648"),
        (("records", 0, "frames"), [2, 1], "record 0 frames is"),
        (("records", 0, "frames"), [0, 10**9], "record 0 frames is"),
        (("records", 0, "decision"), "guess", "decision must be one of"),
        (("records", 0, "sigma"), "nan", "record 0 sigma is 'nan'"),
        (("records", 0, "sigmas"), ["a"], "record 0 sigmas is"),
        (("records", 0, "queries"), [[0]], "record 0 queries is"),
        (("records", 0, "flops"), 0.5, "record 0 flops is 0.5"),
        (("records", 0, "forced"), "x" * 20_000, "record 0 forced is"),
    ],
)
def test_an_entry_that_cannot_be_is_named(where: tuple, value: Any, words: str) -> None:
    data = inner = written()
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(ValueError, match=words):
        Timeline.from_json(data)


@pytest.mark.parametrize("name", ["segment", "iteration", "frames", "decision"])
def test_a_record_without_what_it_needs_is_refused(name: str) -> None:
    data = written()
    del data["records"][0][name]
    with pytest.raises(ValueError, match=f"record 0 has no {name}"):
        Timeline.from_json(data)


def test_what_is_not_known_or_not_there_is_left_out() -> None:
    data = written()
    data["more"] = data["records"][0]["more"] = {"a": None}
    for name in ("title", "totals", "settings", "columns"):
        del data[name]
    for name in ("sigma", "window", "forced", "column", "seconds"):
        del data["records"][0][name]
    timeline = Timeline.from_json(data)
    assert timeline.records[0].frames == (0, 2) and timeline.columns == 1
