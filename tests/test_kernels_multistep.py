"""One pass takes a linear multistep step of every latent frame, with coefficients of its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accel.history import VelocityHistory
from accel.kernels import choose
from accel.kernels.multistep import linear_step, supports, traffic
from accel.predict import Guards, predict, weights
from accel.schedule import flow_sigmas
from accel.solver import EulerSolver
from tests.kernel_counts import counted
from tests.triton_interpreter import interpreted, needs_triton

ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
UNGUARDED = Guards(None, None, None)


def latents(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(velocities: Tensor, table: Tensor, x: Tensor | None = None, moving: list[bool] | None = None) -> Tensor:
    """Both forms give what float64 gives, and the kernel moves what ``traffic`` says."""
    spread = (table if table.ndim == 3 else table[:, None])[:, :, None, :, None, None].double()
    expected = (velocities.double() * spread).sum(0)
    if x is not None:
        moves = torch.tensor(moving)[:, None, None]
        expected = torch.where(moves, x.double() + expected, x.double())
    plain = linear_step(velocities, table, x, moving, backend="torch")
    with interpreted() as launches:
        found = linear_step(velocities, table, x, moving, backend="triton")
    dtype = torch.float32 if x is None else x.dtype
    assert plain.dtype == found.dtype == dtype and plain.shape == found.shape == velocities.shape[1:]
    bound = ROUNDING[dtype] * max(1.0, float(expected.abs().max())) * (1 + table.abs().sum(0).max())
    assert (plain.double() - expected).abs().max() <= bound
    assert (found.double() - expected).abs().max() <= bound
    assert launches.traffic == traffic(velocities, table, x, moving)
    return found


@needs_triton
@pytest.mark.parametrize("dtype", ROUNDING)
def test_frames_with_coefficients_of_their_own(dtype) -> None:
    """Of one and of every batch entry, where some velocities are not wanted and one frame stands still."""
    history, x = latents(3, 2, 3, 4, 5, 7), latents(2, 3, 4, 5, 7, dtype=dtype, seed=1)
    table = latents(3, 4, seed=2).double()
    table[2, 1] = table[:, 3] = 0.0
    found = check(history, table, x, [True, True, True, False])
    assert torch.equal(found[:, :, 3], x[:, :, 3])
    check(history, latents(3, 2, 4, seed=3), x, [True] * 4)
    check(history, table)


@needs_triton
@settings(max_examples=10)
@given(
    points=st.integers(1, 3),
    batch=st.integers(1, 2),
    channels=st.integers(1, 3),
    frames=st.integers(1, 4),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(tuple(ROUNDING)),
    velocity_dtype=st.sampled_from(tuple(ROUNDING)),
    seed=st.integers(0, 99),
)
def test_any_sizes_in_any_dtypes(points, batch, channels, frames, size, dtype, velocity_dtype, seed) -> None:
    velocities = latents(points, batch, channels, frames, *size, dtype=velocity_dtype, seed=seed)
    table = latents(points, frames, seed=seed + 1) * (latents(points, frames, seed=seed + 2) > 0)
    check(velocities, table, latents(batch, channels, frames, *size, dtype=dtype), [True] * frames)


@needs_triton
def test_more_scalars_than_one_program_takes() -> None:
    check(latents(1, 1, 1, 2, 40, 60), torch.tensor([[0.5, -2.0]]), latents(1, 1, 2, 40, 60, seed=1), [True, True])


@needs_triton
def test_a_velocity_that_is_not_wanted_may_hold_anything() -> None:
    velocities, table = latents(2, 1, 1, 2, 3, 3), torch.tensor([[1.0, 1.0], [0.5, 0.0]])
    velocities[1, :, :, 1] = math.nan
    with interpreted():
        assert linear_step(velocities, table, backend="triton").isfinite().all()


@needs_triton
@pytest.mark.parametrize("order", [0, 1, 2, "newton2"])
def test_prediction_and_euler_in_one_pass_equal_the_two_after_each_other(order, monkeypatch) -> None:
    """Frames at noise levels of their own with 3, 2 and 1 stored velocities, in a window of a longer segment."""
    table, frames = flow_sigmas(10, 3.0), (1, 4)
    history, solver = VelocityHistory(5), EulerSolver(table, 5)
    for step, mask in ((1, [True, False, False]), (2, [True, True, False]), (3, [True] * 3)):
        levels = [float(table[step - 1 + offset]) for offset in range(3)]
        history.push(frames, levels, latents(2, 3, 3, 4, 6, seed=step), mask)
    steps = [4, 5, 6]
    targets = [float(table[step - 1]) for step in steps]
    x = latents(2, 3, 3, 4, 6, seed=9)
    velocity = predict(history, frames, targets, order, UNGUARDED)
    apart = solver.step(x, velocity, steps, [True] * 3, frames, False)

    sigmas, stored, counts = history.points(frames)
    linear, curved = weights(sigmas.double(), torch.tensor(targets, dtype=torch.float64), order)
    lengths = torch.tensor([float(table[step] - table[step - 1]) for step in steps], dtype=torch.float64)
    coefficients = linear + curved
    coefficients[0] += 1.0
    with interpreted() as launches:
        together = linear_step(stored[: len(coefficients)], coefficients * lengths, x, [True] * 3, backend="triton")
    assert launches.traffic[0] == 1 and counts == (3, 2, 1)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)

    with interpreted() as launches, monkeypatch.context() as patch:
        patch.setattr(choose, "available", lambda device: (True, ""))
        fast = solver.step(x, predict(history, frames, targets, order, UNGUARDED), steps, [True] * 3, frames, False)
    assert set(launches.names) == {"linear_step"} and len(launches.names) <= 3
    torch.testing.assert_close(fast, apart, rtol=1e-5, atol=1e-5)


def test_a_predicted_step_at_full_size_reads_and_writes_every_scalar_once() -> None:
    """25 latent frames at 540p, 2 stored velocities for 15 frames, 3 for the others; bfloat16 latents."""
    velocities = torch.empty(3, 1, 16, 25, 68, 120, device="meta")
    x = torch.empty(1, 16, 25, 68, 120, dtype=torch.bfloat16, device="meta")
    table = torch.ones(3, 25)
    table[2, :15] = 0.0
    frame = 16 * 68 * 120
    read = (3 * 25 - 15) * frame * 4 + x.nbytes + 4 * 4 * 25
    assert traffic(velocities, table, x, [True] * 25) == (1, read, x.nbytes)


def test_a_full_size_schedule_moves_what_its_steps_need() -> None:
    """25 latent frames at 540p denoised together in 50 steps, bfloat16 latents. Every 5th step and the first three are
    computed; the others extrapolate the last two velocities, so that a skipped step is one pass over them and Euler's
    pass, and a computed one is Euler's pass alone."""
    table, window, active = flow_sigmas(50, 3.0), (0, 25), [True] * 25
    history, solver = VelocityHistory(25), EulerSolver(table, 25)
    x, frame = torch.empty(1, 16, 25, 68, 120, dtype=torch.bfloat16, device="meta"), 16 * 68 * 120
    skipped = 0
    with counted(linear_step, traffic) as counts:
        for step in range(1, 51):
            level = [float(table[step - 1])] * 25
            if step <= 3 or step % 5 == 0:
                velocity = x
                history.push(window, level, velocity)
            else:
                velocity, skipped = predict(history, window, level, 1), skipped + 1
            x = solver.step(x, velocity, [step] * 25, active, window)
    computed = 50 - skipped
    assert (computed, skipped, x.dtype) == (13, 37, torch.bfloat16)
    euler = 50 * (25 * frame * 2 + 2 * 4 * 25) + computed * 25 * frame * 2 + skipped * 25 * frame * 4
    combined = skipped * (2 * 25 * frame * 4 + 3 * 4 * 25)
    assert counts.calls == 50 + skipped
    assert counts.sums == (50 + skipped, euler + combined, 50 * 25 * frame * 2 + skipped * 25 * frame * 4)


def test_what_the_kernel_does_not_take_has_a_reason() -> None:
    velocities, table = latents(1, 1, 1, 2, 3, 3), torch.ones(1, 2)
    assert supports(velocities, table) == (True, "")
    assert supports(velocities.double(), table) == (False, "no kernel for torch.float64")
    assert supports(velocities, table, latents(1, 1, 2, 3, 3).mT, [True, True])[0] is False
