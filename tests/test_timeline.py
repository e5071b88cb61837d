"""The record of a run: what it counts, what it says, and that JSON and picture lose nothing."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.call import Call, Decision, Kind
from accel.timeline import DECISIONS, StepRecord, Timeline
from accel.timeline_report import why_nothing_skipped

SVG = "{http://www.w3.org/2000/svg}"
STEPS, LAG, CHUNK = 50, 5, 5


def noise_level(step: int) -> float:
    """Noise level before solver step 1..50 at shift 8."""
    base = 1 - (step - 1) / STEPS
    return 8 * base / (1 + 7 * base)


def staircase_run() -> Timeline:
    """Four segments of four chunks, one shared with the one before: 13 chunks and 245 iterations."""
    timeline = Timeline(
        13, 245, branches=2, row_unit="chunk", frames_per_row=CHUNK, title="Staircase, 65 latent frames"
    )
    for segment in range(4):
        prefix = 1 if segment else 0
        accumulated, skips = 0.0, 0
        rows = STEPS + (3 - prefix) * LAG
        for iteration in range(rows):
            progress = [min(max(iteration + 1 - (chunk - prefix) * LAG, 0), STEPS + 1) for chunk in range(prefix, 4)]
            active = [chunk for chunk, step in enumerate(progress, prefix) if 1 <= step <= STEPS]
            sigmas = [noise_level(progress[chunk - prefix]) for chunk in active]
            increment = 0.03 + 0.25 * (1 - min(sigmas)) ** 2 + 0.02 * math.sin(iteration)
            accumulated += increment
            first, last = 15 * segment + CHUNK * active[0], 15 * segment + CHUNK * (active[-1] + 1)
            entering = iteration % LAG == 0 and iteration < 4 * LAG
            forced = "new frames" if entering else "last" if iteration == rows - 1 else "cap" if skips == 5 else None
            if forced or accumulated >= 0.42:
                decision, threshold = "recompute", 0.42
            elif accumulated >= 0.18:
                decision, threshold = "predict", 0.42
            else:
                decision, threshold = "cache", 0.18
            computed = decision == "recompute"
            timeline.add(
                StepRecord(
                    segment,
                    iteration,
                    (first, last),
                    decision,
                    max(sigmas),
                    window=(15 * segment, last),
                    forced=forced,
                    sigmas=tuple(sigmas),
                    discrepancy=accumulated,
                    increment=increment,
                    threshold=threshold,
                    order=1 if decision == "predict" else None,
                    flops=int(80e12 * (last - 15 * segment) / CHUNK) if computed else 0,
                    seconds=0.9 if computed else 0.002,
                )
            )
            skips = 0 if computed else skips + 1
            accumulated *= 0.0 if computed else 0.75 if decision == "predict" else 1.0
            timeline.flops_full += int(320e12)
    timeline.state_bytes = 39_000_000
    return timeline


def call(**changes) -> Call:
    fields = {
        "kind": Kind.DENOISE,
        "segment": 1,
        "iteration": 2,
        "frames": (0, 6),
        "sigmas": (0.0, 0.0, 0.4, 0.5, 0.9, 0.8),
        "steps": (9, 9, 4, 4, 2, 2),
        "active": (False, False, True, True, True, True),
        "offset": 4,
    }
    return Call(**fields | changes)


records = st.builds(
    StepRecord,
    segment=st.integers(0, 3),
    iteration=st.integers(0, 9),
    frames=st.tuples(st.integers(0, 4), st.integers(4, 12)),
    window=st.none() | st.tuples(st.integers(0, 4), st.integers(4, 14)),
    decision=st.sampled_from(DECISIONS),
    sigma=st.floats(0, 1),
    sigmas=st.none() | st.lists(st.floats(0, 1), max_size=4).map(tuple),
    forced=st.none() | st.text(max_size=8),
    discrepancy=st.none() | st.floats(0, 10),
    increment=st.none() | st.floats(0, 10),
    threshold=st.none() | st.floats(0, 1),
    order=st.none() | st.sampled_from([0, 1, 2, "newton2"]),
    corrected=st.none() | st.floats(0.5, 3),
    error=st.none() | st.floats(0, 1),
    flops=st.integers(0, 10**18),
    seconds=st.floats(0, 100),
)
timelines = st.builds(
    Timeline,
    rows=st.integers(0, 5),
    columns=st.integers(0, 50),
    branches=st.integers(1, 2),
    row_unit=st.sampled_from(["latent frame", "chunk"]),
    frames_per_row=st.integers(1, 5),
    title=st.text(max_size=20),
    settings=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
    flops_full=st.integers(0, 10**19),
    state_bytes=st.none() | st.integers(0, 10**12),
    records=st.lists(records, max_size=12),
)


@given(timelines)
def test_json_keeps_everything(timeline):
    data = timeline.to_json()
    text = json.dumps(data, allow_nan=False)
    assert Timeline.from_json(data) == timeline
    assert Timeline.from_json(text) == timeline
    assert Timeline.from_json(text).to_json() == json.loads(text)


@given(timelines)
def test_calls_sum_to_the_records_times_the_branches(timeline):
    data = timeline.to_json()
    assert sum(data["totals"]["calls"].values()) == len(timeline.records) * timeline.branches
    assert data["totals"]["iterations"] == len({(r.segment, r.iteration) for r in timeline.records}) <= data["columns"]
    assert all(record["frames"][1] <= data["rows"] * data["frames_per_row"] for record in data["records"])


@given(timelines)
def test_every_picture_is_well_formed(timeline):
    ElementTree.fromstring(timeline.to_svg())
    assert timeline.summary() and "\n" not in timeline.log_line()


def test_numbers_that_are_not_finite_become_null():
    timeline = Timeline(1, settings={"limit": math.inf})
    timeline.add(StepRecord(0, 0, (0, 1), "recompute", math.nan, discrepancy=math.inf, threshold=0.1))
    data = json.loads(json.dumps(timeline.to_json(), allow_nan=False))
    assert data["records"][0]["sigma"] is data["records"][0]["discrepancy"] is data["settings"]["limit"] is None
    ElementTree.fromstring(Timeline.from_json(data).to_svg())


def test_the_schema_that_scripts_read():
    data = staircase_run().to_json()
    assert (data["version"], data["rows"], data["columns"]) == (1, 13, 245)
    expected = {"segment", "iteration", "frames", "decision", "sigma", "discrepancy", "threshold", "flops", "seconds"}
    assert expected | {"error"} <= set(data["records"][0])
    assert data["records"][-1]["frames"] == [60, 65]
    assert data["records"][-1]["column"] == 244
    totals = data["totals"]
    assert sum(totals["calls"].values()) == 490
    assert totals["flop_ratio"] == pytest.approx(totals["flops_full"] / totals["flops"])


def test_a_call_becomes_a_record_of_the_whole_video():
    timeline = Timeline(frames_per_row=2, row_unit="chunk")
    record = timeline.record(call(), Decision.CACHE, discrepancy=0.1, threshold=0.2)
    assert (record.frames, record.window, record.decision) == ((6, 10), (4, 10), "cache")
    assert (record.sigma, record.sigmas) == (0.9, (0.5, 0.9))
    assert timeline.rows == 5


def test_a_decision_per_chunk_names_its_frames():
    timeline = Timeline(frames_per_row=2, row_unit="chunk")
    for frames, decision in (((2, 4), Decision.CACHE), ((4, 6), Decision.RECOMPUTE)):
        timeline.record(call(), decision, frames)
    assert [(record.frames, record.sigma) for record in timeline.records] == [((6, 8), 0.5), ((8, 10), 0.9)]
    assert timeline.columns == 1


@pytest.mark.parametrize("kind", [Kind.COMMIT, Kind.PREFILL])
def test_a_pass_that_only_writes_keys_says_so_itself(kind):
    timeline = Timeline()
    timeline.record(call(kind=kind, active=(False,) * 6))
    assert timeline.records[0].decision == kind.value
    assert timeline.records[0].frames == (4, 10)
    assert timeline.to_json()["totals"]["calls"]["commit"] == 1


def test_an_idle_call_covers_no_row():
    timeline = Timeline()
    timeline.record(call(active=(False,) * 6), Decision.RECOMPUTE)
    assert len(timeline.row_range(timeline.records[0].frames)) == 0
    ElementTree.fromstring(timeline.to_svg())


def test_time_without_skipping_is_estimated_from_recomputes():
    timeline = Timeline(1)
    for iteration, (decision, seconds) in enumerate(
        [("recompute", 1.0), ("cache", 0.1), ("predict", 0.1), ("commit", 2.0)]
    ):
        timeline.add(StepRecord(0, iteration, (0, 1), decision, 0.5, seconds=seconds))
    assert timeline.totals()["seconds"] == pytest.approx(3.2)
    assert timeline.totals()["seconds_full_estimate"] == pytest.approx(5.0)
    assert "about 1.56x faster" in timeline.summary()


def test_the_report_counts_and_explains():
    report = staircase_run().summary()
    assert "490 model calls" in report and "segments 4, iterations 245, 2 CFG branches" in report
    assert "recomputed because of" in report and "new frames" in report
    assert "x fewer" in report and "39 MB of state" in report
    assert "Nothing was skipped" not in report


def test_the_report_gives_the_error_of_predictions():
    timeline = Timeline(1)
    for iteration, error in enumerate([0.02, 0.04, None]):
        timeline.add(StepRecord(0, iteration, (0, 1), "recompute", 0.5, error=error))
    assert "mean relative error 0.03, worst 0.04 (2 compared)" in timeline.summary()


def recomputed(**fields) -> Timeline:
    timeline = Timeline(1)
    for iteration, discrepancy in enumerate([0.06, 0.04, 0.05]):
        timeline.add(StepRecord(0, iteration, (0, 1), "recompute", 0.5, **{"discrepancy": discrepancy} | fields))
    return timeline


@pytest.mark.parametrize(
    ("timeline", "words"),
    [
        (recomputed(threshold=0.02), "threshold 0.02 is below the smallest discrepancy 0.04; try 0.05."),
        (recomputed(threshold=0.0), "threshold 0 switches skipping off; the smallest discrepancy was 0.04, try 0.05."),
        (recomputed(threshold=0.5), "within threshold 0.5, but there was nothing to reuse"),
        (recomputed(forced="warm-up"), "every call had to be computed (warm-up 3)"),
        (recomputed(discrepancy=math.nan, threshold=0.1), "never a finite number"),
        (recomputed(), "no acceleration is set"),
    ],
)
def test_a_run_that_skipped_nothing_says_why(timeline, words):
    assert words in why_nothing_skipped(timeline)
    assert words in timeline.summary()


def test_a_run_that_skipped_or_did_nothing_has_no_excuse():
    assert why_nothing_skipped(staircase_run()) is None
    assert why_nothing_skipped(Timeline()) is None


def cells(svg: str) -> list[ElementTree.Element]:
    return [rect for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]


def test_every_cell_says_what_was_decided():
    timeline = Timeline(2, frames_per_row=2)
    timeline.add(
        StepRecord(
            3, 7, (0, 4), "predict", 0.9, sigmas=(0.7, 0.9), discrepancy=0.21, threshold=0.42, order=2, seconds=0.1
        )
    )
    low, high, bar = [cell.find(f"{SVG}title").text for cell in cells(timeline.to_svg())]
    assert "predict, order 2" in low and "segment 3, iteration 7" in low and "0.1 s" in low
    assert "latent frames [0, 2)" in low and "sigma 0.7" in low
    assert "latent frames [2, 4)" in high and "sigma 0.9" in high
    assert "discrepancy 0.21, threshold 0.42" in high and "discrepancy 0.21" in bar


def test_rows_of_one_noise_level_are_one_rectangle():
    timeline = Timeline(4)
    timeline.add(StepRecord(0, 0, (0, 4), "cache", 0.9))
    assert len(cells(timeline.to_svg())) == 1


def test_records_of_one_cell_share_its_height():
    timeline = Timeline(1)
    timeline.add(StepRecord(0, 0, (0, 1), "recompute", 0.1))
    timeline.add(StepRecord(0, 0, (0, 1), "commit", 0.0))
    upper, lower = cells(timeline.to_svg())
    assert float(lower.get("y")) == pytest.approx(float(upper.get("y")) + float(upper.get("height")))


def test_every_decision_looks_different_without_colour():
    timeline = Timeline(1)
    for iteration, decision in enumerate(DECISIONS):
        timeline.add(StepRecord(0, iteration, (0, 1), decision, 0.1))
    looks = [cell.get("fill") or cell.get("class") for cell in cells(timeline.to_svg())]
    assert looks == ["recompute", *(f"url(#arva-{decision})" for decision in DECISIONS[1:])]
    patterns = ElementTree.fromstring(timeline.to_svg()).iter(f"{SVG}pattern")
    marks = {pattern.get("id"): pattern.find(f"{SVG}path").get("d") for pattern in patterns}
    assert set(marks) == {f"arva-{decision}" for decision in DECISIONS[1:]}
    assert len(set(marks.values())) == len(marks)


def test_text_is_escaped_and_control_characters_are_dropped():
    timeline = Timeline(1, title='<script> & "quotes" \x00\ud800')
    timeline.add(StepRecord(0, 0, (0, 1), "recompute", 0.1, forced="<b>"))
    svg = timeline.to_svg()
    assert "<script>" not in svg and "<b>" not in svg
    ElementTree.fromstring(svg)


@pytest.mark.parametrize("columns", [1, 10, 250, 1000])
def test_the_picture_stays_small(columns):
    timeline = Timeline(13, columns, row_unit="chunk")
    for column in range(columns):
        for row in range(13):
            decision = DECISIONS[(column + row) % 3]
            timeline.add(
                StepRecord(
                    0, column, (row, row + 1), decision, 0.123456, discrepancy=0.123456, threshold=0.18, seconds=0.123
                )
            )
    svg = timeline.to_svg()
    assert len(svg) < max(4000 * columns, 20_000)
    assert 560 <= float(ElementTree.fromstring(svg).get("width")) <= 2200


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: StepRecord(0, 0, (0, 1), "reuse", 0.5), "decision must be one of"),
        (lambda: StepRecord(0, 0, (3, 1), "cache", 0.5), r"frames must be an interval .* \[3, 1\)"),
        (lambda: Timeline(-1), "0 or more"),
        (lambda: Timeline(row_unit="page"), "latent frame, chunk"),
        (lambda: Timeline.from_json({"version": 2, "records": []}), "version 2"),
    ],
)
def test_what_cannot_be_is_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
