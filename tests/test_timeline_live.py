from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.timeline import DECISIONS, StepRecord, Timeline
from accel.timeline_live import INTERVAL, KEYS, LiveFeed, compact


def record(index: int, **other) -> StepRecord:
    decision = other.pop("decision", DECISIONS[index % 3])
    told = {"discrepancy": index / 7, "threshold": 0.18, "increment": 0.01, "seconds": 0.25, "flops": 10**12}
    return StepRecord(0, index, (0, 4), decision, 1 / (index + 1), **(told | other))


def drained(feed: LiveFeed, every: float = 0.05) -> list[tuple[float, dict]]:
    """All events of a run whose calls are over, and when they came."""
    events, now = [], 0.0
    while feed._sent < len(feed.timeline.records):
        event = feed.event(now)
        if event:
            events.append((now, event))
        now += every
    return events


def test_every_record_arrives_once_and_in_order() -> None:
    timeline = Timeline(records=[record(index) for index in range(400)])
    rows = [row for _, event in drained(LiveFeed(timeline)) for row in event["records"]]
    assert [row[KEYS.index("column")] for row in rows] == list(range(400))


def test_a_record_says_what_the_timeline_says_to_four_figures() -> None:
    timeline = Timeline(records=[record(0), record(1, forced="warm-up", order=2, corrected=1.23456, error=math.inf)])
    values = dict(zip(KEYS, compact(timeline.records[1], 1), strict=False))
    assert values["decision"] == DECISIONS.index("predict") and values["forced"] == "warm-up"
    assert (values["start"], values["end"], values["window_end"], values["order"]) == (0, 4, 4, 2)
    assert values["discrepancy"] == 0.1429 and values["corrected"] == 1.235 and values["flops"] == 10**12
    assert "error" not in values, "a number that is not finite is null, and trailing nulls are left out"


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(0, 40))
def test_events_stay_below_four_a_second_and_twenty_kilobytes_a_second(bursts: list[int], words: int) -> None:
    timeline, sent, now = Timeline(), [], 0.0
    feed = LiveFeed(timeline)
    for burst in bursts:
        for _ in range(burst):
            timeline.add(record(len(timeline.records), forced="x" * words or None, window=(0, 10**6)))
        now += 0.06
        event = feed.event(now)
        if event:
            sent.append((now, len(json.dumps(event))))
    assert all(later - earlier >= INTERVAL for (earlier, _), (later, _) in zip(sent, sent[1:], strict=False))
    assert all(size / INTERVAL <= 19_000 for _, size in sent)


def test_nothing_new_is_no_event_and_the_last_event_always_comes() -> None:
    timeline = Timeline(records=[record(0, decision="recompute")], settings={"Tri-Modal Scheduler": {}})
    feed = LiveFeed(timeline)
    assert len(feed.event(0.0)["records"]) == 1
    assert feed.event(10.0) is None
    last = feed.event(10.01, done=True)
    assert last["done"] and last["records"] == [] and last["behind"] == 0 and last["accelerated"]
    assert last["calls"]["recompute"] == 1 and last["remark"] == timeline.remark()
    assert "Nothing was skipped" in last["remark"]


def test_the_last_event_says_how_many_records_it_leaves_to_the_finished_timeline() -> None:
    timeline = Timeline(records=[record(index) for index in range(1000)])
    last = LiveFeed(timeline).event(0.0, done=True)
    assert len(last["records"]) + last["behind"] == 1000 and last["behind"] > 0
    assert last["remark"] is None and not last["accelerated"]


@pytest.mark.parametrize("room", [1, 200, 10**6])
def test_a_record_that_is_larger_than_the_room_still_goes(room: int) -> None:
    timeline = Timeline(records=[record(index, forced="y" * 300) for index in range(5)])
    events = drained(LiveFeed(timeline, room=room))
    assert sum(len(event["records"]) for _, event in events) == 5
