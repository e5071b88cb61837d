"""The turn that RoPE gives to keys and queries with time, undone and given anew.

Wan's rotary embedding splits a head's channels into a part for time and two for space. Space never changes, so a key
that is to stand at another time needs its time channels turned alone. Rotations add up, R(a) R(b) = R(a + b), but so do
their roundings: keys that move often are turned from what they were before any turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TimeRotary:
    """Turns neighbouring channel pairs by position times frequency.

    Attributes:
        channels: leading channels of a head that stand for time, an even number; 0 for a model without rotations.
        theta: base of the frequencies, theta ** (-2 i / channels) for pair i.
    """

    channels: int
    theta: float = 10000.0

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

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` turned by ``positions``, which may be negative (a turn back).

        Args:
            x: time channels ``[B, n, heads, channels]``. positions: in latent frames, ``[n]`` or ``[n, heads]``.

        Returns:
            Shape and dtype of ``x``; the angles are float64, the turn float32.
        """
        exponents = torch.linspace(
            0, (self.channels - 2) / self.channels, self.channels // 2, dtype=torch.float64, device=x.device
        )
        angles = positions.to(x.device, torch.float64)[..., None] * self.theta**-exponents
        if positions.ndim == 1:
            angles = angles[:, None]
        cos, sin = angles.cos().float(), angles.sin().float()
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
