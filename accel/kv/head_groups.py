"""Head groups: heads that hardly look at history see only the latest of it, and the others all that is kept (Dummy
Forcing, arXiv 2601.20499; Forcing-KV, arXiv 2605.09681, divides heads likewise, offline).

At the first block that has history, the attention of every head is measured on three parts of its keys: sink (first
latent frame), middle (the rest of history) and the block itself. The heads with the smallest larger one of the first
two become near heads. What they no longer keep can make the ring of the others longer at the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .importance_redundancy import TILE, row_logsumexp


@dataclass(frozen=True, slots=True)
class HeadGroupsConfig:
    """How many heads become near heads, what these see, and how it is measured.

    Attributes:
        share: of all heads of all layers that become near, in [0, 1]. Dummy Forcing: 180 of 360 on Wan 1.3B.
        near: latest committed latent frames a near head sees beside its block, 0 or more.
        sample: share of the queries the masses are measured with, in (0, 1].

    Raises:
        ValueError: a number outside its range.
    """

    share: float = 0.5
    near: int = 1
    sample: float = 1.0 / 3.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"Head groups: share is {self.share}; use 0 (no near heads) to 1 (all of them).")
        if not isinstance(self.near, int) or isinstance(self.near, bool) or self.near < 0:
            raise ValueError(f"Head groups: near is {self.near!r}; use a whole number of latent frames, 0 or more.")
        if not 0.0 < self.sample <= 1.0:
            raise ValueError(f"Head groups: sample is {self.sample}; use more than 0, and 1 for all queries.")


@dataclass(frozen=True, slots=True)
class HeadGroups:
    """Heads of each layer, by index, ascending; every head is in one of the two.

    Attributes:
        near: heads that see the latest frames and their block. full: heads that see all that is kept.
    """

    near: tuple[tuple[int, ...], ...]
    full: tuple[tuple[int, ...], ...]


def head_masses(
    q: Tensor, k: Tensor, sink_tokens: int, current_tokens: int, sample: float = 1.0 / 3.0, tile: int = TILE
) -> Tensor:
    """How much of its attention each head gives to sink, middle and the block's own keys.

    One pass over the keys: the masses of the parts are the softmax of the parts' log-sum-exp. Scratch as
    in ``importance_redundancy.column_mass``.

    Args:
        q: ``[..., heads, queries, dim]`` of a latent frame or block, of which ``sample`` are taken at even distances.
        k: ``[..., heads, tokens, dim]``: sink, middle, the block's own. sink_tokens, current_tokens: how many of them
            are at the start and at the end; the middle may be empty. tile: most logits held at once.

    Returns:
        ``[heads, 3]``, mean over queries and leading dimensions, rows summing to 1; float32, float64 for float64 keys.

    Raises:
        ValueError: more tokens in the parts than there are, or other heads in ``q`` than in ``k``.
    """
    keys = k.shape[-2]
    edges = (0, sink_tokens, keys - current_tokens, keys)
    if min(sink_tokens, current_tokens, keys - sink_tokens - current_tokens) < 0:
        raise ValueError(
            f"Head groups: {sink_tokens} tokens of sink and {current_tokens} of the block must fit {keys} keys."
        )
    return part_masses(q, k, [[edge] for edge in pairwise(edges)], sample, tile)


def part_masses(
    q: Tensor, k: Tensor, parts: Sequence[Sequence[tuple[int, int]]], sample: float = 1.0 / 3.0, tile: int = TILE
) -> Tensor:
    """``head_masses`` of keys that lie in any order.

    Args:
        q, k, sample, tile: as there. parts: of each part, the intervals ``[start, end)`` of keys it is made of; may be
            none.

    Returns:
        ``[heads, parts]``.
    """
    if q.shape[-3] != k.shape[-3]:
        raise ValueError(f"Head groups: {q.shape[-3]} heads of queries must be as many as the {k.shape[-3]} of keys.")
    asked = q[..., sampled(q.shape[-2], sample, q.device), :]
    totals = []
    for part in parts:
        pieces = [row_logsumexp(asked, k[..., start:end, :], tile) for start, end in part or [(0, 0)]]
        totals.append(torch.stack(pieces).logsumexp(0))
    masses = torch.stack(totals, -1).softmax(-1).mean(-2)
    return masses.reshape(-1, *masses.shape[-2:]).mean(0)


def sampled(queries: int, share: float, device: torch.device | None = None) -> Tensor:
    """Indices of ``share`` of ``queries``, one at least, at even distances from the first: no random numbers."""
    count = min(queries, max(1, round(share * queries)))
    return torch.arange(count, device=device) * queries // count


def classify(masses: Tensor, config: HeadGroupsConfig) -> HeadGroups:
    """The heads of a model in two groups: ``share`` of all, over all layers, become near heads.

    These are the heads with the smallest ``max(sink, middle)``, each head's masses normalised to sum 1; of equal ones
    the lower layer and index goes first. A head whose masses are not finite is never near. One read from the device.

    Args:
        masses: ``[layers, heads, 3]`` of ``head_masses``.

    Raises:
        ValueError: another shape.
    """
    if masses.ndim != 3 or masses.shape[-1] != 3:
        raise ValueError(f"Head groups: masses {tuple(masses.shape)} must be [layers, heads, 3] (sink, middle, block).")
    layers, heads, _ = masses.shape
    history = (masses / masses.sum(-1, keepdim=True))[..., :2].amax(-1).flatten().cpu()
    order = history.argsort(stable=True)[: round(config.share * len(history))]
    chosen = set(order[history[order].isfinite()].tolist())
    rows = [range(layer * heads, (layer + 1) * heads) for layer in range(layers)]
    return HeadGroups(
        near=tuple(tuple(head - row.start for head in row if head in chosen) for row in rows),
        full=tuple(tuple(head - row.start for head in row if head not in chosen) for row in rows),
    )


def ring_frames(frames: int, heads: int, near_heads: int, near: int, block: int) -> int:
    """Latent frames the full heads of a layer can keep at the bytes all its heads together had.

    Args:
        frames: latent frames of slots each head has where all are alike, those of the block included.
        heads, near_heads: of the layer, and how many of them are near heads.
        near, block: latent frames a near head keeps: the latest committed ones and those of the block.

    Returns:
        Whole frames, ``frames`` at least; ``frames`` where there are no full heads to give them to.

    Raises:
        ValueError: more near heads than heads, or a negative number.
    """
    if min(frames, near_heads, near, block) < 0 or heads < max(1, near_heads):
        raise ValueError(
            f"Head groups: {near_heads} near heads of {heads} with {near} + {block} of {frames} frames must be 0 or "
            f"more, and at most all heads."
        )
    if near_heads == heads:
        return frames
    return (heads * frames - near_heads * min(near + block, frames)) // (heads - near_heads)
