"""Device code of ``frame_merge``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def candidate(token, number, height, width, REACH: tl.constexpr):
    """Place of a token's candidate of that number on the grid, its own first and then row by row, and whether it is on
    the grid."""
    SIDE: tl.constexpr = 2 * REACH + 1
    CENTRE: tl.constexpr = SIDE * SIDE // 2
    offset = tl.where(number == 0, CENTRE, tl.where(number <= CENTRE, number - 1, number))
    y = token // width + offset // SIDE - REACH
    x = token % width + offset % SIDE - REACH
    return y * width + x, (y >= 0) & (y < height) & (x >= 0) & (x < width)


def similarities(
    new, old, places, out, new_batch, new_token, old_batch, old_token, height, width, batch, heads,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, REACH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean over batch and heads of the cosine of each token's key to that of one candidate, -inf where there is none:
    program ``(token block, candidate)``. ``out`` is ``[candidates, height * width]``."""
    size = height * width
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place, there = candidate(token, tl.program_id(1), height, width, REACH)
    there = there & (token < size)
    who = tl.load(places + place, mask=there, other=-1)
    there = there & (who >= 0)
    channels = tl.arange(0, DIM_BLOCK)
    inside = there[:, None]
    if DIM != DIM_BLOCK:
        inside = inside & (channels[None, :] < DIM)
    news = token[:, None] * new_token + channels[None, :]
    olds = who[:, None] * old_token + channels[None, :]
    total = tl.full((ROWS,), 0.0, tl.float32)
    for part in range(0, batch * heads):
        entry, head = (part // heads).to(tl.int64), part % heads
        one = tl.load(new + entry * new_batch + head * DIM + news, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(old + entry * old_batch + head * DIM + olds, mask=inside, other=0.0).to(tl.float32)
        lengths = tl.maximum(tl.sqrt(tl.sum(one * one, 1)), 1e-12) * tl.maximum(
            tl.sqrt(tl.sum(other * other, 1)), 1e-12
        )
        total += tl.sum(one * other, 1) / lengths
    similarity = tl.where(there, total / (batch * heads), float("-inf"))
    tl.store(out + tl.program_id(1) * size + token, similarity, mask=token < size)


@triton.jit
def partners(
    similarity, best, asked, taken, least, height, width, REACH: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``temporal_merge.assign`` by one program: the place each token joins, or -1. Who asks the same place as a token
    stands around that place, so each looks there whether another is ahead of it."""
    size = height * width
    CANDIDATES: tl.constexpr = (2 * REACH + 1) * (2 * REACH + 1)
    token = tl.arange(0, BLOCK)
    real = token < size
    partner = tl.full((BLOCK,), -1, tl.int32)
    tl.store(taken + token, partner * 0, mask=real)
    tl.debug_barrier()
    for _ in range(ROUNDS):
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        choice = tl.full((BLOCK,), -1, tl.int32)
        for number in range(CANDIDATES):
            place, there = candidate(token, number, height, width, REACH)
            there = there & real & (partner < 0)
            value = tl.load(similarity + number * size + token, mask=there, other=float("-inf"))
            free = there & (value >= least) & (tl.load(taken + place, mask=there, other=1) == 0)
            better = free & (value > highest)
            highest = tl.where(better, value, highest)
            choice = tl.where(better, place, choice)
        tl.store(best + token, highest, mask=real)
        tl.store(asked + token, choice, mask=real)
        tl.debug_barrier()
        wins = real & (choice >= 0)
        for number in range(CANDIDATES):
            other, there = candidate(choice, number, height, width, REACH)
            there = there & (choice >= 0)
            same = there & (tl.load(asked + other, mask=there, other=-1) == choice)
            value = tl.load(best + other, mask=there, other=float("-inf"))
            wins = wins & ~(same & ((value > highest) | ((value == highest) & (other < token))))
        partner = tl.where(wins, choice, partner)
        tl.store(taken + choice, choice * 0 + 1, mask=wins)
        tl.debug_barrier()
    return partner


def assigned(
    similarity, places, counts, live, best, asked, taken, into, weights, grown, height, width, capacity, threshold,
    floor, REACH: tl.constexpr, ROUNDS: tl.constexpr, CHECKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each token of the frame goes: program ``(0,)``.

    ``into`` is the row of the middle it joins, or one behind the ``live`` ones; ``weights`` how many the row stood for,
    0 for a new one; ``grown`` how many rows there are then. If these are more than ``capacity`` at ``threshold``, the
    tokens are assigned again at ``floor``.
    """
    size = height * width
    token = tl.arange(0, BLOCK)
    real = token < size
    length = tl.load(live)
    partner = partners(similarity, best, asked, taken, threshold, height, width, REACH, ROUNDS, BLOCK)
    if CHECKED:
        apart = tl.sum((real & (partner < 0)).to(tl.int32), 0)
        if length + apart > capacity:
            partner = partners(similarity, best, asked, taken, floor, height, width, REACH, ROUNDS, BLOCK)
    alone = (real & (partner < 0)).to(tl.int32)
    joins = real & (partner >= 0)
    who = tl.load(places + partner, mask=joins, other=0)
    row = tl.where(joins, who, length + tl.cumsum(alone, 0) - 1)
    tl.store(into + token, row, mask=real)
    tl.store(weights + token, tl.load(counts + row, mask=joins, other=0.0), mask=real)
    tl.store(grown, length + tl.sum(alone, 0))


def joined(
    keys, values, plain, frames, middle_keys, middle_values, middle_plain, middle_frames, middle_counts, into, weights,
    keys_batch, keys_token, values_batch, values_token, plain_batch, plain_token, middle_batch, middle_token,
    middle_plain_batch, middle_plain_token, most, WIDTH: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts one token of the frame into its row of the middle: program ``(token, batch)``."""
    token, entry = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(into + token).to(tl.int64)
    weight = tl.load(weights + token)
    target = entry * middle_batch + row * middle_token
    shared = tl.where(weight > 0, WIDTH, 0)
    for start in tl.static_range(0, WIDTH, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        inside = lanes < WIDTH
        key = tl.load(keys + entry * keys_batch + token * keys_token + lanes, mask=inside)
        tl.store(middle_keys + target + lanes, key, mask=inside)
        value = tl.load(values + entry * values_batch + token * values_token + lanes, mask=inside)
        old = tl.load(middle_values + target + lanes, mask=lanes < shared, other=0.0)
        mean = (weight * old.to(tl.float32) + value.to(tl.float32)) / (weight + 1.0)
        tl.store(middle_values + target + lanes, mean.to(value.dtype), mask=inside)
    if PLAIN > 0:
        for start in tl.static_range(0, PLAIN, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            time = tl.load(plain + entry * plain_batch + token * plain_token + lanes, mask=lanes < PLAIN)
            place = middle_plain + entry * middle_plain_batch + row * middle_plain_token + lanes
            tl.store(place, time, mask=lanes < PLAIN)
    if entry == 0:
        tl.store(middle_frames + row, tl.load(frames + token))
        tl.store(middle_counts + row, tl.minimum(weight + 1.0, most))
