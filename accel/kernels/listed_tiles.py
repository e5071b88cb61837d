"""Attention over listed key tiles, read in place through the order in which keys fill the tiles.

The torch forms are those of ``accel.attention.block_sparse``: one copies what is listed, FlexAttention copies all keys
and values where there is an order. Here a key's place is looked up as it is read, and its bias with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .choose import Traffic, Verdict, jitted

MOST_CHANNELS = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}  # of a head, by what registers hold
LOG2_E = 1.0 / math.log(2.0)
BREAK_EVEN = 0.65
"""Density from which dense attention over everything is expected to be as fast: an estimate from published rates of
Triton kernels (395 to 476 TFLOP/s on an H100) and fused ones (600 to 648), until it is measured on a GPU."""


def triton_form(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, sizes: tuple[int, int], bias: Tensor | None, order: Tensor | None
) -> Tensor:
    """One launch; arguments as of ``block_sparse.gathered_tiles``."""
    from . import listed_tiles_triton as device

    batch, queries, heads, dim = q.shape
    rows, kept = tiles.shape[2:]
    out = v.new_empty(q.shape)
    constants, launch = built(q.dtype, *sizes, dim, order is not None, bias is not None, q.is_cuda)
    parts = -(-sizes[0] // constants["ROWS"])
    jitted(device.attend, q.device)[(rows * parts, batch * heads)](
        q, k, v, tiles, tiles if order is None else order, q if bias is None else bias, out,
        *(x.stride(axis) for x in (q, k, v, out) for axis in range(3)), *_steps(tiles, (batch, heads)),
        tiles.stride(2), *((0, 0) if order is None else _steps(order, (batch, heads))),
        0 if bias is None or len(bias) == 1 else bias.stride(0), queries, k.shape[1], heads, kept,
        LOG2_E / math.sqrt(dim), **constants, **launch,
    )  # fmt: skip
    return out


def supports(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, sizes: tuple[int, int], bias: Tensor | None, order: Tensor | None
) -> Verdict:
    """Whether the kernel takes these tensors, and if not, why."""
    if q.dtype not in MOST_CHANNELS or k.dtype != q.dtype or v.dtype != q.dtype:
        return False, f"no kernel for {q.dtype}, {k.dtype} and {v.dtype}"
    if v.shape[-1] != q.shape[-1] or not 1 <= q.shape[-1] <= MOST_CHANNELS[q.dtype]:
        return False, f"no kernel for heads of {q.shape[-1]} and {v.shape[-1]} channels in {q.dtype}"
    lists = [x for x in (q, k, v, tiles, bias, order) if x is not None]
    if min(x.numel() for x in lists) < 1:
        return False, "no queries, no keys, or nothing listed"
    if any(x.stride(-1) != 1 for x in lists):
        return False, "channels, and the tiles of a list, must lie side by side"
    if max(x.shape[1] * x.stride(1) for x in (q, k, v)) >= 2**31:
        return False, "a batch entry spans 2^31 numbers or more"
    return True, ""


def pays(tiles: Tensor, tile: int, keys: int) -> Verdict:
    """Whether the kernel is expected to be faster than dense attention at this density, and if not, why."""
    density = tiles.shape[-1] / -(-keys // tile)
    if density > BREAK_EVEN:
        return False, f"density {density:.2f} is above {BREAK_EVEN}"
    return True, ""


def traffic(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, sizes: tuple[int, int], bias: Tensor | None, order: Tensor | None
) -> Traffic:
    """Where each key tile is listed by some query tile of each head: everything read once, the result written once."""
    sides = (q, k, v, tiles, bias, order)
    return Traffic(1, sum(x.numel() * x.element_size() for x in sides if x is not None), v.element_size() * q.numel())


def built(
    dtype: torch.dtype, query_tile: int, tile: int, dim: int, ordered: bool, biased: bool, cuda: bool = True
) -> tuple[dict[str, Any], dict[str, int]]:
    """Compile-time arguments, and warps and stages, with which no register spills. Triton's interpreter cannot multiply
    bfloat16, so there the operands are widened; float32 goes through the tensor cores in three parts (tf32x3)."""
    wide = dtype == torch.float32
    rows, keys = (max(16, min(32 if wide else 64, 1 << (x - 1).bit_length())) for x in (query_tile, tile))
    constants = {
        "QUERY_TILE": query_tile, "TILE": tile, "DIM": dim, "DIM_BLOCK": max(16, 1 << (dim - 1).bit_length()),
        "ROWS": rows, "KEYS": keys, "ORDERED": ordered, "BIASED": biased,
        "UPCAST": dtype == torch.bfloat16 and not cuda, "PRECISION": "tf32x3",
    }  # fmt: skip
    return constants, {"num_warps": 8 if wide else 4, "num_stages": 2}


def _steps(x: Tensor, shape: tuple[int, int]) -> tuple[int, int]:
    """Strides of the first two axes, 0 where one entry serves all of ``shape``."""
    return tuple(0 if x.shape[axis] == 1 else x.stride(axis) for axis in range(2))
