"""What a model has to offer to be accelerated.

An adapter makes a ``Denoiser`` of a foreign model. It turns noise levels into the model's times, its prediction into a
velocity v = noise - x0, and says what a forward costs; the README's "Write an adapter" shows one, line by line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from .call import Call


class Denoiser(Protocol):
    """What a model has to offer. Latents are ``[B, C, T, H, W]``; a guided call runs every CFG branch.

    Attributes:
        branches: CFG branches of a guided call, 1 or 2.
        shares_time: whether history tokens carry the time embedding of the frames being denoised (FramePack).
        recomputes_history: whether clean history frames are part of the window (False where a K/V store holds them).
    """

    branches: int
    shares_time: bool
    recomputes_history: bool

    def velocity(self, call: Call, x: Tensor) -> Tensor:
        """Guided velocity of the window ``x``, or of the latent frames ``call.queries`` of it alone."""
        ...

    def feature(self, kind: str, call: Call, x: Tensor) -> Tensor:
        """What a signal looks at, ``[B, T, ...]`` one entry a latent frame; kinds as in ``signals.SIGNALS``."""
        ...

    def flops(self, call: Call, frames: int) -> int:
        """Cost of forwarding ``frames`` latent frames, all branches (``flops.CONVENTION``): they attend to one
        another, or to the whole window where ``call.queries`` says that the rest of it is kept."""
        ...

    def full_flops(self, call: Call, frames: int) -> int:
        """``flops`` of the same forward where nothing of the K/V is dropped or left unread."""
        ...

    def feature_flops(self, kind: str, call: Call, frames: int) -> int:
        """Cost of ``feature``."""
        ...

    def keep(self, frames: int) -> str | None:
        """A segment of ``frames`` latent frames starts whose K/V are to be kept (only asked where calls will have
        ``queries``). Returns None, or a sentence why they cannot be."""
        ...

    @property
    def kept_bytes(self) -> int:
        """Bytes of the K/V that are kept where a configuration says so; 0 where none does."""
        ...


class LowersMemory(Protocol):
    """What a denoiser with a K/V budget also offers.

    Attributes:
        most_frames: latent frames that a call may have: those that the K/V take at once.
    """

    most_frames: int

    def lower(self) -> str | None:
        """Gives up a part of the K/V, between two blocks or in the middle of one that is then begun anew. Returns what
        is kept from now on, in words, or None where nothing can be given up."""
        ...


class KeepsState(Protocol):
    """What a denoiser, or the K/V store behind it, also offers where something of it crosses the border between two
    segments; a run on a model that recomputes its history goes on without it."""

    def state(self) -> dict[str, Tensor]:
        """Everything that the next segment needs, by name; views, read before the next call. Empty before the first."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over, before the first call, what ``state`` of another object for the same run gave; host tensors."""
        ...
