"""Every latent frame is solved as if it were alone, by the numbers of the public reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from accel.call import Family
from accel.schedule import StepMatrix, flow_sigmas, skyreels_sigmas, step_matrix, timesteps
from accel.solver import EulerSolver, Solver, UniPCSolver

SOLVERS = [EulerSolver, UniPCSolver]


def field(x: Tensor, sigma: Tensor | float) -> Tensor:
    """A velocity that depends on everything a model's does, but on no other latent frame."""
    return 0.6 * x - 0.2 * torch.cos(3 * x) + 0.4 * sigma


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def run(solver: Solver, matrix: StepMatrix, x: Tensor, windows: list[tuple[int, int]] | None = None) -> Tensor:
    """A whole segment; ``field`` stands for the model."""
    sigmas = matrix.sigmas(solver.table)
    for row, (start, end) in enumerate(windows or [(0, matrix.frames)] * matrix.rows):
        part = x[:, :, start:end]
        velocity = field(part, sigmas[row, start:end].to(x.dtype)[:, None, None])
        steps, active = matrix.index[row, start:end].tolist(), matrix.active[row, start:end].tolist()
        part = solver.step(part, velocity, steps, active, (start, end))
        x = torch.cat([x[:, :, :start], part, x[:, :, end:]], dim=2)
    return x


def alone(kind: type[Solver], table: Tensor, x: Tensor) -> Tensor:
    """Each latent frame by a solver of its own."""
    frames = [run(kind(table, 1), step_matrix(1, len(table) - 1), frame) for frame in x.split(1, dim=2)]
    return torch.cat(frames, dim=2)


def test_unipc_equals_the_reference(golden) -> None:
    for case in golden("scheduler_unipc")["trajectories"]:
        table = skyreels_sigmas(case["steps"], case["shift"])
        states = torch.tensor(case["states"], dtype=torch.float64)
        x = torch.sin(0.9 * torch.arange(8, dtype=torch.float64) + 0.2).view(1, 1, 1, 1, 8)
        solver = UniPCSolver(table, 1)
        for k, shown in enumerate(timesteps(table)[:-1].tolist(), 1):
            velocity = 0.6 * x - 0.2 * torch.cos(3 * x) + 0.0004 * shown
            x = solver.step(x, velocity, (k,), (True,))
            assert torch.allclose(x.flatten(), states[k], rtol=0, atol=2e-7), (case["steps"], k)


def test_euler_follows_a_straight_line_exactly() -> None:
    x, velocity = noise(1, 2, 3, 2, 2), noise(1, 2, 3, 2, 2) + 1
    solver = EulerSolver([1, 0.7, 0.2, 0], 3)
    after = solver.step(x, velocity, (1, 2, 3), (True, True, True))
    lengths = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64).view(1, 1, 3, 1, 1)
    assert torch.allclose(after, x - lengths * velocity, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize("table", [flow_sigmas(4, 3), skyreels_sigmas(6), flow_sigmas(1)])
def test_a_perfect_velocity_gives_the_clean_latent(kind: type[Solver], table: Tensor) -> None:
    clean, x = noise(1, 2, 3, 2, 2) + 3, noise(1, 2, 3, 2, 2)
    x = (1 - table[0]) * clean + table[0] * x
    solver = kind(table, 3)
    for k in range(1, solver.steps + 1):
        x = solver.step(x, (x - clean) / table[k - 1], [k] * 3, [True] * 3)
    assert torch.allclose(x, clean, rtol=0, atol=1e-12)


def test_unipc_is_closer_to_the_trajectory_than_euler() -> None:
    x = noise(1, 1, 1, 1, 8)

    def end(kind: type[Solver], steps: int) -> Tensor:
        return run(kind(flow_sigmas(steps, 3), 1), step_matrix(1, steps), x)

    exact = end(EulerSolver, 5000)
    for steps in (16, 20, 50):
        assert (end(UniPCSolver, steps) - exact).norm() < 0.3 * (end(EulerSolver, steps) - exact).norm()


@pytest.mark.parametrize("kind", SOLVERS)
@given(
    blocks=st.integers(1, 4),
    block=st.integers(1, 3),
    steps=st.integers(1, 7),
    ar_step=st.integers(0, 8),
    prefix=st.integers(0, 3),
    shift=st.sampled_from([1.0, 3.0, 8.0]),
    from_noise=st.booleans(),
)
def test_each_latent_frame_is_solved_as_if_alone(
    kind: type[Solver],
    blocks: int,
    block: int,
    steps: int,
    ar_step: int,
    prefix: int,
    shift: float,
    from_noise: bool,
) -> None:
    prefix = min(prefix, blocks - 1) * block
    matrix = step_matrix(blocks * block, steps, ar_step, block, prefix)
    table = flow_sigmas(steps, shift) if from_noise else skyreels_sigmas(steps, shift)
    x = noise(2, 3, matrix.frames, 2, 2)
    after = run(kind(table, matrix.frames), matrix, x)
    assert torch.equal(after[:, :, :prefix], x[:, :, :prefix])
    assert torch.allclose(after[:, :, prefix:], alone(kind, table, x[:, :, prefix:]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", SOLVERS)
def test_state_belongs_to_the_latent_frame_not_to_its_place_in_the_window(kind: type[Solver]) -> None:
    matrix = step_matrix(12, 6, ar_step=3, block=2, window=6)
    table, x = skyreels_sigmas(6), noise(1, 2, 12, 2, 2)
    whole = run(kind(table, 12), matrix, x)
    for windows in (matrix.valid_intervals(), matrix.suffix_windows(), matrix.active_intervals()):
        assert torch.equal(run(kind(table, 12), matrix, x, windows), whole)


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inactive_latent_frames_and_the_input_stay_as_they_are(kind: type[Solver], dtype: torch.dtype) -> None:
    x = noise(1, 2, 3, 2, 2, dtype=dtype)
    before, velocity = x.clone(), noise(1, 2, 3, 2, 2, dtype=dtype)
    velocity[:, :, [0, 2]] = math.nan
    solver = kind(flow_sigmas(3, 3), 3)
    after = solver.step(x, velocity, (0, 1, 4), (False, True, False))
    after = solver.step(after, velocity, (0, 2, 4), (False, True, False))
    assert after.dtype == dtype and torch.equal(x, before)
    assert torch.equal(after[:, :, [0, 2]], x[:, :, [0, 2]])
    assert after.isfinite().all() and not torch.equal(after[:, :, 1], x[:, :, 1])


@pytest.mark.parametrize("kind", SOLVERS)
def test_single_precision_follows_double(kind: type[Solver]) -> None:
    matrix, table, x = step_matrix(4, 10, ar_step=3), flow_sigmas(10, 5), noise(1, 2, 4, 2, 2)
    single = run(kind(table, 4), matrix, x.float())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), run(kind(table, 4), matrix, x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", SOLVERS)
def test_half_precision_latents_are_solved_in_single_precision(kind: type[Solver]) -> None:
    table = flow_sigmas(2, 3)
    half = noise(1, 1, 1, 4, 4, dtype=torch.bfloat16)
    velocity = noise(1, 1, 1, 4, 4).float() + 1
    after = kind(table, 1).step(half, velocity, (1,), (True,))
    assert torch.equal(after, kind(table, 1).step(half.float(), velocity, (1,), (True,)).bfloat16())
    assert kind(table, 1).step(half.float(), velocity, (1,), (True,)).dtype == torch.float32


def test_families() -> None:
    assert (EulerSolver.family, UniPCSolver.family) == (Family.ODE, Family.MULTISTEP)


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize(
    ("steps", "active", "frames", "message"),
    [
        ((1, 1), (True, True), (3, 5), r"window \[3, 5\) does not lie in the 4 latent frames"),
        ((1, 1), (True, True), (2, 2), "does not lie"),
        ((1, 1), (True, True), None, r"window \[0, 4\) needs"),
        ((1,), (True, True), (0, 2), "needs .* got"),
        ((1, 4), (True, True), (0, 2), "latent frame 1 cannot take step 4; it has 1 to 3"),
        ((0, 1), (True, True), (2, 4), "latent frame 2 cannot take step 0"),
    ],
)
def test_refuses_what_does_not_fit(kind: type[Solver], steps: tuple, active: tuple, frames, message: str) -> None:
    x = noise(1, 1, 2, 2, 2)
    with pytest.raises(ValueError, match=f"{kind.__name__}: .*{message}"):
        kind(flow_sigmas(3), 4).step(x, x, steps, active, frames)


@pytest.mark.parametrize("kind", SOLVERS)
def test_refuses_tables_and_segments_it_cannot_solve(kind: type[Solver]) -> None:
    with pytest.raises(ValueError, match="Noise table"):
        kind([1.0, 0.5], 3)
    with pytest.raises(ValueError, match="0 latent frames"):
        kind(flow_sigmas(3), 0)


def test_unipc_refuses_steps_out_of_order_and_keeps_its_state() -> None:
    x = noise(1, 1, 2, 2, 2)
    solver, twin = (UniPCSolver(flow_sigmas(3), 2) for _ in range(2))
    for one in (solver, twin):
        one.step(x, x, (1, 0), (True, False))
    for steps in ((1, 1), (3, 1), (2, 2)):
        with pytest.raises(ValueError, match="in order, so use a new one for each segment"):
            solver.step(x, x, steps, (True, True))
    with pytest.raises(ValueError, match="keeps its batch, channels, height and width"):
        solver.step(x[..., :1], x[..., :1], (2, 1), (True, True))
    assert torch.equal(solver.step(x, x, (2, 1), (True, True)), twin.step(x, x, (2, 1), (True, True)))
