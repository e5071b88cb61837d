"""One latent frame joins the tokens of a middle: similarity to the candidates around, who joins whom, and the merge.

Three launches; nothing as large as the frame is made on the way, and nothing is read by the host. The torch form is
``accel.kv.temporal_merge.merge_frame``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .choose import Traffic, Verdict, jitted

if TYPE_CHECKING:
    from ..kv.temporal_merge import TemporalMergeConfig
    from ..kv.tokens import Tokens

ROWS, BLOCK = 32, 512
ROUNDS = 3
MOST_TOKENS, MOST_REACH = 4096, 3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triton_form(
    places: Tensor, live: Tensor, middle: Tokens, frame: Tokens, capacity: int | None, config: TemporalMergeConfig,
    grid: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments as of ``temporal_merge.merge_frame``."""
    from . import frame_merge_triton as device

    (height, width), size, on = grid, len(frame), places.device
    batch, _, heads, dim = frame.keys.shape
    candidates = (2 * config.neighbourhood + 1) ** 2
    similarity = torch.empty((candidates, size), device=on)
    jitted(device.similarities, on)[(-(-size // ROWS), candidates)](
        frame.keys, middle.keys, places, similarity, *frame.keys.stride()[:2], *middle.keys.stride()[:2], height, width,
        batch, heads, **similarity_constants(dim, config.neighbourhood),
    )  # fmt: skip
    best, weights = torch.empty((2, size), device=on)
    asked, taken = torch.empty((2, size), dtype=torch.int32, device=on)
    into, grown = torch.empty_like(places), torch.empty_like(live)
    jitted(device.assigned, on)[(1,)](
        similarity, places, middle.counts, live, best, asked, taken, into, weights, grown, height, width,
        0 if capacity is None else capacity, config.threshold, config.floor,
        **assign_constants(size, config.neighbourhood, capacity is not None),
    )  # fmt: skip
    plain, middle_plain = (x.keys if x.plain is None else x.plain for x in (frame, middle))
    channels = 0 if frame.plain is None else frame.plain.shape[2] * frame.plain.shape[3]
    sides = (frame.keys, frame.values, plain, middle.keys, middle_plain)
    jitted(device.joined, on)[(size, batch)](
        frame.keys, frame.values, plain, frame.frames, middle.keys, middle.values, middle_plain, middle.frames,
        middle.counts, into, weights, *(x.stride(axis) for x in sides for axis in range(2)), config.most,
        WIDTH=heads * dim, PLAIN=channels, BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    return into, grown


def supports(
    places: Tensor, live: Tensor, middle: Tokens, frame: Tokens, capacity: int | None, config: TemporalMergeConfig,
    grid: tuple[int, int],
) -> Verdict:  # fmt: skip
    """Whether the kernels take this frame, and if not, why."""
    sides = (frame.keys, frame.values, middle.keys, middle.values)
    if frame.keys.dtype not in DTYPES or len({x.dtype for x in sides}) > 1:
        return False, f"no kernel for {frame.keys.dtype} and {frame.values.dtype}"
    if len(frame) > MOST_TOKENS or config.neighbourhood > MOST_REACH:
        return False, f"{len(frame)} tokens with a neighbourhood of {config.neighbourhood}"
    plain = (x.plain for x in (frame, middle) if x.plain is not None)
    if any(x.stride(3) != 1 or x.stride(2) != x.shape[3] for x in (*sides, *plain)):
        return False, "the channels of a token must lie one after another"
    if middle.keys.stride() != middle.values.stride() or max(x.shape[1] * x.stride(1) for x in sides) >= 2**31:
        return False, "the middle's keys and values lie in different ways, or span 2^31 numbers"
    return True, ""


def traffic(
    batch: int, heads: int, dim: int, grid: tuple[int, int], joining: int, element: int, plain: int, reach: int
) -> Traffic:
    """Of a frame whose places all have a token and of which ``joining`` tokens find one to join: the frame's keys and
    values and the candidates' keys are read, values that get company are, and a row is written for each token. Where
    not every token finds one, a few of the notes on who asks whom are not read again.

    Args:
        element: bytes of a number. plain: channels of a head that turn with time.
    """
    size, keys, times = grid[0] * grid[1], batch * heads * dim * element, batch * heads * plain * element
    table = 4 * (2 * reach + 1) ** 2 * size
    on_grid = 4 * math.prod(sum(max(0, side - abs(by)) for by in range(-reach, reach + 1)) for side in grid)
    notes = size * (4 + 4 + 4)  # best, asked, taken
    similarity = (2 * size * keys + 8 * size, table)
    assigned = (on_grid + notes + joining * (8 + 4) + 8, notes + size * (8 + 4) + 8)
    joined = (size * (2 * keys + times + 8 + 8 + 4) + joining * keys, size * (2 * keys + times + 8 + 4))
    return Traffic(3, *(sum(side) for side in zip(similarity, assigned, joined, strict=True)))


def similarity_constants(dim: int, reach: int) -> dict[str, Any]:
    return {"DIM": dim, "DIM_BLOCK": max(16, 1 << (dim - 1).bit_length()), "REACH": reach, "ROWS": ROWS}


def assign_constants(size: int, reach: int, checked: bool) -> dict[str, Any]:
    lanes = max(32, 1 << (size - 1).bit_length())
    return {
        "REACH": reach, "ROUNDS": ROUNDS, "CHECKED": checked, "BLOCK": lanes,
        "num_warps": max(1, min(16, lanes // 128)),
    }  # fmt: skip
