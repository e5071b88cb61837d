"""AnnSA: self-attention whose queries read only the part of a long history that is like them (arXiv 2602.01801).

At the first call of a block the history's keys and the block's queries are ordered by hash into tiles, and every query
tile picks the key tiles that fit it best (``selection``); the block's other calls reuse that. The current block, the
sink and the last committed frame are read by every query. The result is exactly dense attention over the keys read.
Nothing is read back from the device.

It is for attention that is concentrated, as on clusters of keys of which a block's queries want a few (a test compares
it with tiles picked by chance there). Where attention is spread over everything, the best part is a biased sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flops import attention_flops
from ..kernels.listed_tiles import BREAK_EVEN
from .block_sparse import attend_tiles
from .dense import attend, per_head
from .selection import Interval, Selection, counted_tiles, merged, select, selection_flops

SPARSE_RATE = BREAK_EVEN
"""Assumed, not measured here: the rate of a block-sparse kernel on a GPU as a part of a dense one's, and so the density
from which it no longer pays."""


@dataclass(frozen=True, slots=True)
class AnnConfig:
    """How much of the history a query reads, and from what length on.

    Attributes:
        density: fraction of the history's tiles each query tile reads, in (0, 1]; 1 is dense attention.
        bits: random projections a hash is made of, 1 to 16.
        tile: tokens of a tile of keys, 16 to 256.
        query_tile: tokens of a tile of queries, which read the same keys, 16 to 1024. Where keys are gathered, larger
            ones copy less, and find a little less.
        shortest: latent frames of history below which attention stays dense, 0 or more; None: from where it pays by
            ``shortest_history``.
        groups: ``head`` where every head selects for itself, ``all`` where all heads share one selection.

    Raises:
        ValueError: a setting outside these.
    """

    density: float = 0.33
    bits: int = 12
    tile: int = 64
    query_tile: int = 256
    shortest: int | None = None
    groups: str = "head"

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"ANN attention: density is {self.density}; use more than 0 and at most 1 (dense).")
        if not 1 <= self.bits <= 16:
            raise ValueError(f"ANN attention: bits is {self.bits}; use 1 to 16 projections.")
        if not 16 <= self.tile <= 256:
            raise ValueError(f"ANN attention: tile is {self.tile}; use 16 to 256 tokens.")
        if not 16 <= self.query_tile <= 1024:
            raise ValueError(f"ANN attention: query_tile is {self.query_tile}; use 16 to 1024 tokens.")
        if self.shortest is not None and self.shortest < 0:
            raise ValueError(f"ANN attention: shortest is {self.shortest}; use 0 or more latent frames, or None.")
        if self.groups not in ("head", "all"):
            raise ValueError(f"ANN attention: groups is {self.groups!r}; use head or all.")


def shortest_history(config: AnnConfig, queries: int, always: int, calls: int) -> int | None:
    """Tokens of history (keys that are not of the block itself) from which sparse attention costs less than dense.

    Per channel, dense attention of Q queries over N keys is 4 Q N FLOPs. Sparse attention reads S = A + density (N - A)
    of them, A being those that every query sees, and block-sparse kernels reach ``SPARSE_RATE`` of a dense one's rate
    (0.65 to 0.75 of flash attention on a GPU by published rates; 0.5 to 0.8 measured for the gather form on one CPU
    thread), so it costs 4 Q S / 0.65. A selection costs 2 (Q + N)(bits + 1) +
    2 Q N / (tile * query_tile), shared by the block's calls. Sparse is less from the N where the two lines cross:

        N (4 Q (1 - density / 0.65) - s / calls) = 4 Q A (1 - density) / 0.65 + 2 Q (bits + 1) / calls,
        s = 2 (bits + 1) + 2 Q / (tile * query_tile).

    By FLOPs alone (rate 1) a selection pays from the first tile it leaves out; the rate decides. At density 0.33 it is
    N = 2.1 A: with a block of 3 latent frames, one sink and the last committed frame, 7.5 frames of history.

    Args:
        config: density, bits and tile. queries: of the block. always: key tokens every query sees, its block's among
            them. calls: forwards of a block that share a selection.

    Returns:
        Tokens of history; None where it never pays, as with a density of 0.65 or more.
    """
    projections = 2 * (config.bits + 1)
    gain = (
        4 * queries * (1 - config.density / SPARSE_RATE)
        - (projections + 2 * queries / (config.tile * config.query_tile)) / calls
    )
    if gain <= 0:
        return None
    price = 4 * queries * always * (1 - config.density) / SPARSE_RATE + queries * projections / calls
    return max(0, math.ceil(price / gain) - queries)


@dataclass(slots=True)
class AnnCounts:
    """What was done, over all layers: calls, those of them that were sparse, selections made, and FLOPs by
    ``flops.CONVENTION``: of attention with its selections, of the selections alone, of dense attention instead."""

    calls: int = 0
    sparse: int = 0
    selections: int = 0
    flops: int = 0
    selection_flops: int = 0
    dense_flops: int = 0


class AnnAttention:
    """ANN-sparse self-attention of one run.

    Args:
        config: see there. frame: tokens of a latent frame. calls: forwards of a block that share a selection, by which
            its cost is divided where it is asked whether it pays. seed: of the projections, one matrix a layer.
        backend: of ``attend_tiles``.
    """

    def __init__(self, config: AnnConfig, frame: int, calls: int = 1, seed: int = 0, backend: str = "auto") -> None:
        if frame < 1 or calls < 1:
            raise ValueError(f"ANN attention: a frame of {frame} tokens and {calls} calls must both be 1 or more.")
        self.config, self.counts = config, AnnCounts()
        self._frame, self._calls, self._seed, self._backend = frame, calls, seed, backend
        self._projections: dict[int, Tensor] = {}
        self._kept: dict[int, tuple[tuple, Selection]] = {}
        self._longest = self._read = self._given = 0
        self._needed: int | None = 0

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, always: Sequence[Interval], fresh: bool
    ) -> Tensor:
        """Attention of one block's queries in one layer.

        Args:
            layer: transformer block, or whatever else keeps its own selection (a layer of one CFG branch).
            q: ``[B, queries, heads, head_dim]``. k, v: ``[B, keys, heads, head_dim]``, those of the block among them.
            bias: ``[keys]`` or ``[heads, keys]`` added to the logits, or None.
            always: intervals ``[start, end)`` of keys that every query sees. fresh: whether this is the first call of
                a block. A selection is also renewed when the shapes or ``always`` change.

        Returns:
            ``[B, queries, heads, head_dim]``.
        """
        intervals = merged(always, k.shape[1])
        self._count(q, k, intervals)
        if not self._pays(q.shape[1], k.shape[1], intervals):
            self._kept.pop(layer, None)
            return attend(q, k, v, bias)
        shapes = (q.shape, k.shape, tuple(intervals))
        if fresh or layer not in self._kept or self._kept[layer][0] != shapes:
            self._kept[layer] = (shapes, self._select(layer, q, k, bias, intervals))
            self._count_selection(q, k)
        kept = self._kept[layer][1]
        index = kept.query_order.transpose(1, 2)[..., None].expand(-1, -1, q.shape[2], q.shape[3])
        out = attend_tiles(
            q.gather(1, index), k, v, kept.tiles, self.config.tile, bias, kept.key_order.long(),
            self.config.query_tile, self._backend
        )  # fmt: skip
        back = kept.query_order.argsort(-1).transpose(1, 2)[..., None]
        return out.gather(1, back.expand(-1, -1, *out.shape[2:]))

    def keys_seen(self, queries: int, keys: int, always: Sequence[Interval]) -> int:
        """Key tokens one query reads in a call of these sizes (a last tile that is not full counts as full, unless all
        keys are read), from the sizes alone."""
        intervals = merged(always, keys)
        if not self._pays(queries, keys, intervals):
            return keys
        return min(keys, sum(self._tiles(keys, intervals)) * self.config.tile)

    def note(self) -> str:
        """One line for a report: off and why, or what was read."""
        config, counts = self.config, self.counts
        if not counts.sparse:
            return f"ANN attention is off: {self._reason()}"
        return (
            f"ANN attention: density {config.density} in {counts.sparse} of {counts.calls} calls, "
            f"{self._read / self._given:.0%} of their keys read, {counts.flops / counts.dense_flops:.0%} of dense "
            f"attention's FLOPs in all"
        )

    def _reason(self) -> str:
        """Why no call has been sparse, told of the one with the longest history."""
        if self.config.density == 1.0:
            return "density 1 reads every key"
        if self._needed is None:
            return f"density {self.config.density} does not pay at any length; use less than {SPARSE_RATE}"
        if self._longest >= self._needed:
            return "every key lies in a tile that is read anyway"
        longest, needed = self._longest / self._frame, self._needed / self._frame
        return f"the history is at most {longest:g} latent frames and it pays from {needed:.1f}"

    @property
    def nbytes(self) -> int:
        """Bytes of the selections kept."""
        kept = [selection for _, selection in self._kept.values()]
        return sum(x.nbytes for one in kept for x in (one.query_order, one.key_order, one.tiles))

    def forget(self) -> None:
        """Drops every selection; what was counted stays."""
        self._kept.clear()

    def _tiles(self, keys: int, always: Sequence[Interval]) -> tuple[int, int]:
        return counted_tiles(keys, _length(always), self.config.density, self.config.tile)

    def _shortest(self, queries: int, always: Sequence[Interval]) -> int | None:
        """Tokens of history from which a call is sparse."""
        if self.config.shortest is not None:
            return self.config.shortest * self._frame
        return shortest_history(self.config, queries, _length(always), self._calls)

    def _pays(self, queries: int, keys: int, always: Sequence[Interval]) -> bool:
        """Whether a call of these sizes is sparse: the history is long enough, and some tile is left out."""
        needed = self._shortest(queries, always)
        left_out = sum(self._tiles(keys, always)) < -(-keys // self.config.tile)
        return left_out and needed is not None and keys - queries >= needed

    def _select(self, layer: int, q: Tensor, k: Tensor, bias: Tensor | None, always: list[Interval]) -> Selection:
        bias = None if bias is None else per_head(bias, k)
        if self.config.groups == "all":
            q, k = (x.flatten(2)[:, :, None] for x in (q, k))
            bias = None if bias is None else bias.mean(0, keepdim=True)
        config = self.config
        projection = self._projection(layer, k)
        return select(
            q, k, bias, always, config.density, config.tile, config.query_tile, self._frame, projection
        )  # fmt: skip

    def _projection(self, layer: int, k: Tensor) -> Tensor:
        """Directions ``[channels, bits]`` of a layer's hash, the same whatever ran before."""
        if layer not in self._projections:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + layer)
            matrix = torch.randn(k.shape[-1], self.config.bits, generator=generator)
            self._projections[layer] = matrix.to(k.device, non_blocking=True)
        return self._projections[layer]

    def _count(self, q: Tensor, k: Tensor, always: list[Interval]) -> None:
        queries, keys, width = q.shape[1], k.shape[1], q.shape[2] * q.shape[3]
        counts, seen = self.counts, self.keys_seen(queries, keys, always)
        counts.calls += 1
        counts.flops += len(q) * attention_flops(queries, seen, width)
        counts.dense_flops += len(q) * attention_flops(queries, keys, width)
        if keys - queries >= self._longest:
            self._longest, self._needed = keys - queries, self._shortest(queries, always)
        if self._pays(queries, keys, always):
            counts.sparse += 1
            self._read, self._given = self._read + seen, self._given + keys

    def _count_selection(self, q: Tensor, k: Tensor) -> None:
        config, width = self.config, q.shape[2] * q.shape[3]
        flops = len(q) * selection_flops(q.shape[1], k.shape[1], width, config.bits, config.tile, config.query_tile)
        self.counts.selections += 1
        self.counts.selection_flops += flops
        self.counts.flops += flops


def _length(intervals: Sequence[Interval]) -> int:
    """Tokens of disjoint intervals."""
    return sum(end - start for start, end in intervals)
