"""Which key tiles a query tile reads: tokens ordered by hash, tiles compared by their means (AnnSA, arXiv 2602.01801).

Similar tokens come to stand beside each other when they are ordered by the signs of a few random projections, inside
units of whole latent frames that fill at least a tile. Tiles of that order hold similar keys, so a tile's mean speaks
for its tokens, and the product of a query tile's mean with it says which tiles are worth reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .block_sparse import SCRATCH, picked_rows, row_table

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Selection:
    """What the query tiles of one block read.

    Attributes:
        query_order: int64 ``[B, groups, queries]``, the queries in the order in which they fill their tiles.
        key_order: int32 ``[B, groups, keys]``, likewise the keys; those that every query sees come first.
        tiles: int64 ``[B, groups, query tiles, kept]``, ascending. Groups are the heads, or one for all of them.
    """

    query_order: Tensor
    key_order: Tensor
    tiles: Tensor


def merged(intervals: Sequence[Interval], keys: int) -> list[Interval]:
    """Intervals ``[start, end)`` of key tokens as disjoint ones, in order.

    Raises:
        ValueError: an interval that is not one of the keys'.
    """
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if not 0 <= start <= end <= keys:
            raise ValueError(
                f"ANN attention: ({start}, {end}) is no interval of {keys} keys; use 0 <= start <= end <= {keys}."
            )
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif start < end:
            found.append((start, end))
    return found


def counted_tiles(keys: int, always: int, density: float, tile: int) -> tuple[int, int]:
    """How many tiles hold the ``always`` tokens that every query sees, and how many of the others a query tile reads:
    the fraction ``density``, rounded up."""
    shared = -(-always // tile)
    others = -(-keys // tile) - shared
    return shared, min(others, math.ceil(others * density))


def select(
    q: Tensor, k: Tensor, bias: Tensor | None, always: Sequence[Interval], density: float, tile: int, query_tile: int,
    frame: int, projection: Tensor,
) -> Selection:  # fmt: skip
    """The selection for one block, without reading anything back from the device.

    Args:
        q: ``[B, queries, groups, channels]``. k: ``[B, keys, groups, channels]``.
        bias: ``[groups or 1, keys]`` added to the logits, or None.
        always: disjoint intervals of key tokens, in order. density: fraction of the other tiles that is read.
        tile, query_tile: tokens of a tile of keys and of queries. frame: tokens of a latent frame.
        projection: ``[channels, bits]``, see ``hash_ranks``.
    """
    first, rest = (_tokens(intervals, k) for intervals in (always, _between(always, k.shape[1])))
    query_order = hash_order(q, frame * -(-query_tile // frame), projection, _tokens([(0, q.shape[1])], q))
    key_order = hash_order(k, frame * -(-tile // frame), projection, rest)
    key_order = torch.cat([first.expand(*key_order.shape[:2], -1), key_order], -1)
    shared, picked = counted_tiles(k.shape[1], len(first), density, tile)
    score = q.shape[-1] ** -0.5 * tile_means(q, query_order, query_tile) @ tile_means(k, key_order, tile).mT
    if bias is not None:
        wide = bias.float().expand(k.shape[2], -1)[None, ..., None].expand(len(k), -1, -1, -1)
        score = score + tile_means(wide.transpose(1, 2), key_order, tile).mT
    best = score[..., shared:].topk(picked, -1, sorted=False).indices.sort(-1).values + shared
    everyone = torch.arange(shared, device=k.device).expand(*best.shape[:-1], -1)
    return Selection(query_order, key_order.int(), torch.cat([everyone, best], -1))


def hash_order(x: Tensor, unit: int, projection: Tensor, tokens: Tensor) -> Tensor:
    """``tokens`` (indices ``[n]`` into the tokens of ``x``) by unit of time and then by hash, ``[B, groups, n]``."""
    rank = hash_ranks(x, projection)[..., tokens]
    rank = rank + (tokens // unit << projection.shape[-1])
    return tokens[rank.argsort(dim=-1, stable=True)]


def hash_ranks(x: Tensor, projection: Tensor) -> Tensor:
    """Place of each token among the hashes, int64 ``[B, groups, n]``, of ``x`` ``[B, n, groups, channels]``.

    A bit is the sign of one random projection of the token's distance from the mean token, without which keys that
    share a large offset would all hash alike. Bits are read as a Gray code, so that neighbours differ in one bit.
    """
    projected = torch.matmul(x, projection.to(x)).movedim(1, 2)
    bits = projected > projected.mean(2, keepdim=True)
    powers = 2.0 ** torch.arange(bits.shape[-1], device=x.device)
    rank = (bits * powers).sum(-1).long()
    for shift in (1, 2, 4, 8):
        rank = rank ^ (rank >> shift)
    return rank


def tile_means(x: Tensor, order: Tensor, tile: int) -> Tensor:
    """Mean token of every tile in float32, ``[B, groups, tiles, channels]``; at most ``SCRATCH`` bytes at a time.

    Args:
        x: ``[B, n, groups, channels]``. order: ``[B, groups, n]``. tile: tokens of a tile; the last may be shorter.
    """
    groups, channels = x.shape[2:]
    step = max(1, SCRATCH // (4 * tile * groups * channels)) * tile
    entries = []
    for entry, places in zip(x, order, strict=True):
        table, means = row_table(entry), []
        for part in places.split(step, -1):
            tokens = picked_rows(*table, part[None], groups)[0].float()
            whole = tokens.shape[1] // tile * tile
            means.append(tokens[:, :whole].unflatten(1, (-1, tile)).mean(2))
            if whole < tokens.shape[1]:
                means.append(tokens[:, whole:].mean(1, keepdim=True))
        entries.append(torch.cat(means, 1))
    return torch.stack(entries)


def selection_flops(queries: int, keys: int, width: int, bits: int, tile: int, query_tile: int) -> int:
    """FLOPs of one selection: the projections, the tile means (as the products they could be) and the tile scores."""
    tiles = -(-queries // query_tile) * -(-keys // tile)
    return 2 * (queries + keys) * width * (bits + 1) + 2 * tiles * width


def _between(intervals: Sequence[Interval], end: int) -> list[Interval]:
    """What disjoint ``intervals`` leave of ``[0, end)``."""
    starts = [0, *(last for _, last in intervals)]
    return [(start, stop) for start, stop in zip(starts, [*(first for first, _ in intervals), end], strict=True)]


def _tokens(intervals: Sequence[Interval], x: Tensor) -> Tensor:
    """Indices of the tokens of intervals, int64, on the device of ``x``."""
    parts = [torch.arange(start, end, device=x.device) for start, end in intervals]
    return torch.cat(parts) if parts else torch.arange(0, device=x.device)
