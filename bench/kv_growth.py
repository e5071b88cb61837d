"""Memory and FLOPs of a block as a video grows: watched in real rollouts, and counted at full size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accel.engine import Acceleration
from accel.flops import WAN_1_3B, WAN_14B, WanShape
from accel.kv.bounded import LONGEST_POSITION
from accel.kv.budget import HEADS, IMPORTANCE, KEEPS, MERGE, SLACK, STORAGES, KVBudgetConfig, StoreShape, plan
from accel.kv.rotary import TimeRotary
from demo.generate import start_noise

from .kv_runs import BLOCK, BYTES, SINK, SPAN, STEPS, TOKENS, UNBOUNDED, Rollout, flops_of_block, tiny_shape
from .scenes import prompt

CONSTANT = (SINK, IMPORTANCE)
"""Strategies whose bytes and FLOPs never change once the store is full."""
GRIDS = {"Wan 1.3B, 832 x 480": (WAN_1_3B, (30, 52)), "Wan 14B, 832 x 480": (WAN_14B, (30, 52))}
FULL_BLOCK = 3  # latent frames that Self-Forcing denoises together
LATENTS, BUDGETS = (100, 500, 2500), (9, 13, 21)
MOST_GIGABYTES = 4.0  # Wan 1.3B, 832 x 480, budget of 13 latent frames


def budgets(frames: int) -> dict[str, KVBudgetConfig | None]:
    """What the rollouts are watched with: ``frames`` latent frames in the storage's own bytes."""
    window = KVBudgetConfig(frames=frames, span=SPAN)
    kept = {SINK: window} | {keep: replace(window, keep=keep) for keep in (IMPORTANCE, MERGE, HEADS)}
    return kept | {BYTES: replace(window, storage="8-bit"), UNBOUNDED: None}


def watched(name: str, config: KVBudgetConfig | None, latents: int, seed: int) -> dict[str, Any]:
    """Bytes and FLOPs after every block of a video of ``latents`` latent frames, checked by ``check``."""
    shape, rollout = tiny_shape(), Rollout(Acceleration(kv_budget=config), prompt(seed), latents)
    blocks = []
    for block in rollout.blocks(start_noise(seed, latents), seed):
        kept = block.end * shape.frame_bytes() if config is None else rollout.denoiser.kept_bytes
        blocks.append({"latents": block.end, "bytes": kept, "flops": rollout.block_flops(block.index)})
    told = {"strategy": name, "seed": seed, "blocks": blocks}
    if config is None:
        return told
    layout = plan(config, shape, 1, BLOCK, latents)
    told["planned_bytes"] = shape.bytes(layout, config)
    told["budget_bytes"] = int(config.frames * shape.frame_bytes(config.storage) * SLACK)
    told["budget_flops"] = flops_of_block(int(config.frames * SLACK * TOKENS))
    full = full_from(blocks, flops_of_block(layout.places))
    told["full_from"] = full and blocks[full]["latents"]
    check(told, name in CONSTANT)
    return told


def full_from(blocks: Sequence[dict[str, int]], flops: int) -> int | None:
    """Index of the first block whose queries read all places there are; None where no block does."""
    return next((index for index, block in enumerate(blocks) if block["flops"] == flops), None)


def check(told: dict[str, Any], constant: bool) -> None:
    """Raises AssertionError where a rollout took more than its budget, or more than one value while ``constant``."""
    name, blocks = told["strategy"], told["blocks"]
    if told["planned_bytes"] > told["budget_bytes"]:
        raise AssertionError(f"{name}: {told['planned_bytes']} bytes planned, {told['budget_bytes']} given.")
    for block in blocks:
        for key in ("bytes", "flops"):
            if block[key] > told[f"budget_{key}"]:
                raise AssertionError(f"{name}: {key} {block[key]} at latent {block['latents']} are over the budget.")
    if not constant:
        return
    if told["full_from"] is None:
        raise AssertionError(f"{name}: the store was never full in {blocks[-1]['latents']} latent frames.")
    later = [block for block in blocks if block["latents"] >= told["full_from"]]
    for key in ("bytes", "flops"):
        values = {block[key] for block in later}
        if len(values) > 1:
            raise AssertionError(f"{name}: {key} of a block take {len(values)} values after the store is full.")


def summed_up(told: dict[str, Any], marks: int = 5) -> dict[str, Any]:
    """A watched rollout with only some of its blocks, evenly spaced, the last among them."""
    blocks, count = told["blocks"], len(told["blocks"])
    chosen = sorted({round((mark + 1) * count / marks) - 1 for mark in range(marks)})
    extremes = {f"most_{key}": max(block[key] for block in blocks) for key in ("bytes", "flops")}
    return told | extremes | {"blocks": [blocks[index] for index in chosen if index >= 0]}


def store_shape(model: WanShape, grid: tuple[int, int]) -> StoreShape:
    """What one CFG branch of a full-size model stores, in bfloat16."""
    head = model.dim // model.heads
    return StoreShape(model.layers, model.heads, head, grid, 1, 2, TimeRotary.of_wan(head))


def counted() -> list[dict[str, Any]]:
    """Gigabytes and PFLOP of the last block of videos of ``LATENTS``, unbounded and with budgets, no guidance."""
    rows = []
    for name, (model, grid) in GRIDS.items():
        shape = store_shape(model, grid)
        for latents in LATENTS:
            row = {"model": name, "latents": latents, UNBOUNDED: _cost(model, shape, None, latents)}
            row |= {str(frames): _cost(model, shape, KVBudgetConfig(frames=frames), latents) for frames in BUDGETS}
            rows.append(row)
    thirteen = max(row["13"]["gigabytes"] for row in rows if row["model"] == next(iter(GRIDS)))
    if thirteen > MOST_GIGABYTES:
        raise AssertionError(f"13 latent frames take {thirteen:.3f} GB on {next(iter(GRIDS))}, over {MOST_GIGABYTES}.")
    return rows


def _cost(model: WanShape, shape: StoreShape, config: KVBudgetConfig | None, latents: int) -> dict[str, float]:
    stored, places = latents * shape.frame_bytes(), latents * shape.tokens
    if config is not None:
        layout = plan(config, shape, 1, FULL_BLOCK, latents)
        stored, places = shape.bytes(layout, config), min(layout.places, places)
    flops = (STEPS + 1) * model.forward_flops(FULL_BLOCK, shape.tokens, places)
    return {"gigabytes": stored / 1e9, "petaflop": flops / 1e15}


def overheads(frames: int = 13) -> list[dict[str, Any]]:
    """What is not keys and values, in percent of a budget of ``frames`` latent frames of Wan 1.3B, all branches
    together; with guidance the same bytes serve two branches."""
    shape, rows = store_shape(*GRIDS[next(iter(GRIDS))]), []
    total = frames * shape.frame_bytes() * SLACK / 1e9
    for keep in KEEPS:
        for storage in STORAGES if keep != HEADS else STORAGES[:1]:
            row = {"keep": keep, "storage": storage}
            for branches in (1, 2):
                config = KVBudgetConfig(gigabytes=total, keep=keep, storage=storage)
                row[f"branches_{branches}"] = _overhead(config, shape, branches)
            rows.append(row)
    return rows


def _overhead(config: KVBudgetConfig, shape: StoreShape, branches: int) -> dict[str, float]:
    layout = plan(config, shape, branches, FULL_BLOCK, LATENTS[-1])
    taken = branches * shape.bytes(layout, config)
    if taken > config.gigabytes * 1e9:
        raise AssertionError(f"{config}: {taken} bytes for {branches} branches are over the budget.")
    pure = branches * shape.layers * layout.places * shape.token_bytes(config.storage)
    percent = 100 * (taken - pure) / (config.gigabytes * 1e9)
    return {"latents": layout.places / shape.tokens, "overhead_percent": percent, "gigabytes": taken / 1e9}


def appended(shape: StoreShape | None = None, frames: int = 13, sink: int = 1, span: int = 21) -> dict[str, Any]:
    """Bytes that one block writes to a full window of ``frames`` latent frames: in a ring, and where everything behind
    the sink is cloned and copied back by the length of the block, once a block, as Self-Forcing does.

    Every forward of a block writes its keys and values. Of what is there already the ring writes the time channels of
    the sink's keys once a block, and those of its own keys whenever positions are about to pass ``LONGEST_POSITION``.

    Args:
        shape: of one branch; None for Wan 1.3B, 832 x 480. span: as in ``KVBudgetConfig``.
    """
    shape = shape or store_shape(*GRIDS[next(iter(GRIDS))])
    frame, forwards, ring = shape.frame_bytes(), STEPS + 1, frames - sink
    block, time = forwards * FULL_BLOCK * frame, frame * shape.rotary.channels / (2 * shape.head_dim)
    period = (LONGEST_POSITION - max(span, frames)) // FULL_BLOCK + 1
    turned = time * (sink + ring / period)
    rolled = 2 * (ring - FULL_BLOCK) * frame
    return {
        "frames": frames, "forwards": forwards, "ring_bytes": block + turned, "roll_bytes": block + rolled,
        "ring_moves": turned, "roll_moves": rolled, "ratio": (block + rolled) / (block + turned), "period": period,
    }  # fmt: skip
