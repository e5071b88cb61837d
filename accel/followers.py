"""Further forwards of one guided call: another context window, a guidance pass of its own.

A sampler counts them as one call with the forward that leads, so they are decided there and told there: skipped
together, so that the differences guidance takes between them hold.
"""

from __future__ import annotations

import time
from dataclasses import replace

from torch import Tensor

from .call import Call, Decision


class Followers:
    """Steps of a ``Run`` that stands beside the one that leads, with a history of its own; the run's own members do the
    rest."""

    def follow(self, call: Call, x: Tensor, decision: Decision) -> tuple[Tensor, bool]:
        """Velocity of one more forward of the call that was recorded last, and whether it is true.

        It is answered as ``decision`` says where this run's stored velocities can, and computed elsewhere. What it cost
        is added to the last record. Arguments as for ``step``.
        """
        started = time.perf_counter()
        finite = self._forwards_were_finite()
        self.timeline.flops_full += self.denoiser.full_flops(call, self._frames)
        flops = 0
        if true := not (finite and self._serves(call, decision)):
            velocity, told = self._forward(call, x)
            flops = told["flops"]
            self._remember(call, x, velocity)
        else:
            velocity, _ = self._skip(call, x, decision)
        last = self.timeline.records[-1]
        seconds = last.seconds + time.perf_counter() - started
        self.timeline.records[-1] = replace(last, flops=last.flops + flops, seconds=seconds)
        return velocity, true

    def _serves(self, call: Call, decision: Decision) -> bool:
        """Whether the stored velocities can do what was decided."""
        if decision is Decision.RECOMPUTE:
            return False
        needed = 2 if decision is Decision.PREDICT else 1
        return min(self._history.count(call.active_frames)) >= needed and not self._too_far(call)
