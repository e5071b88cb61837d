"""What a model call is.

Every model call carries its own description, so no part of the pack counts steps: a commit pass, a prefill, an idle
row or a second sampler can never shift anybody's counter.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """Why the model is called. ``COMMIT`` and ``PREFILL`` are always computed and never touch step state."""

    DENOISE = "denoise"
    COMMIT = "commit"
    PREFILL = "prefill"


class Family(str, Enum):
    """How the sampler turns a velocity into the next latent, which decides what may be reused.

    ``ODE``: Euler along a deterministic trajectory; velocity, x0 and noise may be held alike.
    ``MULTISTEP``: the solver keeps a history of its own (UniPC); velocity may be held, predicted values are marked.
    ``RENOISE``: fresh noise every step (Self-Forcing, core's ``ar_video``); only x0 may be held, which equals dropping
    the step.
    """

    ODE = "ode"
    MULTISTEP = "multistep"
    RENOISE = "renoise"


class Decision(str, Enum):
    """What was done instead of, or as, a model forward."""

    CACHE = "cache"
    PREDICT = "predict"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class Call:
    """Description of one guided model call; tensors travel beside it.

    Attributes:
        kind: denoise, commit or prefill.
        segment: index of the outer autoregressive step, from 0.
        iteration: row of the step matrix inside the segment, from 0.
        frames: window ``[start, end)`` given to the model, in latent frames of the segment.
        sigmas: noise level in [0, 1] of each latent frame of the window; equal for all batch entries, known on the
            host.
        steps: progress index of each latent frame of the window (0 not started, 1..N about to take that solver step,
            N + 1 clean).
        active: which latent frames of the window take a solver step after this call.
        offset: latent frame of the whole video at which the segment starts.
        family: sampler family.
        total_steps: N, solver steps of a latent frame.
        queries: latent frames ``[start, end)`` of the segment that are forwarded where K/V are kept: the rest of the
            window answers with its kept keys and values. None where nothing is kept: the whole window is forwarded.
        given: latent frames at the start of the segment that were finished before it began.
    """

    kind: Kind
    segment: int
    iteration: int
    frames: tuple[int, int]
    sigmas: tuple[float, ...]
    steps: tuple[int, ...]
    active: tuple[bool, ...]
    offset: int = 0
    family: Family = Family.ODE
    total_steps: int = 0
    queries: tuple[int, int] | None = None
    given: int = 0

    def __post_init__(self) -> None:
        start, end = self.frames
        width = end - start
        if not (0 <= start < end) or not len(self.sigmas) == len(self.steps) == len(self.active) == width:
            raise ValueError(
                f"Call: window [{start}, {end}) needs {width} sigmas, steps and active flags, "
                f"got {len(self.sigmas)}, {len(self.steps)} and {len(self.active)}."
            )

    @property
    def active_frames(self) -> tuple[int, int]:
        """Tightest interval ``[start, end)`` of active latent frames of the segment; empty at the window's start if
        none."""
        hits = [index for index, flag in enumerate(self.active) if flag]
        if not hits:
            return self.frames[0], self.frames[0]
        return self.frames[0] + hits[0], self.frames[0] + hits[-1] + 1
