"""Fewer solver steps: the same loop, unaccelerated, over a coarser noise table."""

from __future__ import annotations

from accel.engine import Acceleration, Run

from .base import MakeRun, Peer


def steps(full: int, divisor: float) -> int:
    """Solver steps of a run with ``divisor`` times fewer of them."""
    return max(1, round(full / divisor))


def make(divisor: float) -> MakeRun:
    """The plain engine; the steps are the plan's (``Peer.plan``)."""
    return lambda denoiser, timeline: Run(Acceleration(), denoiser, timeline)


PEER = Peer(
    name="fewer-steps",
    source="the model's own sampler",
    settings=(1.5, 2.0, 2.5, 3.0, 4.0, 5.0),
    make=make,
    note="ar_step is scaled with the steps",
    steps=steps,
)
