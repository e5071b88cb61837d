"""The history holds the last true velocities of each latent frame, wherever the window stands."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from accel.history import VelocityHistory


def velocity(width: int, value: float = 0.0, batch: int = 2) -> Tensor:
    """``[B, 3, T, 2, 2]`` of distinct numbers around ``value``."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(batch, 3, width, 2, 2, generator=generator) + value


@st.composite
def pushes(draw: st.DrawFn) -> list[tuple[tuple[int, int], list[float], list[bool] | None, float]]:
    """Windows that move and grow over 5 frames, each frame's noise falling, standing or rising, some frames masked."""
    steps = []
    for index in range(draw(st.integers(1, 9))):
        start = draw(st.integers(0, 4))
        end = draw(st.integers(start + 1, 5))
        sigmas = [draw(st.sampled_from([0.2, 0.4, 0.6, 0.8, 1.0])) for _ in range(end - start)]
        mask = draw(st.none() | st.lists(st.booleans(), min_size=end - start, max_size=end - start))
        steps.append(((start, end), sigmas, mask, float(index)))
    return steps


def naive(steps: list, depth: int) -> list[list[tuple[float, Tensor]]]:
    """The same rules with one Python list per frame."""
    frames: list[list[tuple[float, Tensor]]] = [[] for _ in range(5)]
    for (start, end), sigmas, mask, value in steps:
        moved = velocity(end - start, value)
        for offset in range(end - start):
            if mask is not None and not mask[offset]:
                continue
            entries = frames[start + offset]
            if entries and sigmas[offset] > entries[0][0]:
                entries.clear()
            elif entries and sigmas[offset] == entries[0][0]:
                entries.pop(0)
            entries.insert(0, (sigmas[offset], moved[:, :, offset]))
            del entries[depth:]
    return frames


@given(pushes(), st.integers(1, 4))
def test_it_equals_a_list_per_frame(steps: list, depth: int) -> None:
    history = VelocityHistory(5, depth)
    for frames, sigmas, mask, value in steps:
        history.push(frames, sigmas, velocity(frames[1] - frames[0], value), mask)
    expected = naive(steps, depth)
    assert history.count((0, 5)) == tuple(len(entries) for entries in expected)
    assert history.levels((0, 5)) == tuple(tuple(sigma for sigma, _ in entries) for entries in expected)
    if not any(expected):
        return
    sigmas, velocities, counts = history.points((0, 5))
    assert sigmas.shape == (max(counts), 5) and velocities.shape == (max(counts), 2, 3, 5, 2, 2)
    for frame, entries in enumerate(expected):
        for index, (sigma, value) in enumerate(entries):
            assert sigmas[index, frame].item() == pytest.approx(sigma)
            assert torch.equal(velocities[index, :, :, frame], value)
        if entries:
            assert torch.equal(history.newest((frame, frame + 1))[:, :, 0], entries[0][1])


@given(pushes(), st.integers(1, 3))
def test_a_weighted_sum_reads_the_same_entries(steps: list, depth: int) -> None:
    history = VelocityHistory(5, depth)
    for frames, sigmas, mask, value in steps:
        history.push(frames, sigmas, velocity(frames[1] - frames[0], value), mask)
    counts = history.count((0, 5))
    if not all(counts):
        with pytest.raises(ValueError, match="no velocity is stored for frame"):
            history.combine((0, 5), torch.ones(1, 5))
        return
    weights = torch.randn(max(counts), 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for frame, count in enumerate(counts):
        weights[count:, frame] = 0.0
    _, velocities, _ = history.points((0, 5))
    expected = torch.einsum("nt,nbcthw->bcthw", weights, velocities.double())
    torch.testing.assert_close(history.combine((0, 5), weights).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_repeated_noise_level_replaces_and_a_risen_one_starts_again() -> None:
    history = VelocityHistory(1)
    for sigma in (0.9, 0.6, 0.6 + 5e-7):
        history.push((0, 1), [sigma], velocity(1, sigma))
    assert history.levels((0, 1)) == ((0.6 + 5e-7, 0.9),)
    history.push((0, 1), [0.6 + 5e-6], velocity(1))
    assert history.levels((0, 1)) == ((0.6 + 5e-6,),)


def test_a_moved_window_still_finds_its_frames() -> None:
    history = VelocityHistory(6)
    first = velocity(4)
    history.push((0, 4), [0.8] * 4, first)
    history.push((2, 6), [0.5] * 4, velocity(4, 9.0))
    assert history.count((0, 6)) == (1, 1, 2, 2, 1, 1)
    _, velocities, _ = history.points((1, 3))
    assert torch.equal(velocities[0, :, :, 0], first[:, :, 1])
    assert torch.equal(velocities[1, :, :, 1], first[:, :, 2])


def test_a_frame_with_fewer_entries_repeats_its_oldest_noise_level() -> None:
    history = VelocityHistory(3)
    history.push((0, 1), [0.8], velocity(1))
    history.push((0, 2), [0.5, 0.9], velocity(2))
    sigmas, _, counts = history.points((0, 3))
    assert counts == (2, 1, 0)
    torch.testing.assert_close(sigmas[:, :2], torch.tensor([[0.5, 0.9], [0.8, 0.9]]))
    assert all(math.isnan(sigma) for sigma in sigmas[:, 2].tolist())


def test_frames_pushed_together_are_read_without_a_copy() -> None:
    history = VelocityHistory(4)
    for sigma in (0.9, 0.7, 0.5):
        history.push((0, 4), [sigma] * 4, velocity(4, sigma))
    storage = history.newest((0, 4)).untyped_storage().data_ptr()
    assert history.points((1, 3))[1].untyped_storage().data_ptr() == storage


def test_a_frame_that_joins_later_shares_the_slots_of_the_others() -> None:
    history = VelocityHistory(4)
    history.push((0, 2), [0.9] * 2, velocity(2))
    history.push((0, 2), [0.8] * 2, velocity(2))
    for sigma in (0.7, 0.6):
        history.push((0, 4), [sigma, sigma, sigma + 0.2, sigma + 0.2], velocity(4))
    storage = history.newest((0, 2)).untyped_storage().data_ptr()
    assert history.newest((0, 4)).untyped_storage().data_ptr() == storage


def test_the_callers_tensor_is_copied_and_left_alone() -> None:
    history = VelocityHistory(2)
    given_velocity = velocity(2)
    before = given_velocity.clone()
    history.push((0, 2), [0.5, 0.5], given_velocity)
    given_velocity.fill_(7.0)
    assert torch.equal(history.newest((0, 2)), before)


def test_sixteen_bit_velocities_are_stored_in_full_precision() -> None:
    history = VelocityHistory(2)
    half = velocity(2).bfloat16()
    history.push((0, 2), [0.5, 0.5], half)
    assert history.newest((0, 2)).dtype == torch.float32
    assert torch.equal(history.newest((0, 2)), half.float())


def test_its_size_is_depth_times_the_segment_and_clearing_keeps_the_memory() -> None:
    history = VelocityHistory(4, depth=3)
    assert history.nbytes == 0
    history.push((0, 2), [0.5, 0.5], velocity(2))
    assert history.nbytes == 3 * 2 * 3 * 4 * 2 * 2 * 4
    history.clear()
    assert history.count((0, 4)) == (0, 0, 0, 0)
    assert history.nbytes == 3 * 2 * 3 * 4 * 2 * 2 * 4


def test_another_shape_is_refused_until_the_history_is_cleared() -> None:
    history = VelocityHistory(2)
    history.push((0, 2), [0.5, 0.5], velocity(2))
    with pytest.raises(ValueError, match="clear the history"):
        history.push((0, 2), [0.4, 0.4], velocity(2, batch=1))
    history.clear()
    history.push((0, 2), [0.4, 0.4], velocity(2, batch=1))
    assert history.newest((0, 2)).shape == (1, 3, 2, 2, 2)


def test_what_cannot_be_recorded_is_refused_and_leaves_the_history_as_it_was() -> None:
    history = VelocityHistory(3)
    history.push((0, 3), [0.5] * 3, velocity(3))
    for frames, sigmas, width in [((2, 4), [0.4] * 2, 2), ((0, 2), [0.4], 2), ((0, 2), [0.4] * 2, 3)]:
        with pytest.raises(ValueError, match="window"):
            history.push(frames, sigmas, velocity(width))
    with pytest.raises(ValueError, match="sigma nan of frame 1"):
        history.push((0, 2), [0.4, math.nan], velocity(2))
    assert history.levels((0, 3)) == ((0.5,),) * 3
    history.push((0, 2), [0.4, math.nan], velocity(2), mask=[True, False])
    assert history.count((0, 3)) == (2, 1, 1)


def test_an_empty_history_says_so() -> None:
    history = VelocityHistory(2)
    with pytest.raises(ValueError, match="compute the call instead"):
        history.newest((0, 1))
    with pytest.raises(ValueError, match="no velocity is stored"):
        history.points((0, 2))
    with pytest.raises(ValueError, match="frames and depth"):
        VelocityHistory(0)


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors on ``meta`` have no values to read."""
    history = VelocityHistory(4)
    for sigma in (0.9, 0.7):
        history.push((0, 3), [sigma] * 3, torch.empty(1, 3, 3, 2, 2, device="meta"))
    history.push((1, 4), [0.5, 0.5, 0.9], torch.empty(1, 3, 3, 2, 2, device="meta"), mask=[True, False, True])
    assert history.points((0, 4))[1].shape == (3, 1, 3, 4, 2, 2)
    assert history.combine((0, 4), torch.ones(1, 4)).device.type == "meta"
