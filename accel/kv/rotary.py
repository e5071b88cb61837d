"""The turn that RoPE gives to keys and queries with time, undone and given anew.

Wan's rotary embedding splits a head's channels into a part for time and two for space. Space never changes, so a key
that is to stand at another time needs its time channels turned alone. Rotations add up, R(a) R(b) = R(a + b), but so do
their roundings: keys that move often are turned from what they were before any turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.time_turn import turn_pairs

TABLES = 8  # that a rotary keeps


@dataclass(frozen=True, slots=True)
class TimeRotary:
    """Turns neighbouring channel pairs by position times frequency.

    Attributes:
        channels: leading channels of a head that stand for time, an even number; 0 for a model without rotations.
        theta: base of the frequencies, theta ** (-2 i / channels) for pair i.
    """

    channels: int
    theta: float = 10000.0
    _tables: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.channels < 0 or self.channels % 2 or not self.theta > 0:
            raise ValueError(
                f"TimeRotary: {self.channels} channels and theta {self.theta}; use an even number of channels and a "
                "theta above 0."
            )

    @classmethod
    def of_wan(cls, head_dim: int, theta: float = 10000.0) -> TimeRotary:
        """That of a Wan model: what two spatial axes of a third each (rounded down to a pair) leave."""
        return cls(head_dim - 4 * (head_dim // 6), theta)

    def turn(self, x: Tensor, positions: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` turned by ``positions``, which may be negative (a turn back).

        Args:
            x: time channels ``[B, n, heads, channels]``. positions: in latent frames, ``[m]`` or ``[n, heads]``; where
                m is less than n, each stands for n / m neighbouring tokens. out: where the result goes, a tensor like
                ``x`` or ``x`` itself; None makes one.

        Returns:
            Shape and dtype of ``x``; the angles are float64, the turn float32.
        """
        out = x.new_empty(x.shape) if out is None else out
        if positions.ndim == 1 and len(positions) < x.shape[1]:
            cos, sin = self._few(tuple(positions.tolist()), x.device)
        else:
            cos, sin = _cos_sin(self.channels, self.theta, positions.to(x.device))
        return turn_pairs(x, cos, sin, out)

    def _few(self, positions: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """``_cos_sin`` of a few positions known on the host: made once for all layers, and gone with the run."""
        key = positions, device
        if key not in self._tables:
            if len(self._tables) == TABLES:
                self._tables.pop(next(iter(self._tables)))
            made = _cos_sin(self.channels, self.theta, torch.tensor(positions))
            self._tables[key] = tuple(table.to(device, non_blocking=True) for table in made)
        return self._tables[key]


def _cos_sin(channels: int, theta: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Of the angles of positions ``[m]`` or ``[m, heads]``, fp32 ``[m, heads or 1, channels / 2]``."""
    pairs, device = channels // 2, positions.device
    exponents = torch.linspace(0, (channels - 2) / channels, pairs, dtype=torch.float64, device=device)
    angles = positions.to(torch.float64)[..., None] * theta**-exponents
    if positions.ndim == 1:
        angles = angles[:, None]
    return angles.cos().float(), angles.sin().float()
