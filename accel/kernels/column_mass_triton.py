"""Device code of ``column_mass``."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def group_logits(
    q, k, start, queries, q_head, q_token, scale, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits, in powers of two, ``[ROWS, keys]`` of the query rows from ``start`` with the keys ``k``
    ``[DIM_BLOCK, keys]``: the largest of the group's."""
    rows = start + tl.arange(0, ROWS)
    channels = tl.arange(0, DIM_BLOCK)
    inside = rows[:, None] < queries
    if DIM != DIM_BLOCK:
        inside = inside & (channels[None, :] < DIM)
    source = q + rows[:, None] * q_token + channels[None, :]
    logits = tl.full((ROWS, k.shape[1]), float("-inf"), tl.float32)
    for head in range(GROUP):
        part = tl.load(source + head * q_head, mask=inside, other=0.0)
        if UPCAST:
            part = part.to(tl.float32)
        logits = tl.maximum(logits, tl.dot(part, k, input_precision=PRECISION), propagate_nan=tl.PropagateNan.ALL)
    return logits * scale


def row_totals(
    q, k, totals, q_batch, q_head, q_token, k_batch, k_head, k_token, queries, keys, heads, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, in powers of two, of ``ROWS`` queries over all keys: program ``(row block, batch * heads)``."""
    block, place = tl.program_id(0), tl.program_id(1)
    batch, head = (place // heads).to(tl.int64), place % heads
    q += batch * q_batch + head.to(tl.int64) * GROUP * q_head
    k += batch * k_batch + head.to(tl.int64) * k_head
    channels = tl.arange(0, DIM_BLOCK)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    for start in range(0, keys, KEYS):
        columns = start + tl.arange(0, KEYS)
        inside = columns[None, :] < keys
        if DIM != DIM_BLOCK:
            inside = inside & (channels[:, None] < DIM)
        part = tl.load(k + columns[None, :] * k_token + channels[:, None], mask=inside, other=0.0)
        if UPCAST:
            part = part.to(tl.float32)
        logits = group_logits(
            q, part, block * ROWS, queries, q_head, q_token, scale, GROUP, DIM, DIM_BLOCK, ROWS, UPCAST, PRECISION
        )  # fmt: skip
        logits = tl.where(columns[None, :] < keys, logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp2(largest - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        largest = higher
    rows = block * ROWS + tl.arange(0, ROWS)
    tl.store(totals + place.to(tl.int64) * queries + rows, largest + tl.log2(total), mask=rows < queries)


def column_sums(
    q, k, totals, mass, q_batch, q_head, q_token, k_batch, k_head, k_token, queries, keys, heads, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mean over all queries of the softmax at ``KEYS`` keys: program ``(key block, batch * heads)``."""
    block, place = tl.program_id(0), tl.program_id(1)
    batch, head = (place // heads).to(tl.int64), place % heads
    q += batch * q_batch + head.to(tl.int64) * GROUP * q_head
    k += batch * k_batch + head.to(tl.int64) * k_head
    channels = tl.arange(0, DIM_BLOCK)
    columns = block * KEYS + tl.arange(0, KEYS)
    inside = columns[None, :] < keys
    if DIM != DIM_BLOCK:
        inside = inside & (channels[:, None] < DIM)
    part = tl.load(k + columns[None, :] * k_token + channels[:, None], mask=inside, other=0.0)
    if UPCAST:
        part = part.to(tl.float32)
    sums = tl.full((ROWS, KEYS), 0.0, tl.float32)
    for start in range(0, queries, ROWS):
        logits = group_logits(
            q, part, start, queries, q_head, q_token, scale, GROUP, DIM, DIM_BLOCK, ROWS, UPCAST, PRECISION
        )  # fmt: skip
        rows = start + tl.arange(0, ROWS)
        total = tl.load(totals + place.to(tl.int64) * queries + rows, mask=rows < queries, other=float("inf"))
        sums += tl.exp2(logits - total[:, None])
    out = mass + place.to(tl.int64) * keys + columns
    tl.store(out, tl.sum(sums, 0) / queries, mask=columns < keys)
