"""Relative L1 of groups of rows since the last look, which is replaced by this one in the same pass.

A row is one latent frame of a feature, a group any rows of any features. Rows are summed in a first pass and pooled in
a second one, so a row that belongs to several groups is read once, and sums always come in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .choose import Kernel, Traffic, Verdict, jitted

CHUNK, BLOCK, WARPS = 16384, 2048, 8
POOL_BLOCK = 1024
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_rehearsed: set[torch.device] = set()


class Look(NamedTuple):
    """A feature now and at the last look.

    Attributes:
        now: ``[B, T, n]``, any strides. rows: ``[B, R, n]`` what is remembered, in the same dtype. spans: intervals
            ``[start, end)`` of remembered rows that the T rows stand for, in order.
    """

    now: Tensor
    rows: Tensor
    spans: tuple[tuple[int, int], ...]


def torch_form(looks: Sequence[Look], table: Sequence[Sequence[float]]) -> Tensor:
    """The specification."""
    sums = []
    for now, rows, spans in looks:
        before = torch.cat([rows[:, first:last] for first, last in spans], 1).float()
        sums.append(torch.stack(((now.float() - before).abs().sum((0, 2)), before.abs().sum((0, 2)))))
        offset = 0
        for first, last in spans:
            rows[:, first:last] = now[:, offset : offset + last - first]
            offset += last - first
    totals = torch.cat(sums, 1)
    weights = torch.tensor(table, dtype=torch.float32).to(totals.device, non_blocking=True)
    change, size = torch.where(weights[:, None, :-1] > 0.0, totals, 0.0).sum(-1).unbind(1)
    return change / (size + weights[:, -1])


def triton_form(looks: Sequence[Look], table: Sequence[Sequence[float]]) -> Tensor:
    """One launch for each feature and one that pools."""
    from . import relative_l1_triton as device

    now = looks[0].now
    columns, pieces = sum(look.now.shape[1] for look in looks), _pieces(looks)
    partial = torch.empty((2, columns, pieces), dtype=torch.float32, device=now.device)
    weights = torch.tensor(table, dtype=torch.float32).to(now.device, non_blocking=True)
    pool = functools.partial(
        jitted(device.pooled, now.device)[(len(table),)], columns=columns, pieces=pieces, BLOCK=POOL_BLOCK
    )
    found = torch.empty(len(table), dtype=torch.float32, device=now.device)
    _rehearse(pool, now.device, partial, weights, found)
    column = 0
    for now, rows, spans in looks:
        batch, count, length = now.shape
        split, first_shift, second_shift = _shifts(spans)
        jitted(device.partial_sums, now.device)[(count, pieces)](
            now, rows, partial, now.stride(0), now.stride(1), now.stride(2), rows.stride(0), length, split, first_shift,
            second_shift, batch, -(-length // CHUNK), pieces, column, columns, CHUNK=CHUNK, BLOCK=BLOCK, REFRESH=True,
            num_warps=WARPS,
        )  # fmt: skip
        column += count
    pool(partial, weights, found)
    return found


def supports(looks: Sequence[Look], table: Sequence[Sequence[float]]) -> Verdict:
    """Whether the kernel takes these features, and if not, why."""
    for now, rows, spans in looks:
        if now.dtype not in DTYPES or rows.dtype != now.dtype:
            return False, f"no kernel for {now.dtype} against {rows.dtype}"
        if len(spans) > 2 or not rows.is_contiguous():
            return False, "remembered rows must be contiguous and at most two intervals"
        if now.shape[2] < 1 or now.shape[2] * max(now.stride(2), 1) >= 2**31:
            return False, f"rows of {now.shape[2]} scalars"
    return True, ""


def traffic(looks: Sequence[Look], table: Sequence[Sequence[float]]) -> Traffic:
    """Counted from the shapes: every feature and what was remembered read once, what is remembered written once."""
    columns, pieces, groups = sum(look.now.shape[1] for look in looks), _pieces(looks), len(table)
    feature = sum(look.now.numel() * look.now.element_size() for look in looks)
    pooled = sum(any(weights[column] > 0.0 for weights in table) for column in range(columns))
    return Traffic(
        len(looks) + 1,
        2 * feature + 4 * (2 * pooled * pieces + groups * (columns + 1)),
        feature + 4 * (2 * columns * pieces + groups),
    )


group_relative_l1 = Kernel("relative L1", torch_form, triton_form, supports)
"""``group_relative_l1(looks, table, backend="auto")`` -> fp32 ``[G]``, and the looks' rows are what they are now.

Args:
    looks: C rows in all. table: for each group a number for each row, above 0 where the group has it, and the number
        added to its denominator, ``[G][C + 1]``; NaN comes out of a group of no rows and 0.
"""


def _pieces(looks: Sequence[Look]) -> int:
    return max(look.now.shape[0] * -(-look.now.shape[2] // CHUNK) for look in looks)


def _shifts(spans: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    """Rows of the first interval, and how far from its own number a row of either is remembered."""
    (first, last), (second, _) = spans[0], spans[-1]
    split = last - first
    return split, first, second - split if len(spans) > 1 else first


def _rehearse(pool: Callable, device: torch.device, *tensors: Tensor) -> None:
    """Launches the second kernel once before the first one ever writes: what was remembered must not be lost if it
    cannot be compiled."""
    if device.type == "cuda" and device not in _rehearsed:
        pool(*tensors)
        _rehearsed.add(device)
