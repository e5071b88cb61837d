"""Device code of ``time_turn``."""

from __future__ import annotations

import triton.language as tl


def turn(
    x, cos, sin, out, x_batch, x_token, x_head, out_batch, out_token, out_head, tokens, each, HEADS: tl.constexpr,
    CHANNELS: tl.constexpr, TURNED_HEADS: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotates ``BLOCK`` scalars of one batch entry: program ``(tile, entry)``.

    ``cos`` and ``sin`` are ``[positions, TURNED_HEADS, CHANNELS / 2]``, a position for ``each`` neighbouring tokens;
    ``FLAT`` says that the scalars of ``x`` lie one after another.
    """
    entry = tl.program_id(1).to(tl.int64)
    scalar = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = scalar < tokens * HEADS * CHANNELS
    row, channel = scalar // CHANNELS, scalar % CHANNELS
    token, head = row // HEADS, row % HEADS
    place = scalar if FLAT else token * x_token + head * x_head + channel
    given = tl.load(x + entry * x_batch + place, mask=inside, other=0.0).to(tl.float32)

    pair = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    pair_row = pair // (CHANNELS // 2)
    turned_head = pair_row % HEADS if TURNED_HEADS > 1 else 0
    angle = (pair_row // HEADS // each * TURNED_HEADS + turned_head) * (CHANNELS // 2) + pair % (CHANNELS // 2)
    pair_inside = pair < tokens * HEADS * (CHANNELS // 2)
    c = tl.load(cos + angle, mask=pair_inside, other=0.0)
    s = tl.load(sin + angle, mask=pair_inside, other=0.0)

    even, odd = tl.split(tl.reshape(given, (BLOCK // 2, 2)))
    turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK,))
    place = token * out_token + head * out_head + channel
    tl.store(out + entry * out_batch + place, turned.to(out.dtype.element_ty), mask=inside)
