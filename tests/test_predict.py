"""Predictions follow their formulas in float32 to the last few digits, and their bounds hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from accel.history import VelocityHistory
from accel.predict import Guards, extrapolate, hold, predict

UNBOUNDED = Guards(alpha_max=None, correction_max=None, curvature_max=None)
ORDERS = [0, 1, 2, "newton2", "auto"]


def formula(s: list[float], v: list[Tensor], goal: float, order: int | str) -> Tensor:
    """The closed forms of the paper in float64, for distinct noise levels."""
    v = [entry.double() for entry in v]
    if order == "auto":
        order = 2 if len(s) > 2 and abs(goal - s[0]) <= 0.5 * abs(s[0] - s[1]) else 1
    d = goal - s[0]
    if order == 0 or len(s) < 2:
        return v[0]
    d0 = s[0] - s[1]
    f1 = (v[0] - v[1]) / d0
    if order == 1 or len(s) < 3:
        return v[0] + f1 * d
    d1 = s[1] - s[2]
    f2 = (v[1] - v[2]) / d1
    if order == 2:
        return v[0] + f1 * d + (f1 - f2) / (d0 + d1) * d**2
    return v[0] + f1 * d + (f1 - f2) / (s[0] - s[2]) * d * (d + d0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def falling(draw: st.DrawFn, most: int = 4) -> tuple[list[float], float]:
    """Noise levels newest first, at least 0.02 apart, and a target below them."""
    gaps = [draw(st.floats(0.02, 0.2)) for _ in range(draw(st.integers(1, most)) + 1)]
    levels = [1.0 - sum(gaps[: index + 1]) for index in range(len(gaps))]
    return levels[-2::-1], levels[-1]


def recorded(levels: list[float], velocities: Tensor, frames: int | None = None) -> VelocityHistory:
    """A history of ``velocities`` ``[n, B, C, T, H, W]``, newest first."""
    width = velocities.shape[3]
    history = VelocityHistory(frames or width, depth=max(len(levels), 1))
    for sigma, velocity in list(zip(levels, velocities, strict=True))[::-1]:
        history.push((0, width), [sigma] * width, velocity)
    return history


def rms(value: Tensor) -> Tensor:
    """Per latent frame of each batch entry, ``[B, T]``."""
    return value.double().square().mean(dim=(1, 3, 4)).sqrt()


def test_hand_worked_numbers() -> None:
    levels, values = [0.5, 0.7, 0.8], [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])]
    for order, expected in [(0, 1.0), (1, 0.0), (2, 2.0), ("newton2", 4.0), ("auto", 0.0)]:
        assert extrapolate(levels, values, 0.3, order).item() == pytest.approx(expected, abs=1e-5)
    assert extrapolate(levels, values, 0.4, "auto").item() == pytest.approx(0.5 + 0.5, abs=1e-5)


@given(falling(), st.sampled_from(ORDERS))
def test_it_equals_the_closed_form(case: tuple[list[float], float], order: int | str) -> None:
    levels, goal = case
    velocities = random(len(levels), 2, 3)
    expected = formula(levels, list(velocities), goal, order)
    found = extrapolate(levels, velocities, goal, order)
    assert found.dtype == torch.float32
    scale = float(expected.abs().max()) + 1.0
    torch.testing.assert_close(found.double(), expected, atol=2e-5 * scale, rtol=0.0)


@given(falling(), st.sampled_from([1, 2, "newton2", "auto"]))
def test_velocities_linear_in_the_noise_level_are_met_exactly(
    case: tuple[list[float], float], order: int | str
) -> None:
    levels, goal = case
    assume(len(levels) >= 2)
    offset, slope = random(4, seed=1), random(4, seed=2)
    found = extrapolate(levels, [offset + slope * sigma for sigma in levels], goal, order)
    torch.testing.assert_close(found, offset + slope * goal, atol=2e-4, rtol=1e-4)


@given(falling())
def test_quadratics_are_met_by_newton_and_missed_by_equation_seven_by_its_known_error(
    case: tuple[list[float], float],
) -> None:
    levels, goal = case
    assume(len(levels) >= 3)
    values = [torch.tensor([3.0 * sigma**2 - sigma]).double().float() for sigma in levels]
    truth = 3.0 * goal**2 - goal
    assert extrapolate(levels, values, goal, "newton2").item() == pytest.approx(truth, abs=5e-3)
    missed = 3.0 * (goal - levels[0]) * (levels[0] - levels[1])
    assert truth - extrapolate(levels, values, goal, 2).item() == pytest.approx(missed, abs=5e-3)


@given(falling(most=3), st.sampled_from(ORDERS))
def test_noise_levels_per_frame_equal_one_frame_at_a_time(case: tuple[list[float], float], order: int | str) -> None:
    levels, goal = case
    n = len(levels)
    sigmas = torch.tensor(levels, dtype=torch.float64)[:, None, None] * torch.tensor([[1.0, 0.9], [0.8, 0.7]])
    target = goal * torch.tensor([[1.0, 0.9], [0.8, 0.7]], dtype=torch.float64)
    velocities = random(n, 2, 3, 2, 4, 4)
    found = extrapolate(sigmas, velocities, target, order)
    for batch in range(2):
        for frame in range(2):
            one = extrapolate(
                sigmas[:, batch, frame].tolist(), velocities[:, batch, :, frame], target[batch, frame].item(), order
            )
            torch.testing.assert_close(found[batch, :, frame], one, atol=1e-4, rtol=1e-4)


def test_every_form_of_noise_levels_means_the_same() -> None:
    levels, goal = [0.5, 0.7, 0.8], 0.4
    velocities = random(3, 2, 3, 4, 2, 2)
    expected = extrapolate(levels, list(velocities), goal, 2)
    full = torch.tensor(levels)[:, None, None].expand(3, 2, 4)
    forms = [torch.tensor(levels), full, full[:, 0], [full[0], full[1], full[2]]]
    for sigmas in forms:
        for target in (goal, torch.tensor(goal), torch.full((4,), goal), torch.full((2, 4), goal)):
            torch.testing.assert_close(extrapolate(sigmas, velocities, target, 2), expected, atol=1e-5, rtol=1e-5)


def test_too_few_points_lower_the_order() -> None:
    levels, velocities = [0.5, 0.7, 0.8], random(3, 4)
    assert torch.equal(extrapolate(levels[:1], velocities[:1], 0.4, 2), velocities[0])
    two = extrapolate(levels[:2], velocities[:2], 0.4, 2)
    assert torch.equal(two, extrapolate(levels, velocities, 0.4, 1))


def test_equal_noise_levels_give_the_newest_value_and_equal_older_ones_the_first_order() -> None:
    velocities = random(3, 4)
    for order in ORDERS:
        assert torch.equal(extrapolate([0.5, 0.5, 0.8], velocities, 0.4, order), velocities[0])
        assert torch.equal(extrapolate([0.5, 0.7, 0.8], velocities, 0.5, order), velocities[0])
    lower = extrapolate([0.5, 0.7, 0.7], velocities, 0.4, 2)
    assert torch.equal(lower, extrapolate([0.5, 0.7], velocities[:2], 0.4, 1))


def test_the_answer_is_float32_and_never_the_stored_tensor() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        velocities = random(2, 4).to(dtype)
        found = extrapolate([0.5, 0.7], velocities, 0.4, 0)
        assert found.dtype == torch.float32
        found.zero_()
        assert velocities[0].abs().sum() > 0


def test_what_has_no_meaning_is_refused() -> None:
    velocities = random(2, 4)
    with pytest.raises(ValueError, match="order 3 is not known"):
        extrapolate([0.5, 0.7], velocities, 0.4, 3)
    with pytest.raises(ValueError, match="at least one"):
        extrapolate([], [], 0.4, 1)
    with pytest.raises(ValueError, match="one noise level each"):
        extrapolate([0.5], velocities, 0.4, 1)
    with pytest.raises(ValueError, match=r"\[B, C, T, H, W\]"):
        extrapolate([0.5, 0.7], velocities, torch.tensor([0.4, 0.3]), 1)
    with pytest.raises(ValueError, match="alpha_max -1"):
        Guards(alpha_max=-1)


@given(falling(), st.sampled_from(ORDERS))
def test_an_unguarded_prediction_is_the_extrapolation(case: tuple[list[float], float], order: int | str) -> None:
    levels, goal = case
    velocities = random(len(levels), 2, 3, 4, 2, 2)
    history = recorded(levels, velocities)
    found = predict(history, (1, 3), (goal, goal), order, UNBOUNDED)
    expected = extrapolate(levels, velocities[:, :, :, 1:3], goal, order)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_each_frame_is_predicted_from_what_it_has() -> None:
    """Frame 0 has three points, frame 1 two, frame 2 one; frame 3 stands still."""
    history = VelocityHistory(4)
    rows = [random(1, 2, 4, 2, 2, seed=seed) for seed in range(3)]
    history.push((0, 4), [0.9, 0.9, 0.9, 0.5], rows[0], mask=[True, False, False, True])
    history.push((0, 4), [0.8, 0.9, 0.9, 0.4], rows[1], mask=[True, True, False, True])
    history.push((0, 4), [0.7, 0.8, 0.9, 0.3], rows[2])
    found = predict(history, (0, 4), (0.65, 0.7, 0.8, 0.3), 2, UNBOUNDED)
    frame = [[row[:, :, index] for row in rows[::-1]] for index in range(4)]
    torch.testing.assert_close(found[:, :, 0], extrapolate([0.7, 0.8, 0.9], frame[0], 0.65, 2))
    torch.testing.assert_close(found[:, :, 1], extrapolate([0.8, 0.9], frame[1][:2], 0.7, 1))
    assert torch.equal(found[:, :, 2], frame[2][0])
    assert torch.equal(found[:, :, 3], frame[3][0])


@given(falling(), st.sampled_from(ORDERS), st.floats(0.0, 0.5), st.floats(0.1, 30.0))
def test_a_correction_never_exceeds_its_bound(
    case: tuple[list[float], float], order: int | str, bound: float, size: float
) -> None:
    levels, goal = case
    velocities = random(len(levels), 2, 3, 2, 2, 2)
    velocities[1:] *= size
    history = recorded(levels, velocities)
    found = predict(history, (0, 2), (goal, goal), order, Guards(correction_max=bound))
    moved = rms(found.double() - velocities[0].double())
    assert (moved <= bound * rms(velocities[0]) * 1.0001 + 1e-5).all()


def test_a_prediction_reaches_no_further_than_alpha_max_and_never_back() -> None:
    levels, velocities = [0.5, 0.6], random(2, 1, 2, 1, 2, 2)
    history = recorded(levels, velocities)
    guards = Guards(alpha_max=2.0, correction_max=None)
    far = predict(history, (0, 1), (0.1,), 1, guards)
    torch.testing.assert_close(far, extrapolate(levels, velocities, 0.3, 1))
    assert torch.equal(predict(history, (0, 1), (0.55,), 1, guards), velocities[0])


def test_the_second_order_term_is_scaled_to_the_first() -> None:
    levels = [0.5, 0.6, 0.7]
    newest = random(1, 2, 1, 3, 3)
    velocities = torch.stack([newest, newest + 0.01, newest + 5.0])
    history = recorded(levels, velocities)
    loose = predict(history, (0, 1), (0.45,), 2, UNBOUNDED)
    tight = predict(history, (0, 1), (0.45,), 2, Guards(None, None, curvature_max=1.0))
    first = extrapolate(levels, velocities, 0.45, 1) - newest
    assert rms(loose - newest - first).item() > 100 * rms(first).item()
    assert rms(tight - newest - first).item() == pytest.approx(rms(first).item(), rel=1e-3)


def test_a_bound_on_one_frame_or_clip_leaves_the_others_alone() -> None:
    levels, velocities = [0.5, 0.6], random(2, 2, 3, 2, 2, 2) * 0.01 + 1.0
    wild = velocities.clone()
    wild[1, 1, :, 1] = 100.0
    tame = predict(recorded(levels, velocities), (0, 2), (0.45, 0.45), 1)
    found = predict(recorded(levels, wild), (0, 2), (0.45, 0.45), 1)
    assert torch.equal(found[0], tame[0]) and torch.equal(found[1, :, 0], tame[1, :, 0])
    assert rms(found - velocities[0])[1, 1].item() == pytest.approx(0.35 * rms(velocities[0])[1, 1].item(), rel=1e-3)


def test_a_correction_that_is_not_finite_leaves_the_newest_velocity() -> None:
    levels, velocities = [0.5, 0.6], random(2, 1, 3, 2, 2, 2)
    velocities[1, 0, 0, 1, 0, 0] = math.inf
    for guards in (Guards(), UNBOUNDED):
        found = predict(recorded(levels, velocities), (0, 2), (0.45, 0.45), 1, guards)
        assert torch.equal(found[:, :, 1], velocities[0][:, :, 1])
        assert not torch.equal(found[:, :, 0], velocities[0][:, :, 0])


def test_a_silent_history_predicts_silence() -> None:
    history = recorded([0.5, 0.6, 0.7], torch.zeros(3, 1, 2, 2, 2, 2))
    assert torch.equal(predict(history, (0, 2), (0.45, 0.4), 2), torch.zeros(1, 2, 2, 2, 2))


def test_a_hold_is_the_newest_velocity_and_outlives_later_pushes() -> None:
    history = recorded([0.5], random(1, 1, 2, 3, 2, 2))
    held = hold(history, (0, 3))
    assert torch.equal(held, history.newest((0, 3)))
    kept = held.clone()
    for sigma in (0.4, 0.3, 0.2, 0.1):
        history.push((0, 3), [sigma] * 3, random(1, 2, 3, 2, 2, seed=7))
    assert torch.equal(held, kept)
    assert not torch.equal(held, hold(history, (0, 3)))


def test_a_prediction_needs_a_point_per_frame_and_finite_targets() -> None:
    history = VelocityHistory(3)
    history.push((0, 2), [0.5, 0.5], random(1, 2, 2, 2, 2))
    with pytest.raises(ValueError, match="frame 2"):
        predict(history, (0, 3), (0.4, 0.4, 0.4))
    for targets in ((0.4,), (0.4, math.nan)):
        with pytest.raises(ValueError, match="one finite noise level"):
            predict(history, (0, 2), targets)


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors on ``meta`` have no values to read."""
    history = VelocityHistory(3)
    for sigma in (0.9, 0.7, 0.6):
        history.push((0, 3), [sigma] * 3, torch.empty(1, 3, 3, 2, 2, device="meta"))
    assert predict(history, (0, 3), (0.5, 0.5, 0.55), "newton2").shape == (1, 3, 3, 2, 2)
