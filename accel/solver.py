"""From a velocity to the next latent, each latent frame at its own noise level and with a history of its own.

In diffusion forcing the latent frames of one window stand at different steps, so a solver here is many small solvers
side by side: ``step`` advances the active latent frames of a window by one step each and leaves the others as they are.
Their state belongs to the latent frame, not to its place in the window. One solver serves one segment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Family
from .kernels.multistep import linear_step
from .readback import on_device
from .schedule import Interval, noise_table


class Solver(ABC):
    """Steps of all latent frames of one segment along the same table of noise levels.

    Args:
        table: N + 1 noise levels, falling from at most 1 to 0; step k goes from ``table[k - 1]`` to ``table[k]``.
        frames: latent frames of the segment.

    Raises:
        ValueError: for a table that is no such (see ``schedule.noise_table``), or less than one latent frame.
    """

    family: Family

    def __init__(self, table: Tensor | Sequence[float], frames: int) -> None:
        self.table = noise_table(table)
        self.steps = self.table.numel() - 1
        self.frames = frames
        if frames < 1:
            raise ValueError(f"{self._name}: a segment has {frames} latent frames; use at least 1.")

    def step(
        self,
        x: Tensor,
        velocity: Tensor,
        steps: Sequence[int],
        active: Sequence[bool],
        frames: Interval | None = None,
        computed: bool | Sequence[bool] = True,
    ) -> Tensor:
        """The window after one solver step of its active latent frames.

        Args:
            x: ``[B, C, T, H, W]`` latents of the window; not changed.
            velocity: ``[B, C, T, H, W]``, noise - x0, of the same latents.
            steps: progress of each latent frame (``Call.steps``); an active one at k takes step k of 1..N.
            active: which latent frames take a step (``Call.active``).
            frames: ``[start, end)`` of the window in the segment (``Call.frames``); None means the whole segment.
            computed: whether the velocity came from the model, of the window or of each latent frame. A held or
                predicted one never corrects a previous step.

        Returns:
            ``[B, C, T, H, W]`` in x's dtype, computed in float32 or better; inactive latent frames are x's own values.

        Raises:
            ValueError: for shapes that do not fit, a window outside the segment, or a step no latent frame can take.
        """
        start, end = (0, self.frames) if frames is None else frames
        width = end - start
        if not 0 <= start < end <= self.frames:
            raise ValueError(f"{self._name}: window [{start}, {end}) does not lie in the {self.frames} latent frames.")
        if x.ndim != 5 or x.shape != velocity.shape or not x.shape[2] == len(steps) == len(active) == width:
            raise ValueError(
                f"{self._name}: window [{start}, {end}) needs latents and velocity [B, C, {width}, H, W], {width} "
                f"steps and flags, got {tuple(x.shape)}, {tuple(velocity.shape)}, {len(steps)} and {len(active)}."
            )
        for frame, (step, moves) in enumerate(zip(steps, active, strict=True), start):
            if moves and not 1 <= step <= self.steps:
                raise ValueError(
                    f"{self._name}: latent frame {frame} cannot take step {step}; it has 1 to {self.steps}."
                )
        told = [computed] * width if isinstance(computed, bool) else list(computed)
        return self._moved(x, velocity, steps, active, slice(start, end), told)

    @abstractmethod
    def _moved(
        self,
        x: Tensor,
        velocity: Tensor,
        steps: Sequence[int],
        active: Sequence[bool],
        window: slice,
        computed: Sequence[bool],
    ) -> Tensor:
        """``step`` with arguments that were checked."""

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _per_frame(self, values: Tensor, steps: Sequence[int]) -> Tensor:
        """Rows of ``values`` ``[n, N]`` for the step each latent frame takes, ``[n, T]`` on the host."""
        return values[:, torch.tensor(steps).clamp(1, self.steps) - 1]


class EulerSolver(Solver):
    """Straight along the velocity: ``x + (sigma_next - sigma) v``."""

    family = Family.ODE

    def __init__(self, table: Tensor | Sequence[float], frames: int) -> None:
        super().__init__(table, frames)
        self._lengths = self.table.diff()[None]

    def _moved(
        self,
        x: Tensor,
        velocity: Tensor,
        steps: Sequence[int],
        active: Sequence[bool],
        window: slice,
        computed: Sequence[bool],
    ) -> Tensor:
        return linear_step(velocity[None], self._per_frame(self._lengths, steps), x, active)


class UniPCSolver(Solver):
    """UniPC of order 2 for flow models, predicting x0, variant B(h) = expm1(-h), as SkyReels-V2 samples with.

    Every step first corrects the latents it is given, with the x0 just predicted there, and then predicts the next ones
    (UniPC, arXiv 2302.04867, algorithms 1 and 2). The first step has nothing to correct; the first and the last one
    predict at order 1, so the last gives x0. All weights follow from the table and are made once, in float64.

    A latent frame takes its steps in order, each once.
    """

    family = Family.MULTISTEP

    def __init__(self, table: Tensor | Sequence[float], frames: int) -> None:
        super().__init__(table, frames)
        self._weights = _unipc_weights(self.table)
        self._taken = [0] * frames
        self._state: Tensor | None = None

    def _moved(
        self,
        x: Tensor,
        velocity: Tensor,
        steps: Sequence[int],
        active: Sequence[bool],
        window: slice,
        computed: Sequence[bool],
    ) -> Tensor:
        moving, told = (on_device(flags, x.device, torch.bool).view(1, 1, -1, 1, 1) for flags in (active, computed))
        precision = torch.promote_types(torch.promote_types(x.dtype, velocity.dtype), torch.float32)
        result = self._advance(x.to(precision), velocity.to(precision), steps, active, moving, window, told)
        return torch.where(moving, result.to(x.dtype), x)

    def _advance(
        self,
        x: Tensor,
        velocity: Tensor,
        steps: Sequence[int],
        active: Sequence[bool],
        moving: Tensor,
        window: slice,
        computed: Tensor,
    ) -> Tensor:
        """The next latents, right where ``moving`` ``[1, 1, T, 1, 1]``; anything elsewhere."""
        moves = {
            frame: step for frame, (step, flag) in enumerate(zip(steps, active, strict=True), window.start) if flag
        }
        for frame, step in moves.items():
            if step != self._taken[frame] + 1:
                raise ValueError(
                    f"{self._name}: latent frame {frame} is to take step {step} after step {self._taken[frame]}; "
                    "a multistep solver takes all steps in order, so use a new one for each segment."
                )
        history = self._history(x)[:, :, :, window]
        newest, older, start = history.to(x.dtype)
        weights = self._per_frame(self._weights, steps).to(x.dtype).to(x.device, non_blocking=True)
        sigma, *weights = weights[:, None, None, :, None, None]
        x0 = x - sigma * velocity
        carry, pull, back, ahead = weights[:4]
        corrected = carry * start + pull * (newest + back * (older - newest) + ahead * (x0 - newest))
        first = on_device([step == 1 for step in steps], x.device).view_as(moving)
        corrected = torch.where(first | ~computed, x, corrected)
        carry, pull, back = weights[4:]
        predicted = carry * corrected + pull * (x0 + back * (newest - x0))
        history.copy_(torch.where(moving, torch.stack([x0, newest, corrected]), history))
        for frame, step in moves.items():
            self._taken[frame] = step
        return predicted

    def _history(self, x: Tensor) -> Tensor:
        """``[3, B, C, frames, H, W]``: x0 of the last two steps, newest first, and the latents the last began with."""
        batch, channels, _, height, width = x.shape
        if self._state is None:
            self._state = x.new_zeros(3, batch, channels, self.frames, height, width)
        expected = self._state.shape[1:3] + self._state.shape[4:]
        if (batch, channels, height, width) != expected:
            raise ValueError(
                f"{self._name}: a segment keeps its batch, channels, height and width {tuple(expected)}, "
                f"got {(batch, channels, height, width)}; use a new solver for another segment."
            )
        return self._state


def _unipc_weights(table: Tensor) -> Tensor:
    """``[8, N]`` float64: per step sigma, the corrector's four weights and the predictor's three.

    With lambda the logarithm of (1 - sigma) / sigma, h its growth over a step and r the (negative) place of the step
    before in units of h, the predictor is ``ratio x - alpha_t expm1(-h) (m0 + (m1 - m0) / 2r)``. The corrector redoes
    the previous step with the x0 found at its end, at the order that step had.
    """
    sigma, target = table[:-1], table[1:]
    level = (1 - table).log() - table.log()
    h = level.diff()
    growth = torch.expm1(-h)
    carry, pull = target / sigma, (target - 1) * growth
    r = torch.full_like(h, -torch.inf)
    r[1:] = (level[:-2] - level[1:-1]) / h[1:]
    second = torch.ones_like(h, dtype=torch.bool)
    second[0] = second[-1] = False
    predictor = torch.stack([carry, pull, torch.where(second, 0.5 / r, 0)])

    phi = growth / -h - 1
    b1, b2 = phi / growth, 2 * (phi / -h - 0.5) / growth
    share = (b2 - b1) / (r - 1)
    corrector = torch.stack([carry, pull, torch.where(second, share / r, 0), torch.where(second, b1 - share, 0.5)])
    corrector = torch.cat([torch.zeros_like(corrector[:, :1]), corrector[:, :-1]], dim=1)
    return torch.cat([sigma[None], corrector, predictor])
