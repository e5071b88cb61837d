"""Device code of ``relative_l1``."""

from __future__ import annotations

import triton.language as tl


def partial_sums(
    now, rows, partial, now_batch, now_row, now_stride, rows_batch, length, split, first_shift, second_shift, batch,
    tiles, pieces, column, columns, CHUNK: tl.constexpr, BLOCK: tl.constexpr, REFRESH: tl.constexpr,
):  # fmt: skip
    """Sums of ``|now - before|`` and ``|before|`` over one chunk of one row; ``before`` becomes ``now`` on the way.

    Program ``(row, piece)``. ``partial`` is ``[2, columns, pieces]``; pieces beyond ``batch * tiles`` are 0.
    """
    row, piece = tl.program_id(0), tl.program_id(1)
    entry, tile = piece // tiles, piece % tiles
    place = row + tl.where(row < split, first_shift, second_shift)
    source = now + entry.to(tl.int64) * now_batch + row.to(tl.int64) * now_row
    target = rows + entry.to(tl.int64) * rows_batch + place.to(tl.int64) * length
    start = tile * CHUNK
    end = tl.where(entry < batch, tl.minimum(start + CHUNK, length), start)
    whole = start + (end - start) // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    change = tl.full((BLOCK,), 0.0, tl.float32)
    size = tl.full((BLOCK,), 0.0, tl.float32)
    for at in range(start, whole, BLOCK):
        index = at + lanes
        new, before = tl.load(source + index * now_stride), tl.load(target + index)
        if REFRESH:
            tl.store(target + index, new)
        old = before.to(tl.float32)
        change += tl.abs(new.to(tl.float32) - old)
        size += tl.abs(old)
    if whole < end:
        index = whole + lanes
        inside = index < end
        new = tl.load(source + index * now_stride, mask=inside, other=0.0)
        before = tl.load(target + index, mask=inside, other=0.0)
        if REFRESH:
            tl.store(target + index, new, mask=inside)
        old = before.to(tl.float32)
        change += tl.abs(new.to(tl.float32) - old)
        size += tl.abs(old)
    out = partial + (column + row) * pieces + piece
    tl.store(out, tl.sum(change))
    tl.store(out + columns * pieces, tl.sum(size))


def pooled(partial, table, out, columns, pieces, BLOCK: tl.constexpr):
    """Relative L1 of one group: program ``(group,)``; ``table`` is ``[groups, columns + 1]``, see ``relative_l1``."""
    group = tl.program_id(0)
    weights = table + group * (columns + 1)
    total = columns * pieces
    lanes = tl.arange(0, BLOCK)
    change = tl.full((BLOCK,), 0.0, tl.float32)
    size = tl.full((BLOCK,), 0.0, tl.float32)
    for at in range(0, total, BLOCK):
        index = at + lanes
        inside = index < total
        used = tl.load(weights + index // pieces, mask=inside, other=0.0) > 0.0
        change += tl.load(partial + index, mask=inside & used, other=0.0)
        size += tl.load(partial + total + index, mask=inside & used, other=0.0)
    tl.store(out + group, tl.sum(change) / (tl.sum(size) + tl.load(weights + columns)))
