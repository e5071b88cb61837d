"""Attention in which every tile of queries reads a list of key tiles of its own.

Key tile t of a head is its keys ``[t * tile, (t + 1) * tile)``, or those at these places of ``order``; the last one may
be shorter. The result is exactly dense attention over the listed keys. Three implementations:

- ``gathered_tiles``, plain torch on any device: copies the listed keys and values of a few query tiles at a time into
  scratch of at most ``SCRATCH`` bytes (or what one query tile lists, if more) and calls fused attention on them.
- ``flex_tiles``: FlexAttention, which reads the tiles in place; ``supports`` says where it is taken. Its first call on
  a new kind of shape compiles for 10 to 20 s, so on a CPU it has to be asked for. With an ``order`` it needs the keys
  and values reordered in a copy; the store itself is never reordered.
- ``kernels.listed_tiles``, a Triton kernel that looks every key's place up as it reads it: taken on CUDA devices where
  FlexAttention is not, or would copy for an ``order``, and few enough tiles are listed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import listed_tiles
from ..kernels.choose import Kernel, Verdict, triton_installed
from .dense import mask_dtype, per_head

SCRATCH = 1 << 26
BACKENDS = ("auto", "gather", "flex", "triton")


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    tile: int = 64,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    query_tile: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention over listed key tiles.

    Args:
        q: ``[B, queries, heads, head_dim]``. k, v: ``[B, keys, heads, head_dim]``, any strides.
        tiles: int64 ``[heads or 1, query tiles, kept]``, or the same after an axis ``B or 1``: the key tiles each query
            tile reads, each at most once, at least one of them with a key whose bias is finite.
        tile: tokens of a key tile.
        bias: ``[keys]`` or ``[heads, keys]`` added to the logits, at the keys' own places.
        order: int64 ``[B or 1, heads or 1, keys]``, the permutation in which keys fill the tiles; None: as they stand.
        query_tile: tokens of a query tile; None: as many as a key tile has. Gathered keys are copied once per query
            tile, so larger ones copy less.
        backend: ``gather``, ``flex``, ``triton``, or ``auto`` (see above).

    Returns:
        ``[B, queries, heads, head_dim]``.

    Raises:
        ValueError: tiles of another shape, an unknown backend, or flex or triton where they cannot run.
    """
    query_tile = query_tile or tile
    tiles, order = _checked(q, k, tiles, query_tile, order)
    bias = None if bias is None else per_head(bias, k)
    if backend not in BACKENDS:
        raise ValueError(f"attend_tiles: backend is {backend!r}; use one of {', '.join(BACKENDS)}.")
    given = (q, k, v, tiles, (query_tile, tile), bias, order)
    if backend == "gather":
        return gathered_tiles(*given)
    if backend in ("auto", "triton"):
        return listed_kernel(*given, backend=backend)
    ok, reason = _flex_supports(*given)
    if not ok and q.device.type != "cpu":
        raise ValueError(f"attend_tiles: FlexAttention cannot run: {reason}; use backend 'gather' or 'auto'.")
    return flex_tiles(*given)


def _checked(
    q: Tensor, k: Tensor, tiles: Tensor, query_tile: int, order: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Tiles and order with their batch axis."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    tiles = tiles if tiles.ndim == 4 else tiles[None]
    rows = -(-queries // query_tile)
    if (
        tiles.ndim != 4
        or tiles.shape[0] not in (1, batch)
        or tiles.shape[1] not in (1, heads)
        or tiles.shape[2] != rows
    ):
        raise ValueError(
            f"attend_tiles: tiles have shape {tuple(tiles.shape)}; {queries} queries in tiles of {query_tile} need "
            f"[{heads} or 1, {rows}, kept], with an axis {batch} or 1 before it where batch entries differ."
        )
    if order is not None and tuple(order.shape) not in itertools.product((1, batch), (1, heads), (keys,)):
        raise ValueError(
            f"attend_tiles: order has shape {tuple(order.shape)}; use [{batch} or 1, {heads} or 1, {keys}]."
        )
    return tiles, order


def gathered_tiles(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, sizes: tuple[int, int], bias: Tensor | None, order: Tensor | None
) -> Tensor:
    """``attend_tiles`` by gathering; tiles ``[B or 1, heads or 1, query tiles, kept]``, sizes of a query and of a key
    tile, bias ``[heads or 1, keys]``."""
    batch, queries, heads, width = q.shape
    rows, kept = tiles.shape[2:]
    query_tile, tile = sizes
    padded = F.pad(q, (0, 0, 0, 0, 0, rows * query_tile - queries)).unflatten(1, (rows, query_tile)).transpose(2, 3)
    out = v.new_empty(batch, rows, heads, query_tile, v.shape[-1])
    listed = heads * kept * tile * (width * k.element_size() + v.shape[-1] * v.element_size())
    step = max(1, SCRATCH // max(1, listed))
    for entry in range(batch):
        own = None if order is None else order[entry % order.shape[0]]
        tables = [row_table(x[entry]) for x in (k, v)]
        for first in range(0, rows, step):
            part = slice(first, first + step)
            index, mask = _listed_keys(
                tiles[entry % tiles.shape[0], :, part], tile, own, bias, k.shape[1], mask_dtype(q)
            )
            keys, values = (picked_rows(*table, index, heads) for table in tables)
            out[entry, part] = F.scaled_dot_product_attention(padded[entry, part], keys, values, attn_mask=mask)
    return out.transpose(2, 3).flatten(1, 2)[:, :queries]


def _listed_keys(
    tiles: Tensor, tile: int, order: Tensor | None, bias: Tensor | None, keys: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Tokens ``[rows, heads or 1, kept * tile]`` of the tiles ``[heads or 1, rows, kept]``, and what is added to their
    logits, ``[rows, heads or 1, 1, kept * tile]``: the bias, and minus infinity at the places past the last key."""
    place = (tiles.transpose(0, 1)[..., None] * tile + torch.arange(tile, device=tiles.device)).flatten(2)
    index = place.clamp(max=keys - 1) if keys % tile else place
    if order is not None:
        heads = max(order.shape[0], index.shape[1])
        wide = index.expand(-1, heads, -1)
        index = order.expand(heads, -1)[None].expand(len(wide), -1, -1).gather(2, wide)
    mask = None
    if bias is not None:
        heads = max(bias.shape[0], index.shape[1])
        wide = index.expand(-1, heads, -1)
        mask = bias.to(dtype).expand(heads, -1)[None].expand(len(wide), -1, -1).gather(2, wide)
    if keys % tile:
        mask = torch.zeros((), dtype=dtype, device=tiles.device) if mask is None else mask
        mask = mask.masked_fill(place >= keys, float("-inf"))
    return index, None if mask is None else mask[:, :, None]


def row_table(x: Tensor) -> tuple[Tensor, int, int]:
    """``x`` ``[keys, heads, channels]`` as rows of channels, and how many rows apart tokens and heads are: a view of
    either memory layout, a copy only of others."""
    keys, heads, _ = x.shape
    if x.stride(0) != heads * x.stride(1) and x.stride(1) == keys * x.stride(0):
        return x.transpose(0, 1).flatten(0, 1), 1, keys
    return x.flatten(0, 1), heads, 1


def picked_rows(table: Tensor, token_step: int, head_step: int, index: Tensor, heads: int) -> Tensor:
    """Rows ``[rows, heads, n, channels]`` of the tokens ``index`` ``[rows, heads or 1, n]``."""
    head = torch.arange(heads, device=index.device)[None, :, None] * head_step
    wanted = index * token_step + head
    return table.index_select(0, wanted.flatten()).unflatten(0, wanted.shape)


def flex_tiles(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, sizes: tuple[int, int], bias: Tensor | None, order: Tensor | None
) -> Tensor:
    """``attend_tiles`` by FlexAttention, always compiled; arguments as for ``gathered_tiles``."""
    from torch.nn.attention.flex_attention import BlockMask

    batch, queries, heads, _ = q.shape
    keys, kept = k.shape[1], tiles.shape[-1]
    if order is not None:
        order = order.expand(batch, heads, -1)
        k, v = (x.gather(1, order.transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
        bias = None if bias is None else bias.expand(heads, -1)[None].expand(batch, -1, -1).gather(2, order)
    listed = F.pad(tiles, (0, -(-keys // sizes[1]) - kept)).int()
    count = torch.full(tiles.shape[:-1], kept, dtype=torch.int32, device=tiles.device)
    mask = BlockMask.from_kv_blocks(
        count, listed, BLOCK_SIZE=sizes, seq_lengths=(queries, keys), compute_q_blocks=False
    )  # fmt: skip
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if q.is_cuda else None
    out = _compiled()(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=_adding(bias, batch, heads),
        block_mask=mask,
        kernel_options=options,
    )
    return out.transpose(1, 2)


def _adding(bias: Tensor | None, batch: int, heads: int):
    """The score function that adds a bias ``[heads or 1, keys]`` or ``[B, heads, keys]``."""
    if bias is None:
        return None
    bias = (bias if bias.ndim == 3 else bias[None]).expand(batch, heads, -1)
    return lambda score, entry, head, query, key: score + bias[entry, head, key]


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex_supports(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, sizes: tuple[int, int], bias: Tensor | None, order: Tensor | None
) -> Verdict:
    """``supports`` of what ``gathered_tiles`` takes."""
    return supports(q.device, q.dtype, q.shape[-1], math.gcd(*sizes))


def torch_tiles(*given) -> Tensor:
    """FlexAttention where it is taken, else the gather form; arguments as for ``gathered_tiles``."""
    return (flex_tiles if _flex_supports(*given)[0] else gathered_tiles)(*given)


def kernel_supports(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, sizes: tuple[int, int], bias: Tensor | None, order: Tensor | None
) -> Verdict:
    """Whether the Triton kernel is taken, and if not, why."""
    ok, reason = listed_tiles.pays(tiles, sizes[1], k.shape[1])
    if ok and order is None and _flex_supports(q, k, v, tiles, sizes, bias, order)[0]:
        ok, reason = False, "FlexAttention reads keys in place"
    return listed_tiles.supports(q, k, v, tiles, sizes, bias, order) if ok else (ok, reason)


listed_kernel = Kernel("block-sparse attention", torch_tiles, listed_tiles.triton_form, kernel_supports)


def supports(device: torch.device | str, dtype: torch.dtype, head_dim: int = 128, tile: int = 64) -> tuple[bool, str]:
    """Whether FlexAttention is taken for such tensors, and if not, why."""
    device = torch.device(device)
    if device.type == "cpu":
        return (
            False,
            "compiling it for a CPU takes 13 s or more, so there the gather form is used unless flex is asked for",
        )
    if device.type != "cuda":
        return False, f"there is no FlexAttention kernel for {device.type}"
    try:
        from torch.nn.attention.flex_attention import BlockMask
    except ImportError:
        return False, f"torch {torch.__version__} has no FlexAttention"
    if "compute_q_blocks" not in inspect.signature(BlockMask.from_kv_blocks).parameters:
        return False, f"torch {torch.__version__} cannot build a block mask without its transpose"
    ok, reason = triton_installed()
    if not ok:
        return False, reason
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return False, "it needs compute capability 8.0 or more"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"it has no kernel for {dtype}"
    if head_dim < 16 or tile % 64:
        return False, f"it needs heads of 16 channels or more and tiles of a multiple of 64, not {head_dim} and {tile}"
    return True, ""
