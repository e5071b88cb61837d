"""Attention of a causal block over full K/V: dense, block-sparse by backend and density, and the mass of its columns.

Tiles are drawn at random: which keys a query reads makes no difference to the time, how many does. ANN attention has
keys fill the tiles in an order of its own for every head, so there is a row with such an order and one without.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from accel.attention.block_sparse import attend_tiles, flex_tiles, gathered_tiles
from accel.attention.dense import attend
from accel.flops import attention_flops
from accel.kernels.listed_tiles import triton_form
from accel.kv.importance_redundancy import TILE, column_mass, mass_kernel

from .gpu_clock import Times, Work
from .gpu_extent import Bench

SETS = 3
BLOCK = 3  # latent frames of queries
DENSE, AUTO = "dense", "auto"


def attention(bench: Bench, told: dict[str, Any]) -> None:
    """Fills ``told`` with device seconds of every form, and as parts of the dense time that their FLOPs would take."""
    extent, shape = bench.extent, bench.extent.shape
    tokens = extent.causal_grid[0] * extent.causal_grid[1]
    queries, keys = BLOCK * tokens, extent.many * tokens
    sets = [
        tuple(bench.random(1, n, shape.heads, shape.dim // shape.heads) for n in (queries, keys, keys))
        for _ in range(SETS)
    ]
    told["figures"], told["attention"] = {}, []
    for density, ordered in product(extent.densities, (True, False)):
        bench.pace.demand(f"density {density}")
        told["attention"] += block_sparse(bench, sets, density, ordered)
        worst = [row["over_share"] for row in told["attention"] if row["form"] == AUTO and "over_share" in row]
        if worst:
            told["figures"]["block_sparse"] = max(worst)
    told["column_mass"] = mass(bench, sets)
    for row in told["column_mass"]:
        if row["form"] == AUTO and "over_dense" in row:
            told["figures"]["column_mass"] = row["over_dense"]
    told["window"] = window(bench)


def block_sparse(bench: Bench, sets: list[tuple[Tensor, ...]], density: float, ordered: bool) -> list[dict[str, Any]]:
    """A row a form; ``over_share``: its time over that of dense attention times the share of tiles it reads."""
    extent = bench.extent
    (_, queries, heads, _), keys = sets[0][0].shape, sets[0][1].shape[1]
    count, rows = -(-keys // extent.tile), -(-queries // extent.query_tile)
    kept = max(1, round(density * count))
    share, sizes = kept / count, (extent.query_tile, extent.tile)
    drawn = torch.rand(1, heads, rows, count, device=bench.device).argsort(-1)
    tiles = drawn[..., :kept].sort(-1).values.contiguous()
    order = torch.rand(1, heads, keys, device=bench.device).argsort(-1) if ordered else None

    def taken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_tiles(q, k, v, tiles, extent.tile, order=order, query_tile=extent.query_tile)

    forms: dict[str, Callable[..., Tensor]] = {AUTO: taken}
    named = {"gather": gathered_tiles} | ({"flex": flex_tiles, "triton": triton_form} if extent.compiled else {})
    for name, form in named.items():
        forms[name] = lambda q, k, v, form=form: form(q, k, v, tiles, sizes, None, order)
    found, failed = _tried(forms, sets[0])
    times = _timed(bench, {DENSE: attend, **found}, sets)
    about = {"ordered": "yes" if ordered else "no", "density": share, "rounds": times.rounds}
    told: list[dict[str, Any]] = [
        {"form": name, **about, "seconds": times.median(name), "over_share": times.ratio(name, DENSE) / share}
        for name in found
    ]
    told.append({"form": DENSE, **about, "density": 1.0, "seconds": times.median(DENSE)})
    for row in told:
        bench.say(f"attention: {row['form']}, density {row['density']:.3g}, {row['seconds'] * 1e3:.4g} ms")
    return told + [{"form": name, **about, "error": reason} for name, reason in failed.items()]


def mass(bench: Bench, sets: list[tuple[Tensor, ...]]) -> list[dict[str, Any]]:
    """A row a form of column mass; ``over_dense``: its time over a dense pass of the same queries, keys and values."""

    def taken(form: Callable[..., Tensor], *options: int) -> Callable[..., Tensor]:
        return lambda q, k, v: form(q.transpose(1, 2), k.transpose(1, 2), *options)

    forms = {AUTO: taken(column_mass), "torch": taken(mass_kernel.torch_form, TILE)}
    if bench.extent.compiled:
        forms["triton"] = taken(mass_kernel.triton_form, TILE)
    found, failed = _tried(forms, sets[0])
    times = _timed(bench, {DENSE: attend, **found}, sets)
    rows: list[dict[str, Any]] = [{"form": name, "error": reason} for name, reason in failed.items()]
    for name in found:
        rows.append({"form": name, "seconds": times.median(name), "over_dense": times.ratio(name, DENSE)})
        bench.say(f"attention: column mass, {name}, {rows[-1]['over_dense']:.4g} dense passes")
    return rows


def window(bench: Bench) -> dict[str, float]:
    """Dense attention of a whole diffusion-forcing window: seconds and FLOP/s."""
    extent, shape = bench.extent, bench.extent.shape
    tokens = extent.plan.segment * extent.grid[0] * extent.grid[1]
    sides = tuple(bench.random(1, tokens, shape.heads, shape.dim // shape.heads) for _ in range(3))
    seconds = _timed(bench, {DENSE: attend}, [sides]).median(DENSE)
    return {"tokens": tokens, "seconds": seconds, "rate": attention_flops(tokens, tokens, shape.dim) / seconds}


def _tried(
    forms: dict[str, Callable[..., Tensor]], given: tuple[Tensor, ...]
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """Forms that run, and of the others why they do not."""
    found, failed = {}, {}
    for name, form in forms.items():
        try:
            form(*given)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = form
    return found, failed


def _timed(bench: Bench, forms: dict[str, Callable[..., Tensor]], sets: list[tuple[Tensor, ...]]) -> Times:
    works: dict[str, Work] = {
        name: lambda number, form=form: form(*sets[number % len(sets)]) for name, form in forms.items()
    }
    return bench.timed(bench.clock.queued, works)
