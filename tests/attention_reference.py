"""Sparse attention from its definition: dense, in float64, with the keys that are not read masked out."""

from __future__ import annotations

import torch


def tensors(queries, keys, heads=2, width=8, batch=1, seed=0, dtype=torch.float64):
    """Random queries, keys and values ``[B, n, heads, width]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, heads, width, generator=generator, dtype=dtype) for n in (queries, keys, keys)]


def lists(shape, count, kept, seed=0):
    """Random lists of ``kept`` of ``count`` key tiles, for every place of ``shape``."""
    scores = torch.rand(*shape, count, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(-1)[..., :kept]


def seen(tiles, tile, queries, keys, order=None, query_tile=None):
    """Which keys each query reads, bool ``[B or 1, heads or 1, queries, keys]``, from the definition."""
    tiles = tiles if tiles.ndim == 4 else tiles[None]
    place = torch.arange(keys).expand(*tiles.shape[:2], keys)
    if order is not None:
        place = order.argsort(-1)
    query_tile = torch.arange(queries) // (query_tile or tile)
    listed = torch.zeros(*tiles.shape[:3], -(-keys // tile), dtype=torch.bool).scatter_(3, tiles, True)
    index = (place // tile)[:, :, None].expand(-1, -1, queries, -1)
    return listed[:, :, query_tile].expand(*index.shape[:2], -1, -1).gather(3, index)


def masked(q, k, v, allowed, bias=None):
    """Dense attention in float64 over the allowed keys."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.double().reshape(1, -1, 1, k.shape[1])
    logits = logits.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v.double())
