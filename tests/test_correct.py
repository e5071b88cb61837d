"""The correction moves a held velocity as far as the first segment moved, within its bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from accel.correct import CorrectionConfig, ResidualCorrection, is_scene_cut
from accel.history import VelocityHistory
from accel.predict import extrapolate, hold

LEVELS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
PAPER = CorrectionConfig("seg1_l1", clamp=(0.0, 10.0))


def progress(sigma: float) -> float:
    """How far along its line the made-up trajectory is: not linear in the noise level."""
    return sigma**3 + 0.2 * sigma


def lines(frames: int, seed: int, batch: int = 1, size: int = 4) -> tuple[Tensor, Tensor]:
    """Start and direction of a trajectory, ``[B, 3, T, size, size]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, frames, size, size)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def at(line: tuple[Tensor, Tensor], sigma: float) -> Tensor:
    return line[0] + progress(sigma) * line[1]


def trained(config: CorrectionConfig = PAPER, frames: int = 3, levels: list[float] = LEVELS) -> ResidualCorrection:
    """A correction that saw the first segment at ``levels``."""
    correction, line = ResidualCorrection(config), lines(frames, 0)
    for sigma in levels:
        correction.record(0, (0, frames), [sigma] * frames, at(line, sigma))
    return correction


def two_points(line: tuple[Tensor, Tensor], a: float, b: float) -> VelocityHistory:
    frames = line[0].shape[2]
    history = VelocityHistory(frames)
    for sigma in (b, a):
        history.push((0, frames), [sigma] * frames, at(line, sigma))
    return history


def test_a_segment_that_moves_as_the_first_did_is_restored() -> None:
    """Start and direction differ, the progress is the same: the paper's lambda is then exact."""
    correction, line = trained(), lines(3, 1)
    history = two_points(line, a=0.6, b=0.8)
    found, scale = correction.apply(history, 1, (0, 3), (0.4,) * 3)
    expected = (progress(0.4) - progress(0.8)) / (progress(0.6) - progress(0.8))
    assert scale == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(found, at(line, 0.4), atol=1e-4, rtol=1e-4)
    assert correction.note is None


def test_between_knots_the_trajectory_is_a_straight_line() -> None:
    correction = trained(levels=[1.0, 0.8, 0.6, 0.4])
    (scale,) = correction.scale(1, (0, 1), [0.5], [0.6], [0.8])
    half = 0.5 * (progress(0.6) + progress(0.4))
    assert scale == pytest.approx((half - progress(0.8)) / (progress(0.6) - progress(0.8)), rel=1e-4)


def test_beyond_its_ends_the_trajectory_stands_still() -> None:
    correction = trained(levels=[0.8, 0.6, 0.4])
    last = correction.scale(1, (0, 1), [0.4], [0.6], [0.8])
    assert correction.scale(1, (0, 1), [0.1], [0.6], [0.8]) == last
    assert correction.scale(1, (0, 1), [0.4], [0.6], [0.99]) == last


def test_at_the_recompute_itself_lambda_is_one() -> None:
    correction = trained()
    for segment in (0, 1):
        assert correction.scale(segment, (0, 2), [0.6] * 2, [0.6] * 2, [0.8] * 2) == pytest.approx((1.0, 1.0))


def test_a_small_sketch_estimates_lambda() -> None:
    generator = torch.Generator().manual_seed(5)
    line = [torch.randn(1, 16, 4, 24, 24, generator=generator) for _ in LEVELS]
    path = [sum(line[: index + 1]) for index in range(len(LEVELS))]
    found = []
    for sketch in (16 * 4 * 24 * 24, 4096):
        correction = ResidualCorrection(CorrectionConfig("seg1_l1", sketch=sketch))
        for sigma, velocity in zip(LEVELS, path, strict=True):
            correction.record(0, (0, 4), [sigma] * 4, velocity)
        assert correction.nbytes <= len(LEVELS) * sketch * 4
        found.append(correction.scale(1, (0, 4), [0.4] * 4, [0.6] * 4, [0.8] * 4)[0])
    assert found[1] == pytest.approx(found[0], rel=0.05)


@given(st.floats(0.3, 0.95), st.floats(0.01, 0.3), st.floats(0.0, 0.5))
def test_sigma_linear_is_first_order_extrapolation(b: float, step: float, ahead: float) -> None:
    line = lines(2, 2)
    a, t = b - step, b - step - ahead
    history = two_points(line, a, b)
    correction = ResidualCorrection(CorrectionConfig("sigma_linear", clamp=(0.0, 1e6)))
    found, scale = correction.apply(history, 3, (0, 2), (t, t))
    assert scale == pytest.approx((t - b) / (a - b))
    expected = extrapolate([a, b], [at(line, a), at(line, b)], t, 1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@given(st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3), st.sampled_from(["hold", "sigma_linear", "seg1_l1"]))
def test_lambda_stays_within_its_clamp(sigmas: list[float], source: str) -> None:
    correction = trained(CorrectionConfig(source))
    for segment in (0, 1):
        (scale,) = correction.scale(segment, (1, 2), *([sigma] for sigma in sigmas))
        assert 0.5 <= scale <= 3.0


def test_holding_is_lambda_one_and_returns_a_new_tensor() -> None:
    history = two_points(lines(3, 1), a=0.6, b=0.8)
    found, scale = ResidualCorrection(CorrectionConfig("hold")).apply(history, 1, (0, 3), (0.4,) * 3)
    assert scale == 1.0 and torch.equal(found, hold(history, (0, 3)))
    found.zero_()
    assert history.newest((0, 3)).abs().sum() > 0


def test_before_two_recomputes_the_velocity_is_held() -> None:
    for config in (PAPER, CorrectionConfig("sigma_linear")):
        history, line = VelocityHistory(3), lines(3, 1)
        history.push((0, 3), [0.8] * 3, at(line, 0.8))
        found, scale = trained(config).apply(history, 1, (0, 3), (0.6,) * 3)
        assert scale == 1.0 and torch.equal(found, at(line, 0.8))
    shallow = VelocityHistory(3, depth=1)
    shallow.push((0, 3), [0.8] * 3, at(line, 0.8))
    assert torch.equal(trained().apply(shallow, 1, (0, 3), (0.6,) * 3)[0], at(line, 0.8))


def test_the_first_segment_uses_what_it_is_told_to() -> None:
    line = lines(3, 1)
    for choice, expected in (("hold", 1.0), ("sigma_linear", 2.0)):
        correction = trained(CorrectionConfig("seg1_l1", segment0=choice))
        assert correction.apply(two_points(line, 0.6, 0.8), 0, (0, 3), (0.4,) * 3)[1] == pytest.approx(expected)


def test_a_denominator_that_says_nothing_gives_lambda_one() -> None:
    correction = ResidualCorrection(CorrectionConfig("seg1_l1"))
    for sigma, value in ((0.8, 1.0), (0.6, 1.0005), (0.4, 3.0)):
        correction.record(0, (0, 1), [sigma], torch.full((1, 3, 1, 2, 2), value))
    assert correction.scale(1, (0, 1), [0.4], [0.6], [0.8]) == (1.0,)
    assert correction.scale(1, (0, 1), [0.4], [0.6], [0.6]) == (1.0,)


def test_a_trajectory_that_is_not_finite_gives_lambda_one() -> None:
    correction = ResidualCorrection(PAPER)
    for sigma in (0.8, 0.6, 0.4):
        correction.record(0, (0, 1), [sigma], torch.full((1, 3, 1, 2, 2), math.nan if sigma == 0.6 else sigma))
    assert correction.scale(1, (0, 1), [0.4], [0.6], [0.8]) == (1.0,)


def test_frames_on_their_own_schedules_have_their_own_lambda() -> None:
    """Two chunks, the second two rows behind the first; each has the trajectory of its own noise levels."""
    correction, line = ResidualCorrection(PAPER), lines(4, 0)
    for row in range(8):
        sigmas = [1.0 - 0.1 * row] * 2 + [1.0 - 0.1 * max(row - 2, 0)] * 2
        velocity = torch.cat([at(line, sigmas[0])[:, :, :2], at(line, sigmas[2])[:, :, 2:]], 2)
        correction.record(0, (0, 4), sigmas, velocity, mask=[True, True, row >= 2, row >= 2])
    t, a, b = [0.5, 0.5, 0.7, 0.7], [0.6, 0.6, 0.8, 0.8], [0.7, 0.7, 0.9, 0.9]
    found = correction.scale(1, (0, 4), t, a, b)
    expected = [(progress(t[i]) - progress(b[i])) / (progress(a[i]) - progress(b[i])) for i in range(4)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[0] == found[1] and found[2] == found[3] and found[0] != found[2]


def test_frames_the_first_segment_did_not_have_are_held_and_said_so() -> None:
    correction = trained(frames=2)
    assert correction.scale(1, (2, 4), [0.4] * 2, [0.6] * 2, [0.8] * 2) == (1.0, 1.0)
    assert correction.note == "The first segment has no trajectory of latent frames 2, 3; their velocity is held."
    both = correction.scale(1, (1, 3), [0.4] * 2, [0.6] * 2, [0.8] * 2)
    assert both[0] == both[1] != 1.0 and "the others stand in" in correction.note
    assert correction.scale(1, (0, 2), [0.4] * 2, [0.6] * 2, [0.8] * 2)[0] != 1.0 and correction.note is None


def test_a_scene_cut_is_not_corrected() -> None:
    correction = trained()
    correction.mark_scene_cut(2)
    assert correction.scale(2, (0, 1), [0.4], [0.6], [0.8]) == (1.0,)
    assert "scene cut" in correction.note
    assert correction.scale(1, (0, 1), [0.4], [0.6], [0.8]) != (1.0,)
    assert is_scene_cut(0.6, [0.1, 0.1, 0.3]) and not is_scene_cut(0.4, [0.1, 0.1, 0.3])
    assert not is_scene_cut(9.0, []) and not is_scene_cut(math.nan, [0.1])


def test_only_the_first_segment_is_recorded_and_only_for_the_papers_lambda() -> None:
    correction = trained()
    scalars = len(LEVELS) * 3 * 3 * 4 * 4
    assert correction.nbytes == scalars * 4
    for _ in range(2):
        correction.record(1, (0, 3), [0.8] * 3, at(lines(3, 1), 0.8))
        assert correction.nbytes == scalars * 8
    assert trained(CorrectionConfig("sigma_linear")).nbytes == 0
    correction.reset()
    assert correction.nbytes == 0


def test_a_repeated_level_replaces_its_knot_and_a_risen_one_starts_again() -> None:
    line, broken = lines(3, 0), torch.full((1, 3, 3, 4, 4), 50.0)
    expected = trained(levels=[0.8, 0.6, 0.4]).scale(1, (0, 3), [0.4] * 3, [0.6] * 3, [0.8] * 3)
    for extra in ([(0.8, broken), (0.8, None)], [(0.5, broken), (0.3, broken), (0.8, None)]):
        correction = ResidualCorrection(PAPER)
        for sigma, velocity in [*extra, (0.6, None), (0.4, None)]:
            correction.record(0, (0, 3), [sigma] * 3, at(line, sigma) if velocity is None else velocity)
        assert correction.scale(1, (0, 3), [0.4] * 3, [0.6] * 3, [0.8] * 3) == pytest.approx(expected)


def test_later_windows_may_have_another_resolution() -> None:
    """Lambda is a number: the trajectory of a small first segment serves a larger one."""
    correction, line = trained(), lines(3, 1, batch=2, size=6)
    found, _ = correction.apply(two_points(line, 0.6, 0.8), 1, (0, 3), (0.4,) * 3)
    torch.testing.assert_close(found, at(line, 0.4), atol=1e-4, rtol=1e-4)


def test_a_config_refuses_what_has_no_meaning() -> None:
    cases = [
        ({"source": "taylor"}, "'taylor' is not known"),
        ({"segment0": "seg1_l1"}, "segment0 'seg1_l1'"),
        ({"clamp": (1.5, 3.0)}, "around 1"),
        ({"clamp": (0.5, math.inf)}, "around 1"),
        ({"sketch": 0}, "sketch 0"),
        ({"min_denominator": -1.0}, "min_denominator -1.0"),
    ]
    for options, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            CorrectionConfig(**options)


def test_the_first_segment_reads_nothing_back_from_the_device() -> None:
    """Tensors on ``meta`` have no values to read."""
    correction, history = ResidualCorrection(PAPER), VelocityHistory(3)
    for sigma in (0.9, 0.8, 0.7):
        velocity = torch.empty(1, 3, 3, 4, 4, device="meta")
        history.push((0, 3), [sigma] * 3, velocity)
        correction.record(0, (0, 3), [sigma] * 3, velocity)
    assert correction.apply(history, 0, (0, 3), (0.6,) * 3)[0].shape == (1, 3, 3, 4, 4)
