"""The step matrix equals the public reference where that denoises everything, and refuses where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from accel.schedule import (
    StepMatrix,
    chunk_forwards,
    chunk_pipeline,
    flow_sigmas,
    magi_intervals,
    magi_times,
    noise_table,
    shifted,
    skyreels_sigmas,
    step_matrix,
    timesteps,
)

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "step_matrix.json").read_text())["cases"]
REFUSED = {"prefix shorter than a block (floors to 0)", "ar too small -> assert", "shrink flag (broken upstream)"}


def from_case(case: dict) -> StepMatrix:
    return step_matrix(
        case["num_frames"],
        case["steps"],
        case["ar_step"],
        case["block"],
        case["num_pre_ready"],
        case["base_num_frames"],
    )


def pairs(intervals: list[list[int]]) -> list[tuple[int, int]]:
    return [tuple(interval) for interval in intervals]


@st.composite
def arguments(draw: st.DrawFn) -> dict:
    """Arguments in which everything can be denoised."""
    block, blocks, steps = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    prefix, held = draw(st.integers(0, blocks - 1)), draw(st.integers(1, blocks + 2))
    ar_step = draw(st.integers(0, steps + 3))
    assume(held >= blocks or ar_step * held >= steps)
    return {
        "frames": blocks * block,
        "steps": steps,
        "ar_step": ar_step,
        "block": block,
        "prefix": prefix * block,
        "window": held * block,
    }


def recursion(frames: int, steps: int, ar_step: int, block: int, prefix: int, window: int) -> list[list[int]]:
    """Rows of blocks as the reference makes them: each row from the one before, not by the closed form."""
    ready = prefix // block
    before = [steps + 1 if b < ready else 0 for b in range(frames // block)]
    rows = []
    while min(before) < steps:
        row: list[int] = []
        for b, old in enumerate(before):
            row.append(old + 1 if b == 0 or before[b - 1] >= steps else row[b - 1] - ar_step)
        before = [min(max(index, 0), steps + 1) for index in row]
        rows.append([index for index in before for _ in range(block)])
    return rows


@pytest.mark.parametrize("case", [c for c in CASES if c["tag"] not in REFUSED], ids=lambda case: case["tag"])
def test_equals_the_reference(case: dict) -> None:
    matrix = from_case(case)
    assert matrix.index.tolist() == case["step_index"]
    assert matrix.active.int().tolist() == case["update_mask"]
    assert matrix.rows == case["rows"] and matrix.frames == case["num_frames"]
    assert matrix.valid_intervals() == pairs(case["valid_interval"])
    assert matrix.suffix_windows() == pairs(case["scope_interval"])
    assert matrix.active_intervals() == pairs(case["active_interval"])
    shown = timesteps(matrix.sigmas(skyreels_sigmas(case["steps"], case["shift"])))
    assert shown.tolist() == case["step_matrix"]


@pytest.mark.parametrize("tag", ["prefix shorter than a block (floors to 0)", "ar too small -> assert"])
def test_refuses_what_the_reference_gets_wrong(tag: str) -> None:
    case = next(c for c in CASES if c["tag"] == tag)
    with pytest.raises(ValueError, match="Step matrix: .*; use"):
        from_case(case)


def test_the_broken_shrink_case_is_what_suffix_windows_do() -> None:
    case = next(c for c in CASES if c["shrink"])
    assert from_case(case).suffix_windows() == [(0, 3), (0, 4), (0, 5), (0, 6), (0, 6), (0, 6), (0, 6)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 13, "steps": 4, "block": 5}, "frames is 13.*use 10 or 15"),
        ({"frames": 3, "steps": 4, "block": 5}, "use 5 latent frames"),
        ({"frames": 10, "steps": 4, "block": 5, "prefix": 10}, "nothing to denoise; use a prefix of at most 5"),
        ({"frames": 10, "steps": 4, "block": 5, "prefix": 12}, "nothing to denoise"),
        ({"frames": 10, "steps": 4, "block": 5, "prefix": 1}, "prefix is 1 .*use a prefix of 0 or 5,"),
        ({"frames": 10, "steps": 4, "block": 5, "prefix": 9}, "use a prefix of 5,"),
        ({"frames": 10, "steps": 4, "block": 5, "prefix": 7, "ar_step": 2}, "prefix is 7"),
        ({"frames": 10, "steps": 4, "block": 5, "window": 7, "ar_step": 4}, "window is 7 .*use 5 or 10"),
        ({"frames": 10, "steps": 4, "window": 5}, "ar_step is 0, .*at least 1, or a window of 10"),
        ({"frames": 10, "steps": 7, "window": 2, "ar_step": 3}, "ar_step of at least 4"),
        ({"frames": 0, "steps": 4}, "frames is 0; use a whole number of at least 1"),
        ({"frames": 4, "steps": 0}, "steps is 0"),
        ({"frames": 4, "steps": 4, "ar_step": -1}, "ar_step is -1; use a whole number of at least 0"),
        ({"frames": 4, "steps": 4, "block": 0}, "block is 0"),
        ({"frames": 4, "steps": 4, "prefix": -1}, "prefix is -1"),
        ({"frames": 4, "steps": 4, "window": 0}, "window is 0"),
        ({"frames": 4.0, "steps": 4}, "frames is 4.0; use a whole number"),
    ],
)
def test_refuses_what_cannot_be_denoised(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_matrix(**arguments)


@given(arguments())
def test_closed_form_equals_the_recursion(arguments: dict) -> None:
    assert step_matrix(**arguments).index.tolist() == recursion(**arguments)


@given(arguments())
def test_rows_and_steps_of_every_latent_frame(arguments: dict) -> None:
    matrix = step_matrix(**arguments)
    steps, block = matrix.steps, matrix.block
    pending = (matrix.frames - matrix.prefix) // block
    assert matrix.rows == steps + (pending - 1) * min(arguments["ar_step"], steps)
    for frame in range(matrix.frames):
        taken = matrix.index[:, frame][matrix.active[:, frame]].tolist()
        assert taken == ([] if frame < matrix.prefix else list(range(1, steps + 1)))


@given(arguments())
def test_outside_the_valid_interval_nothing_is_pending(arguments: dict) -> None:
    matrix = step_matrix(**arguments)
    width = min(arguments["window"], matrix.frames)
    for index, (start, end) in zip(matrix.index, matrix.valid_intervals(), strict=True):
        assert end - start == width and end <= matrix.frames
        assert (index[:start] == matrix.steps + 1).all() and (index[end:] == 0).all()


@given(arguments())
def test_suffix_windows_drop_only_what_has_not_started(arguments: dict) -> None:
    matrix = step_matrix(**arguments)
    windows, valid, active = matrix.suffix_windows(), matrix.valid_intervals(), matrix.active_intervals()
    ends = [end for _, end in windows]
    assert ends == sorted(ends)
    for row, (start, end) in enumerate(windows):
        assert start <= active[row][0] and active[row][1] <= end
        assert start % matrix.block == end % matrix.block == 0 and end - start <= matrix.window
        assert (matrix.index[row, :start] == matrix.steps + 1).all() and (matrix.index[row, end:] == 0).all()
        if matrix.index[row, -1] > 0:
            assert (start, end) == valid[row]


@given(st.integers(1, 10), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_chunk_ranges_of_the_pipeline(chunks: int, width: int, per_stage: int, window: int, offset: int) -> None:
    assume(offset < chunks)
    matrix = chunk_pipeline(chunks, width, per_stage * window, window, offset)
    stages = chunks + window - 1 - offset
    assert matrix.rows == per_stage * stages
    for row, interval in enumerate(matrix.active_intervals()):
        stage = offset + row // per_stage
        assert interval == (max(offset, stage - window + 1) * width, min(chunks, stage + 1) * width)


def test_sequences_of_the_chunk_pipeline_equal_the_reference(golden) -> None:
    for case in golden("magi_schedule")["sequences"]:
        per_stage = 3
        matrix = chunk_pipeline(case["chunk_num"], 6, per_stage * case["window"], case["window"], case["offset"])
        sequences: list[list[int]] = [[], [], [], []]
        for row in range(0, matrix.rows, per_stage):
            start, end = matrix.active_intervals()[row]
            oldest, newest = matrix.index[row, start].item() - 1, matrix.index[row, end - 1].item() - 1
            stage = (start // 6, end // 6, newest // per_stage, oldest // per_stage + 1)
            for column, value in zip(sequences, stage, strict=True):
                column.append(value)
        assert sequences == case["out"]


def test_forwards_of_the_chunk_pipeline_equal_the_reference(golden) -> None:
    for plan in golden("magi_schedule")["plans"]:
        matrix = chunk_pipeline(plan["chunks"], 6, plan["steps"], plan["window"])
        times = magi_times(plan["steps"])
        forwards = chunk_forwards(matrix, times, plan["noise2clean"], plan["clean_kvrange"])
        assert len(forwards) == plan["total"]
        times[-1] = 0.9999
        for forward, expected in zip(forwards, plan["steps_out"], strict=True):
            assert list(forward.chunks) == expected["chunks"]
            assert (forward.clean is not None) == expected["extra_clean"]
            assert list(forward.steps) == expected["denoise_steps"]
            assert list(forward.keys) == pairs(expected["kv_range_chunks"])
            assert forward.twin == expected["nearly_clean"]
            assert times[list(forward.steps)].tolist() == pytest.approx(expected["t"], abs=2e-7)


def test_chunks_see_all_history_without_key_chunks() -> None:
    forwards = chunk_forwards(chunk_pipeline(6, 1, 8, 2), magi_times(8), key_chunks=())
    assert forwards[-1].keys == ((0, 6),)
    assert forwards[20].clean == 3 and forwards[20].keys == ((3, 4), (0, 5), (0, 6))


def test_chunk_pipeline_refuses_a_window_that_does_not_divide_the_steps() -> None:
    with pytest.raises(ValueError, match="steps is 32, not a multiple of the window of 3 chunks; use 30 or 33 steps"):
        chunk_pipeline(4, 6, 32, 3)


def test_magi_times_equal_the_reference(golden) -> None:
    reference = golden("magi_schedule")
    for key, expected in reference["t_tables"].items():
        steps, shortcut, transform = key.split("|")
        times = magi_times(int(steps), shortcut, transform)
        assert times.tolist() == pytest.approx(expected, abs=2e-7), key
        noise_table(1 - times, int(steps))
    for key, expected in reference["intervals"].items():
        steps, shortcut = key.split("|")
        assert magi_intervals(int(steps), shortcut).tolist() == expected


def test_skyreels_tables_equal_the_reference(golden) -> None:
    for key, expected in golden("scheduler_unipc")["tables"].items():
        steps, shift = key.split(",")
        table = skyreels_sigmas(int(steps), float(shift))
        assert table.tolist() == pytest.approx(expected["sigmas"], abs=1e-7)
        assert timesteps(table)[:-1].tolist() == expected["timesteps"]


def test_flow_table_runs_from_noise_to_clean() -> None:
    assert flow_sigmas(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert flow_sigmas(2, 3).tolist() == [1, 0.75, 0]


def test_noise_levels_of_every_latent_frame() -> None:
    matrix = step_matrix(3, 2, ar_step=1, prefix=1)
    assert matrix.sigmas([0.9, 0.3, 0]).tolist() == [[0, 0.9, 0.9], [0, 0.3, 0.9], [0, 0, 0.3]]


@pytest.mark.parametrize(
    "table", [[1, 0.5], [1, 0.5, 0.1], [1, 1, 0], [0.5, 1, 0], [2, 1, 0], [1, float("nan"), 0], [[1, 0.5, 0]]]
)
def test_refuses_noise_tables_no_solver_can_follow(table: list) -> None:
    with pytest.raises(ValueError, match="Noise table: "):
        noise_table(table, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: magi_times(12, "8,8,8"), "shortcut is '8,8,8'; use one of"),
        (lambda: magi_times(8, transform="cube"), "transform is 'cube'; use"),
        (lambda: shifted(torch.ones(1), 0), "shift is 0; use"),
        (lambda: noise_table([0.0]), "two or more"),
    ],
)
def test_refuses_unknown_options(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
