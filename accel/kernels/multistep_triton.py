"""Device code of ``multistep``."""

from __future__ import annotations

import triton.language as tl


def linear_step(
    velocities, table, x, out, point_stride, v_batch, v_channel, v_frame, x_batch, x_channel, x_frame, channels, frames,
    size, POINTS: tl.constexpr, ENTRIES: tl.constexpr, FROM_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A piece of one latent frame of one channel: program ``(row, piece)``, rows in the order of ``out``.

    ``table`` is ``[POINTS + 1, ENTRIES, frames]``: a coefficient for each point, and whether the frame moves. A point
    whose coefficient is 0 is not read.
    """
    row = tl.program_id(0)
    frame = row % frames
    channel = row // frames % channels
    entry = row // frames // channels
    coefficient = table + (entry * frames if ENTRIES > 1 else 0) + frame
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    source = velocities + entry.to(tl.int64) * v_batch + channel.to(tl.int64) * v_channel + frame.to(tl.int64) * v_frame
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for point in tl.static_range(POINTS):
        weight = tl.load(coefficient + point * ENTRIES * frames)
        wanted = index < tl.where(weight != 0.0, size, 0)
        total += weight * tl.load(source + point * point_stride + index, mask=wanted, other=0.0).to(tl.float32)
    if FROM_X:
        before = x + entry.to(tl.int64) * x_batch + channel.to(tl.int64) * x_channel + frame.to(tl.int64) * x_frame
        start = tl.load(before + index, mask=inside, other=0.0)
        moves = tl.load(coefficient + POINTS * ENTRIES * frames) > 0.0
        total = tl.where(moves, start.to(tl.float32) + total, start.to(tl.float32))
    tl.store(out + row.to(tl.int64) * size + index, total.to(out.dtype.element_ty), mask=inside)
