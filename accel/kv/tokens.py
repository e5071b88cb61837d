"""What a K/V store and a rule for its middle say to each other: sets of keys and values with their places in time.

A store pins the first latent frames (sink), keeps the latest ones (ring) and asks a ``Middle`` rule what to keep of
those in between, layer by layer, when they leave the ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .late import LateCount, LateCounts


@dataclass(frozen=True, slots=True)
class Tokens:
    """Keys and values of one layer and one CFG branch.

    Attributes:
        keys, values: ``[B, n, heads, head_dim]``; keys carry the model's rotations (post-RoPE), in the store's current
            coordinates, so that queries of the block being denoised can be compared with them.
        frames: latent frame of the video each token stands at, int64 ``[n]``, or ``[n, heads]`` where heads kept
            different tokens.
        plain: ``[B, n, heads, time_dim]``, the first channels of the keys, those that RoPE turns with time, before that
            turn: a store that moves a token in time turns these anew, so that roundings never add up. None where the
            keys have no time channels. Whoever picks or replaces a key does the same to its plain channels.
        counts: how many tokens each one stands for, float32 ``[n]``; None where each is itself. An attention over them
            adds ``ln counts`` to the logits.
        live: how many of the first of them there are, the rest being room; None: all.
    """

    keys: Tensor
    values: Tensor
    frames: Tensor
    plain: Tensor | None = None
    counts: Tensor | None = None
    live: LateCount | None = None

    def __len__(self) -> int:
        return self.keys.shape[1]

    def part(self, index: slice | Tensor) -> Tokens:
        """Some of them, all of which there are."""
        return Tokens(
            self.keys[:, index], self.values[:, index], self.frames[index],
            None if self.plain is None else self.plain[:, index],
            None if self.counts is None else self.counts[index],
        )  # fmt: skip

    def there(self) -> Tokens:
        """Those there are; asks for ``live``."""
        return self if self.live is None else self.part(slice(0, int(self.live)))


def joined(parts: list[Tokens]) -> Tokens:
    """Several sets as one, in order; frames per head where one of them has them so, counts where one has them."""
    heads = parts[0].keys.shape[2]
    frames = [part.frames for part in parts]
    if any(one.ndim == 2 for one in frames):
        frames = [one if one.ndim == 2 else one[:, None].expand(-1, heads) for one in frames]
    counts = None
    if any(part.counts is not None for part in parts):
        counts = torch.cat([
            torch.ones(len(part), device=part.keys.device) if part.counts is None else part.counts for part in parts
        ])  # fmt: skip
    plain = None if parts[0].plain is None else torch.cat([part.plain for part in parts], 1)
    return Tokens(
        torch.cat([part.keys for part in parts], 1), torch.cat([part.values for part in parts], 1), torch.cat(frames),
        plain, counts,
    )  # fmt: skip


class Middle(Protocol):
    """What is kept of the latent frames between sink and recent window."""

    def absorb(self, layer: int, kept: Tokens | None, gone: Tokens, queries: Tensor, capacity: int) -> Tokens:
        """The middle after ``gone`` have left the ring.

        Args:
            layer: transformer block. kept: the middle so far, None where it is empty. gone: whole latent frames,
                frame-major, oldest first. queries: ``[B, m, heads, head_dim]``, rotated, of the block about to be
                denoised. capacity: most tokens the middle may have.

        Returns:
            At most ``capacity`` tokens; nothing given is changed.
        """
        ...


@runtime_checkable
class EarlyMiddle(Middle, Protocol):
    """A ``Middle`` that asks no queries, so that a store can call it for every layer before a block's first forward,
    and learn how many tokens came out in all of them with one read from the device."""

    late: LateCounts

    def merge(self, layer: int, kept: Tokens | None, gone: Tokens, capacity: int) -> Tokens:
        """``absorb`` without reading from the device: at most ``capacity`` rows, of which ``live`` are there."""
        ...
