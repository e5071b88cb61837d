"""Attention that each key gets, in two passes over the queries and keys and without the matrix of the two.

The first pass finds the logarithm of each query's softmax normaliser, the second the sums of the columns. The torch
forms are ``accel.kv.importance_redundancy.tiled_mass`` and ``tiled_logsumexp``, which hold a tile of logits at a time;
here no logit ever leaves the registers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .choose import Traffic, Verdict, jitted

MOST_CHANNELS = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}  # of a head, by what registers hold
LOG2_E = 1.0 / math.log(2.0)


def mass_form(q: Tensor, k: Tensor, tile: int = 0) -> Tensor:
    """Two launches; ``tile`` has no say."""
    from . import column_mass_triton as device

    totals, mass = _rows(q, k), torch.empty(k.shape[:-1], dtype=torch.float32, device=k.device)
    given, options = _arguments(q, k)
    rows, columns = (-(-x.shape[-2] // options[name]) for x, name in ((q, "ROWS"), (k, "KEYS")))
    places = math.prod(k.shape[:-2])
    jitted(device.row_totals, q.device)[(rows, places)](q, k, totals, *given, **options)
    jitted(device.column_sums, q.device)[(columns, places)](q, k, totals, mass, *given, **options)
    return mass


def logsumexp_form(q: Tensor, k: Tensor, tile: int = 0) -> Tensor:
    """The first pass alone."""
    from . import column_mass_triton as device

    totals, (given, options) = _rows(q, k), _arguments(q, k)
    grid = (-(-q.shape[-2] // options["ROWS"]), math.prod(k.shape[:-2]))
    jitted(device.row_totals, q.device)[grid](q, k, totals, *given, **options)
    return totals / LOG2_E


def supports(q: Tensor, k: Tensor, tile: int = 0) -> Verdict:
    """Whether the kernels take these queries and keys, and if not, why."""
    if k.dtype not in MOST_CHANNELS or q.dtype != k.dtype:
        return False, f"no kernel for {q.dtype} and {k.dtype}"
    if q.ndim not in (3, 4) or q.ndim != k.ndim:
        return False, f"no kernel for {q.ndim} axes"
    if min(q.numel(), k.numel()) < 1 or not 1 <= q.shape[-1] <= MOST_CHANNELS[q.dtype]:
        return False, f"no queries, no keys, or heads of {q.shape[-1]} channels in {q.dtype}"
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        return False, "channels must lie side by side"
    if max(x.shape[-2] * x.stride(-2) for x in (q, k)) >= 2**31:
        return False, "a head spans 2^31 numbers or more"
    return True, ""


def traffic(q: Tensor, k: Tensor) -> Traffic:
    """Of ``mass_form``: queries and keys read by both launches, normalisers written by one and read by the other."""
    totals = 4 * math.prod(k.shape[:-2]) * q.shape[-2]
    sides = (q.numel() + k.numel()) * q.element_size()
    return Traffic(2, 2 * sides + totals, totals + 4 * math.prod(k.shape[:-1]))


def _rows(q: Tensor, k: Tensor) -> Tensor:
    return torch.empty((*k.shape[:-2], q.shape[-2]), dtype=torch.float32, device=q.device)


def _arguments(q: Tensor, k: Tensor) -> tuple[tuple, dict[str, Any]]:
    """What both kernels are told behind their tensors, by place and by name."""
    q, k = (x if x.ndim == 4 else x[None] for x in (q, k))
    heads, (queries, dim) = k.shape[1], q.shape[2:]
    given = (*q.stride()[:3], *k.stride()[:3], queries, k.shape[2], heads, LOG2_E / math.sqrt(dim))
    constants, launch = built(q.dtype, q.shape[1] // heads, dim, q.is_cuda)
    return given, constants | launch


def built(dtype: torch.dtype, group: int, dim: int, cuda: bool = True) -> tuple[dict[str, Any], dict[str, int]]:
    """Compile-time arguments, and warps and stages, with which no register spills. Triton's interpreter cannot multiply
    bfloat16, so there the operands are widened; float32 goes through the tensor cores in three parts (tf32x3)."""
    wide = dtype == torch.float32
    edge = 32 if wide else 64
    constants = {
        "GROUP": group, "DIM": dim, "DIM_BLOCK": max(16, 1 << (dim - 1).bit_length()), "ROWS": edge, "KEYS": edge,
        "UPCAST": dtype == torch.bfloat16 and not cuda, "PRECISION": "tf32x3",
    }  # fmt: skip
    few = group == 1 and not wide
    return constants, {"num_warps": 4 if few else 8, "num_stages": 3 if few else 2}
