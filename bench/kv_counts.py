"""What a block of a causal rollout keeps and costs at any length, counted: really on ``tiny-causal``, by shape at full
size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accel.flops import WAN_1_3B, WAN_14B, WanShape
from accel.kernels.time_turn import traffic, turn_pairs
from accel.kv.budget import KEEPS, STORAGES, KVBudgetConfig, StoreShape, plan
from accel.kv.memory import KVMemory, dense
from accel.kv.ring import Layout
from accel.kv.rotary import TimeRotary
from demo.codec import TinyCodec
from demo.data import render, simulate
from demo.generate import start_noise

from .kv_bytes import MovedBytes, clone_and_roll, fused
from .kv_rollout import BLOCK, FORWARDS, SINK, Extent, Rollout, Strategy, bounded, demand
from .runs import codec

MODELS = {"Wan 1.3B": WAN_1_3B, "Wan 14B": WAN_14B}
GRID = (30, 52)  # tokens of a latent frame at 480 x 832
FULL_BLOCK, FULL_LENGTHS, FULL_BUDGETS = 3, (100, 500, 2500), (13, 16, 21)
MOST_GIGABYTES = 4.0  # of 13 latent frames, Wan 1.3B
CHUNK = 100  # latent frames of a simulated scene, one after another


def growth(extent: Extent, say: Callable[[str], None]) -> dict[str, Any]:
    """Bytes and FLOPs of every block of a rollout by store, and of full-size models."""
    tiny = []
    for strategy in bounded(extent.budget):
        tiny.append(tiny_growth(strategy, extent))
        say(f"growth: {strategy.name}, full at latent {tiny[-1]['full_from']}, {tiny[-1]['kv_bytes']:,} bytes")
    return {"budget": extent.budget, "tiny": tiny, "full_size": full_size()}


@torch.inference_mode()
def tiny_growth(strategy: Strategy, extent: Extent) -> dict[str, Any]:
    """A rollout of ``extent.real`` latent frames, then clean ones of simulated scenes up to ``extent.growth``.

    Raises:
        AssertionError: a block that keeps or costs more than the budget says, or, where the store is of fixed size,
            anything else than the blocks before.
    """
    rollout, blocks = Rollout(strategy, 1, extent.growth), []
    noise, clean = start_noise(1, extent.real), simulated_blocks(2)
    for first in range(0, extent.growth, BLOCK):
        before = rollout.flops
        if first < extent.real:
            latents = rollout.denoise(noise[:, :, first : first + BLOCK])
        rollout.commit(latents if first < extent.real else next(clean))
        spent = rollout.flops - before
        if first >= extent.real:
            spent *= FORWARDS  # a commit reads as many keys as the solver steps before it
        memory = rollout.store
        blocks.append({"latent": first, "flops": spent, "kv_bytes": memory.nbytes, "keys": memory.keys})
    return check_growth(strategy, blocks, memory, extent, rollout.denoiser.shape)


def check_growth(
    strategy: Strategy, blocks: list[dict[str, Any]], memory: KVMemory, extent: Extent, shape: WanShape
) -> dict[str, Any]:
    """What ``blocks`` show, as one row.

    Raises:
        AssertionError: as ``tiny_growth``.
    """
    figures = [(one["flops"], one["kv_bytes"]) for one in blocks]
    most = FORWARDS * shape.forward_flops(BLOCK, memory.layout.tokens, memory.layout.places)
    full = next(index for index, one in enumerate(figures) if not strategy.fixed or set(figures[index:]) == {one})
    if not strategy.fixed:
        full = next(index for index, one in enumerate(blocks) if one["latent"] >= extent.budget)
    name, last = strategy.name, blocks[full]["latent"]
    for one in blocks:
        kept = f"{name}: {one['kv_bytes']:,} bytes kept at latent {one['latent']}, {memory.planned_bytes:,} planned"
        demand(one["kv_bytes"] <= memory.planned_bytes, kept)
        costs = f"{name}: {one['flops']:,} FLOPs at latent {one['latent']}, at most {most:,} by its places"
        demand(one["flops"] <= most, costs)
    demand(last <= 2 * extent.budget, f"{name}: blocks are not equal before latent {last}")
    return {
        "store": name,
        "planned_bytes": memory.planned_bytes,
        "kv_bytes": max(one["kv_bytes"] for one in blocks[full:]),
        "full_from": last,
        "exactly_equal": len(set(figures[full:])) == 1,
        "keys": [min(one["keys"] for one in blocks[full:]), max(one["keys"] for one in blocks[full:])],
        "flops": [min(one["flops"] for one in blocks[full:]), max(one["flops"] for one in blocks[full:])],
        "until": blocks[-1]["latent"] + BLOCK,
        "denoised_until": extent.real,
        "unbounded_flops": {
            one["latent"]: FORWARDS
            * shape.forward_flops(BLOCK, memory.layout.tokens, (one["latent"] + BLOCK) * memory.layout.tokens)
            for one in (blocks[full], blocks[len(blocks) // 2], blocks[-1])
        },
    }


def simulated_blocks(seed: int) -> Iterator[Tensor]:
    """Clean latents ``[1, 16, 4, 8, 8]`` of simulated scenes, one scene after another without end."""
    encoder: TinyCodec = codec()
    while True:
        latents = encoder.encode(render(simulate(seed, 1, CHUNK)))
        yield from latents.split(BLOCK, 2)
        seed += 1


def full_shape(shape: WanShape) -> StoreShape:
    """What one branch of a Wan model stores at 480 x 832 in bfloat16."""
    head_dim = shape.dim // shape.heads
    return StoreShape(shape.layers, shape.heads, head_dim, GRID, 1, 2, TimeRotary.of_wan(head_dim))


def full_size() -> list[dict[str, Any]]:
    """Bytes and FLOPs of a block of Wan at 480p: unbounded at several lengths, and by budget and store.

    Raises:
        AssertionError: 13 latent frames of Wan 1.3B do not fit ``MOST_GIGABYTES``.
    """
    rows = []
    for model, shape in MODELS.items():
        stored = full_shape(shape)
        for latents in FULL_LENGTHS:
            size = latents * stored.frame_bytes()
            rows.append(_full_row(model, shape, "unbounded", latents, latents * stored.tokens, size))
        for frames in FULL_BUDGETS:
            for name, config in _full_configs(frames):
                layout = plan(config, stored, 1, FULL_BLOCK, FULL_LENGTHS[-1])
                rows.append(_full_row(model, shape, name, frames, layout.places, stored.bytes(layout, config)))
    small = [one for one in rows if one["model"] == "Wan 1.3B" and one["store"] != "unbounded" and one["latents"] == 13]
    for one in small:
        demand(one["kv_bytes"] <= MOST_GIGABYTES * 1e9, f"{one['store']} takes {one['kv_bytes']:,} bytes at 13 latents")
    return rows


def _full_configs(frames: int) -> list[tuple[str, KVBudgetConfig]]:
    window = KVBudgetConfig(frames=frames, sink=SINK)
    found = [(keep, replace(window, keep=keep)) for keep in KEEPS]
    return [*found, ("window, 8-bit", replace(window, storage=STORAGES[1]))]


def _full_row(model: str, shape: WanShape, store: str, latents: int, keys: int, size: int) -> dict[str, Any]:
    flops = FORWARDS * shape.forward_flops(FULL_BLOCK, GRID[0] * GRID[1], keys)
    return {"model": model, "store": store, "latents": latents, "keys": keys, "kv_bytes": size, "flops": flops}


def append() -> dict[str, Any]:
    """Bytes moved by appending one block at full size, and what stores take beside keys and values."""
    return {"moved": [moved(blocks) for blocks in (1, 3)], "beside": beside()}


def moved(block: int, frames: int = 21) -> dict[str, Any]:
    """Bytes read and written to append a block of ``block`` latent frames to ``frames`` of Wan 1.3B, all layers.

    The store is driven on tensors without data, for as long as the video needs to turn its positions twice: once with
    the operations of plain torch counted as they run, once with what the kernel that turns keys reads and writes in
    their place.

    Raises:
        AssertionError: a full store that moves other bytes from block to block, but where its positions turn.
    """
    shape = replace(full_shape(WAN_1_3B), layers=1)
    memory, usual, most = _appended(shape, block, frames, False)
    _, usual_fused, most_fused = _appended(shape, block, frames, True)
    written = 2 * block * shape.frame_bytes()
    new = _block(shape, block)
    sides = [new.new_empty(1, frames * shape.tokens, *new.shape[2:]) for _ in range(2)]
    with MovedBytes() as rolled:
        clone_and_roll(*sides, new)
    return {
        "block": block,
        "frames": frames,
        "layout": str(memory.layout),
        "block_bytes": WAN_1_3B.layers * written // 2,
        "ring": WAN_1_3B.layers * written,
        "ring_with_sink_turned": WAN_1_3B.layers * usual,
        "ring_with_sink_turned_fused": WAN_1_3B.layers * usual_fused,
        "ring_when_positions_turn": WAN_1_3B.layers * most,
        "ring_when_positions_turn_fused": WAN_1_3B.layers * most_fused,
        "clone_and_roll": WAN_1_3B.layers * rolled.total,
        "clone_and_roll_formula": 4 * (frames - block) * full_shape(WAN_1_3B).frame_bytes() + WAN_1_3B.layers * written,
    }


def _block(shape: StoreShape, frames: int) -> Tensor:
    size = (1, frames * shape.tokens, shape.heads, shape.head_dim)
    return torch.empty(size, dtype=torch.bfloat16, device="meta")


def _appended(shape: StoreShape, block: int, frames: int, kernel: bool) -> tuple[KVMemory, int, int]:
    """A store after 600 latent frames, and the bytes that a block moves in it when it is full: usually, and at most;
    with ``kernel`` as the kernel that turns keys moves them."""
    config, counts = KVBudgetConfig(frames=frames, sink=SINK), []
    memory = KVMemory(config, shape, 1, block, 600, lambda: lambda layer, q, *rest: q)
    new = _block(shape, block)
    for first in range(0, 600 // block * block, block):
        with MovedBytes() as counted, fused(turn_pairs, traffic, counted) if kernel else nullcontext():
            memory.begin(first, block)
            memory.attend(0, new, new, new)
        memory.commit()
        counts.append(counted.total)
    full = counts[2 * frames :]
    usual = sorted(full)[len(full) // 2]
    others = [count for count in full if count != usual]
    demand(len(others) <= 600 // 100, f"append: {len(others)} blocks move other bytes than {usual:,}")
    return memory, usual, max(full)


def beside() -> list[dict[str, Any]]:
    """Share of a budget that is not keys and values: bookkeeping, and what is needed for a moment. Wan 1.3B."""
    shape, rows = full_shape(WAN_1_3B), []
    for frames in (9, 13, 21):
        for branches in (1, 2):
            for name, config in _full_configs(frames):
                layout = plan(config, shape, branches, FULL_BLOCK, FULL_LENGTHS[-1])
                rows.append(_beside_row(name, config, shape, layout, frames, branches))
    return rows


def _beside_row(
    name: str, config: KVBudgetConfig, shape: StoreShape, layout: Layout, frames: int, branches: int
) -> dict[str, Any]:
    memory = KVMemory(config, shape, branches, FULL_BLOCK, FULL_LENGTHS[-1], lambda: dense)
    stored = branches * shape.layers * layout.places * shape.token_bytes(config.storage)
    budget = branches * frames * shape.frame_bytes(config.storage)
    return {
        "store": name,
        "frames": frames,
        "branches": branches,
        "planned_bytes": memory.planned_bytes,
        "latents_kept": layout.places / layout.tokens,
        "beside_bytes": memory.planned_bytes - stored,
        "beside_percent": 100 * (memory.planned_bytes - stored) / budget,
        "planned_percent": 100 * memory.planned_bytes / budget,
    }
