"""Every metric against a value known in closed form."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel import metrics


def video(*levels: float, size: int = 16) -> torch.Tensor:
    """A video whose frames are constant, one level per frame."""
    return torch.tensor(levels, dtype=torch.float64).view(1, 1, -1, 1, 1).expand(2, 3, -1, size, size).clone()


@given(offset=st.floats(1e-3, 1.0))
def test_a_constant_offset_has_the_psnr_of_its_square(offset):
    assert metrics.psnr(video(0, 0), video(offset, offset)) == pytest.approx(-20 * math.log10(offset), abs=1e-9)


def test_equal_videos_are_infinitely_close():
    still = video(0.2, 0.7)
    assert metrics.psnr(still, still) == math.inf
    assert metrics.psnr_per_frame(still, still) == [math.inf, math.inf]
    assert metrics.ssim(still, still) == pytest.approx(1)
    assert metrics.relative_l2(still, still) == 0
    assert metrics.flicker(still, still) == 0


def test_psnr_is_pooled_before_the_logarithm():
    """Errors 0.1 and 0: the mean squared error is 0.005 although one frame is perfect."""
    reference, other = video(0, 0), video(0.1, 0)
    assert metrics.psnr(reference, other) == pytest.approx(-10 * math.log10(0.005))
    assert metrics.psnr_per_frame(reference, other) == pytest.approx([20, math.inf])


def test_segments_pool_their_own_frames():
    curve = metrics.psnr_per_segment(video(0, 0, 0, 0), video(0.1, 0.1, 0.01, 0.01), [(0, 2), (2, 4)])
    assert curve == pytest.approx([20, 40])


@given(start=st.floats(10, 60), slope=st.floats(-3, 3), count=st.integers(2, 12))
def test_drift_is_the_slope_of_a_straight_line(start, slope, count):
    assert metrics.drift([start + slope * index for index in range(count)]) == pytest.approx(slope, abs=1e-9)


def test_drift_of_a_known_scatter():
    assert metrics.drift([30, 32, 28, 26]) == pytest.approx(-1.6)


def test_drift_leaves_out_segments_equal_to_the_reference():
    assert metrics.drift([math.inf, 40, 38, 36]) == pytest.approx(-2)
    assert metrics.drift([math.inf, math.inf]) == 0
    assert math.isnan(metrics.drift([math.inf, 40]))
    assert math.isnan(metrics.drift([]))


@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_ssim_of_flat_frames_is_the_luminance_term(a, b):
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert metrics.ssim(video(a), video(b)) == pytest.approx(expected, abs=2e-3)


def test_ssim_is_the_mean_over_frames():
    reference, other = video(0.5, 0.5), video(0.5, 0.25)
    alone = metrics.ssim(video(0.5), video(0.25))
    assert metrics.ssim(reference, other) == pytest.approx((1 + alone) / 2, abs=1e-6)


def test_relative_l2_is_the_ratio_of_norms():
    torch.manual_seed(0)
    reference, other = torch.randn(2, 2, 4, 3, 5, 6, dtype=torch.float64)
    assert metrics.relative_l2(reference, other) == pytest.approx(float((other - reference).norm() / reference.norm()))
    assert metrics.relative_l2(reference, 1.5 * reference) == pytest.approx(0.5)
    zero = torch.zeros_like(reference)
    assert metrics.relative_l2(zero, zero) == 0
    assert metrics.relative_l2(zero, reference) == math.inf


def test_flicker_ignores_an_offset_and_counts_an_alternation_twice():
    reference = video(0.1, 0.3, 0.6)
    assert metrics.flicker(reference, reference + 0.2) == pytest.approx(0, abs=1e-12)
    assert metrics.flicker(reference, reference + video(0.05, -0.05, 0.05)) == pytest.approx(0.1)


def test_half_precision_is_summed_in_double():
    reference = torch.zeros(1, 3, 2, 64, 64, dtype=torch.bfloat16)
    assert metrics.psnr(reference, reference + 0.5) == pytest.approx(20 * math.log10(2))


def test_kornia_is_imported_only_for_ssim():
    code = "import sys, accel.metrics; assert 'kornia' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.psnr(video(0), video(0, 1)), "differ in shape"),
        (lambda: metrics.psnr(video(0)[0], video(0)[0]), r"\[B, C, T, H, W\]"),
        (lambda: metrics.psnr(video(0).to(torch.uint8), video(0).to(torch.uint8)), "floating-point"),
        (lambda: metrics.psnr_per_segment(video(0, 1), video(0, 1), [(1, 3)]), r"segment \[1, 3\)"),
        (lambda: metrics.ssim(video(0, size=8), video(0, size=8)), "window"),
        (lambda: metrics.flicker(video(0), video(0)), "2 or more frames"),
    ],
)
def test_unusable_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
