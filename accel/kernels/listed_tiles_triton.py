"""Device code of ``listed_tiles``."""

from __future__ import annotations

import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


def attend(
    q, k, v, tiles, order, bias, out, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    out_batch, out_token, out_head, tiles_batch, tiles_head, tiles_row, order_batch, order_head, bias_head, queries,
    keys, heads, kept, scale, QUERY_TILE: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ORDERED: tl.constexpr, BIASED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of ``ROWS`` queries over the key tiles that their query tile lists, by online softmax: program
    ``(part of a query tile, batch * heads)``."""
    PARTS: tl.constexpr = (QUERY_TILE + ROWS - 1) // ROWS
    PIECES: tl.constexpr = (TILE + KEYS - 1) // KEYS
    query_tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    tiles += batch * tiles_batch + head * tiles_head + query_tile.to(tl.int64) * tiles_row
    if ORDERED:
        order += batch * order_batch + head * order_head
    if BIASED:
        bias += head * bias_head
    channels = tl.arange(0, DIM_BLOCK)
    within = part * ROWS + tl.arange(0, ROWS)
    rows = query_tile * QUERY_TILE + within
    asked = (rows < queries) & (within < QUERY_TILE)
    inside = asked[:, None]
    if DIM != DIM_BLOCK:
        inside = inside & (channels[None, :] < DIM)
    queried = tl.load(q + rows[:, None] * q_token + channels[None, :], mask=inside, other=0.0)
    if UPCAST:
        queried = queried.to(tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    found = tl.full((ROWS, DIM_BLOCK), 0.0, tl.float32)
    lanes = tl.arange(0, KEYS)
    for step in range(0, kept * PIECES):
        listed = tl.load(tiles + step // PIECES).to(tl.int32)
        offset = step % PIECES * KEYS + lanes
        place = listed * TILE + offset
        there = (place < keys) & (offset < TILE)
        token = place
        if ORDERED:
            token = tl.load(order + place, mask=there, other=0).to(tl.int32)
        wanted = there[:, None]
        if DIM != DIM_BLOCK:
            wanted = wanted & (channels[None, :] < DIM)
        key = tl.load(k + token[:, None] * k_token + channels[None, :], mask=wanted, other=0.0)
        value = tl.load(v + token[:, None] * v_token + channels[None, :], mask=wanted, other=0.0)
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        logits = tl.dot(queried, tl.trans(key), input_precision=PRECISION) * scale
        if BIASED:
            logits += (tl.load(bias + token, mask=there, other=0.0).to(tl.float32) * LOG2_E)[None, :]
        logits = tl.where(there[None, :], logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(logits - base[:, None])
        fade = tl.exp2(largest - base)
        total = total * fade + tl.sum(shares, 1)
        found = tl.dot(shares.to(value.dtype), value, found * fade[:, None], input_precision=PRECISION)
        largest = higher
    found = found / total[:, None]
    tl.store(
        out + batch * out_batch + head * out_head + rows[:, None] * out_token + channels[None, :],
        found.to(out.dtype.element_ty),
        mask=inside,
    )
