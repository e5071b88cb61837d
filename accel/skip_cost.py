"""What skipping a solver step costs a latent frame, from noise levels alone; the formulas are those of ``auto``."""

from __future__ import annotations

import math
from dataclasses import dataclass

SMALLEST_SIGNAL = 0.04  # 1 / (1 - s) is not charged beyond: at s = 0.98 perturbations grew 9 to 28 times
FIRST_SIGNAL = 0.007  # 1 - s where the share of log(1 - s) that has been gone begins
POWER = 1.5  # p
BAND = 0.5  # width of a band in log(1 - s)


@dataclass(frozen=True, slots=True)
class SkipCost:
    """One latent frame at one call.

    Attributes:
        frame: latent frame of the segment.
        sigma: its noise level. after: the next one.
        levels: noise levels of its stored velocities, newest first, at least one.
        time: share of its solver steps that are taken, in [0, 1].
    """

    frame: int
    sigma: float
    after: float
    levels: tuple[float, ...]
    time: float

    @property
    def points(self) -> int:
        """Stored velocities that a skip would use: 1 holds, 2 follow a line."""
        return min(len(self.levels), 2)

    @property
    def signal(self) -> float:
        """``1 - s``, kept away from 0."""
        return max(1.0 - self.sigma, SMALLEST_SIGNAL)

    @property
    def band(self) -> int:
        """Which band of noise levels this is."""
        return math.floor(math.log(self.signal) / BAND)

    @property
    def charge(self) -> float:
        """``|ds| / (1 - s)`` of the step: what an error of the velocity is multiplied by."""
        return (self.sigma - self.after) / max(1.0 - self.after, SMALLEST_SIGNAL)

    @property
    def gain(self) -> float:
        """``g``: how the error of a skip grows with its reach."""
        ahead = (self.levels[0] - self.sigma) / self.signal
        reach = ahead if self.points == 1 else ahead * (self.levels[1] - self.sigma) / self.signal
        return max(reach, 0.0) ** (0.5 * POWER)

    @property
    def progress(self) -> float:
        """Share of its computed calls that a latent frame is expected to have behind it."""
        gone = 1.0 - math.log(max(1.0 - self.sigma, FIRST_SIGNAL)) / math.log(FIRST_SIGNAL)
        return 0.5 * (gone + self.time)
