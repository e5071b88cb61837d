"""Backward differences of a feature, per latent frame: what TaylorSeer and a momentum predictor extrapolate from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Differences:
    """``F_0`` the newest value and ``F_j = (F_{j-1} now - F_{j-1} before) / spacing`` (TaylorSeer, arXiv 2503.06923).

    Args:
        order: highest j kept. axis: axis of the latent frames. smoothing: in [0, 1), what a difference keeps of the
            one before it; 0 takes the newest.
    """

    def __init__(self, order: int, axis: int, smoothing: float = 0.0) -> None:
        self.order, self.axis, self.smoothing = order, axis, smoothing
        self._factors: list[Tensor] = []
        self._at: list[float] = []
        self._count: list[int] = []

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factor in self._factors)

    @property
    def newest(self) -> Tensor:
        """The value last pushed."""
        return self._factors[0]

    def push(self, value: Tensor, coordinates: Sequence[float], active: Sequence[bool]) -> None:
        """A true value; frames that were not ``active`` at the last push start anew.

        Args:
            value: any shape with one entry a latent frame along ``axis``. coordinates: where each frame is, a step
                index or a noise level.
        """
        counts = self._count or [0] * len(active)
        before = self._at or list(coordinates)
        gaps = [now - then for now, then in zip(coordinates, before, strict=True)]
        known = [count if flag and gap else 0 for count, flag, gap in zip(counts, active, gaps, strict=True)]
        factors = [value]
        for j in range(min(self.order, len(self._factors), max(known, default=0))):
            scale = [1.0 / gap if count > j else 0.0 for count, gap in zip(known, gaps, strict=True)]
            factor = (factors[j] - self._factors[j]) * self._wide(scale, value)
            if self.smoothing and j + 1 < len(self._factors):
                kept = [self.smoothing if count > j + 1 else 0.0 for count in known]
                factor = torch.lerp(factor, self._factors[j + 1], self._wide(kept, value))
            factors.append(factor)
        self._factors, self._at = factors, list(coordinates)
        self._count = [min(count + 1, self.order + 1) if flag else 0 for count, flag in zip(known, active, strict=True)]

    def at(self, coordinates: Sequence[float]) -> Tensor:
        """``sum_j F_j k^j / j!``, k the distance of each frame from its newest value; a new tensor."""
        distance = self._wide([now - then for now, then in zip(coordinates, self._at, strict=True)], self._factors[0])
        total = self._factors[0].clone()
        for j, factor in enumerate(self._factors[1:], 1):
            total += factor * distance**j / math.factorial(j)
        return total

    def _wide(self, values: Sequence[float], like: Tensor) -> Tensor:
        shape = [1] * like.ndim
        shape[self.axis] = len(values)
        return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(shape)
