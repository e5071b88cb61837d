"""Compare Runs without a host: closeness in closed form, only what is known in the table, curves where they belong."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from accel import compare_plot
from accel.compare import compare, decibels, difference, plot, table
from accel.timeline import StepRecord, Timeline


def clip(*levels: float, size: tuple[int, int] = (16, 24)) -> torch.Tensor:
    """Images ``[T, H, W, 3]`` of constant frames."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, *size, 3).clone()


def timeline(computed: int, cached: int, flops: int = 100, seconds: float = 1.0, **schedule: object) -> Timeline:
    line = Timeline(flops_full=flops * (computed + cached), schedule=schedule)
    for index in range(computed + cached):
        kind, cost = ("recompute", flops) if index < computed else ("cache", 0)
        line.add(StepRecord(0, index, (0, 4), kind, 0.5, flops=cost, seconds=seconds * (kind == "recompute")))
    return line


def test_quarters_show_where_the_video_leaves_its_reference():
    comparison = compare(clip(*[0.0] * 8), clip(0, 0, 0.01, 0.01, 0.1, 0.1, 0.5, 0.5))
    assert [(start, end) for start, end, _ in comparison.quarters] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [value for *_, value in comparison.quarters] == pytest.approx([math.inf, 40, 20, 6.0206], abs=1e-3)
    assert comparison.psnr == pytest.approx(-10 * math.log10((0.01**2 + 0.1**2 + 0.5**2) / 4), abs=1e-4)
    assert comparison.ssim == pytest.approx(sum(comparison.ssim_frames) / 8)
    assert comparison.ssim_frames == sorted(comparison.ssim_frames, reverse=True)


def test_quarters_of_a_short_clip_cover_it_once():
    for frames in range(1, 12):
        quarters = compare(clip(*[0.5] * frames), clip(*[0.4] * frames)).quarters
        covered = [frame for start, end, _ in quarters for frame in range(start, end)]
        assert covered == list(range(frames))


def test_small_frames_get_a_smaller_window_and_the_table_says_so():
    comparison = compare(clip(0.5, size=(8, 8)), clip(0.5, size=(8, 8)))
    assert comparison.window == 7 and comparison.ssim == pytest.approx(1)
    assert "SSIM, window 7" in table(comparison)


def test_the_difference_is_absolute_amplified_and_cut_off():
    values = difference(clip(0.5, 0.5, 0.5), clip(0.4, 0.6, 1.0), 4.0)[:, 0, 0, 0]
    assert values.tolist() == pytest.approx([0.4, 0.4, 1.0])
    assert difference(clip(0.3), clip(0.3), 4.0).max() == 0


def test_an_alpha_channel_is_left_out():
    opaque, half = (torch.cat((clip(0.5), torch.full((1, 16, 24, 1), alpha)), -1) for alpha in (1.0, 0.5))
    assert compare(opaque, half).psnr == math.inf
    assert difference(opaque, half, 4.0).shape[-1] == 3


@pytest.mark.parametrize(
    ("reference", "video", "words"),
    [
        (clip(0, 0), clip(0), "Compare Runs: reference has 2 frames and video 1; .*same latent"),
        (clip(0), clip(0, size=(16, 16)), "Compare Runs: reference is 24x16 pixels and video 16x16; .*same VAE"),
        (clip(0)[..., :1], clip(0), r"Compare Runs: reference must be images .* got \[1, 16, 24, 1\]; connect"),
        (clip(0), clip(0)[0], r"Compare Runs: video must be images .* got \[16, 24, 3\]; connect"),
    ],
)
def test_clips_that_cannot_be_compared_are_refused_with_the_remedy(reference, video, words):
    for call in (compare, lambda a, b: difference(a, b, 4.0)):
        with pytest.raises(ValueError, match=words):
            call(reference, video)


def test_the_table_holds_costs_of_both_runs():
    full, fast = timeline(10, 0), timeline(4, 6)
    fast.state_bytes = 2_000_000
    text = table(compare(clip(0.5), clip(0.4)), full, fast)
    for row in (
        "| PSNR | 20.00 dB |",
        "| calls: recompute | 10 | 4 |",
        "| calls: cache | 0 | 6 |",
        "| FLOPs | 1 kFLOP | 400 FLOP |",
        "| FLOP ratio |  | 2.50x |",
        "| seconds | 10 s | 4 s |",
        "| measured speed-up |  | 2.50x |",
        "| state bytes |  | 2 MB |",
    ):
        assert row in text.splitlines(), row
    assert "predict" not in text and "commit" not in text and "differ" not in text


def test_what_is_not_known_is_left_out():
    comparison = compare(clip(0.5), clip(0.4))
    assert "cost" not in table(comparison)
    uncounted = timeline(4, 6, flops=0, seconds=0.0)
    text = table(comparison, None, uncounted)
    assert "| calls: recompute |  | 4 |" in text
    for absent in ("FLOP", "seconds", "speed-up", "state"):
        assert absent not in text
    alone = table(comparison, None, timeline(4, 6))
    assert "| fewer FLOPs than computing every call |  | 2.50x |" in alone and "FLOP ratio" not in alone


def test_runs_of_another_schedule_are_named():
    text = table(compare(clip(0.5), clip(0.5)), timeline(2, 0, steps=50, seed=1), timeline(1, 1, steps=25, seed=1))
    assert "differ in more than acceleration: steps 50 and 25." in text
    assert decibels(math.inf) == "equal" and "| PSNR | equal |" in text


def test_without_kornia_ssim_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.metrics", None)
    comparison = compare(clip(0.5, 0.5), clip(0.4, 0.5))
    assert comparison.ssim is None and "SSIM" not in table(comparison)
    monkeypatch.undo()
    assert plot(comparison).shape[1] < plot(compare(clip(0.5, 0.5), clip(0.4, 0.5))).shape[1], "a panel too many"


def test_the_plot_is_an_image_whose_curve_falls_with_the_values():
    pixels = compare_plot.draw([("PSNR (dB)", [40.0, 30.0, 20.0])], [1])
    colour = np.array([0x00, 0x72, 0xB2])
    rows, columns = np.nonzero((pixels == colour).all(-1))
    curve = rows > compare_plot.TOP + 40  # below the label, which has the curve's colour
    left, right = (rows[curve & (columns < 400)].mean(), rows[curve & (columns > 600)].mean())
    assert left < right
    image = plot(compare(clip(0.5, 0.5), clip(0.4, 0.45)))
    assert image.shape[0] == 1 and image.shape[-1] == 3 and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() == 1


@pytest.mark.parametrize("values", [[math.inf] * 3, [math.nan, 30.0, math.inf], [5.0], [30.0, 30.0]])
def test_a_plot_copes_with_equal_frames_and_short_clips(values):
    pixels = compare_plot.draw([("PSNR (dB)", values)])
    assert pixels.dtype == np.uint8 and (pixels != 255).any()


@pytest.mark.parametrize(("low", "high"), [(31.2, 47.9), (0.97, 0.9991), (0, 51), (3, 3), (0.99999, 1.0)])
def test_ticks_are_few_round_and_enclose_the_values(low, high):
    found = compare_plot.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    assert all(len(f"{value:g}") <= 7 for value in found)
