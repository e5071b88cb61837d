"""What a run shows while it goes takes no more memory for a longer video."""

from __future__ import annotations

from pathlib import Path

import pytest

from .inprocess import run_in_process

SCRIPT = Path(__file__).with_name("progress_runs.py")


@pytest.fixture(scope="module")
def facts(comfy_root: Path) -> dict:
    return run_in_process(SCRIPT, root=comfy_root, core_nodes=[])


def test_a_short_video_is_shown_whole_and_grows(facts) -> None:
    assert facts["short"] == [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]


def test_of_a_long_video_the_latest_frames_are_shown(facts) -> None:
    assert facts["long"] == [float(frame) for frame in range(136, 200)]
    assert facts["long strip"] == facts["strip of 64"]


def test_frames_that_were_there_before_count(facts) -> None:
    assert facts["resumed"] == [float(frame) for frame in range(40, 104)]
