"""Causal few-step rollouts, block by block: bounded K/V on our ring store, and in the manner of Self-Forcing.

``Rolling`` is that manner, written from its description for comparison only: a buffer of the window's length, what
stays is cloned and moved to the front when a block does not fit, and every layer reads its counters from the device.
Rollouts advance in turn, one block each, so that their times can be compared; they are timed once all K/V are full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel.acceleration import Acceleration
from accel.engine import Run
from accel.flops import WanShape, attention_flops
from accel.kv.budget import KVBudgetConfig, StoreShape
from accel.kv.memory import KVMemory, make_memory
from accel.kv.rotary import TimeRotary
from accel.sampling import causal_blocks
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.model import TinyWan

from .gpu_clock import in_turn, syncs
from .gpu_extent import Bench
from .gpu_model import WanDenoiser, latents, random_model

SHIFT, SEED = 5.0, 0
ATTENTION_SHARE = 600 / 790
"""Best published rate of fused attention over that of large matrix products, H100 and H200, heads of 128 channels."""


class Rolling:
    """K/V of the latest ``frames`` latent frames of ``tokens`` tokens, all layers, as the model's ``store``."""

    def __init__(self, layers: int, frames: int, tokens: int) -> None:
        self._capacity, self._tokens = frames * tokens, tokens
        self._layers: list[tuple[Tensor, Tensor, Tensor, Tensor] | None] = [None] * layers
        self._first = 0
        self._block = (0, 0)

    def begin(self, first: int, frames: int) -> int:
        """A forward of the block ``[first, first + frames)`` follows; returns the position of its first frame."""
        self._block = (first, frames)
        return first

    @property
    def keys(self) -> float:
        """Tokens that a query of the block reads."""
        return float(min(sum(self._block) * self._tokens, self._capacity))

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for layer in self._layers if layer is not None for one in layer)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the block's ``[B, n, heads, head_dim]`` behind what there is; returns all that is to be read."""
        if self._layers[layer] is None:
            sides = (key.new_zeros(key.shape[0], self._capacity, *key.shape[2:]) for _ in range(2))
            self._layers[layer] = (*sides, *self._counters(key.device))
        keys, values, seen, filled = self._layers[layer]
        count, end = key.shape[1], self._block[0] * self._tokens + key.shape[1]
        last = filled.item() + end - seen.item()
        if end > seen.item() and filled.item() + count > self._capacity:
            kept = self._capacity - count
            for side in (keys, values):
                side[:, :kept] = side[:, filled.item() - kept : filled.item()].clone()
            last = self._capacity
        keys[:, last - count : last] = key
        values[:, last - count : last] = value
        seen.fill_(end)
        filled.fill_(last)
        return keys[:, :last], values[:, :last]

    def commit(self) -> None:
        """What was written last stays; the counters know already."""

    @staticmethod
    def _counters(device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens of the video that a layer has seen, and those its buffer holds."""
        return torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)


class Rollout:
    """A rollout that makes one block a call, in ``causal_steps`` steps with fresh noise and the pass that commits."""

    def __init__(self, model: TinyWan, bench: Bench, store: KVMemory | Rolling, block: int, blocks: int) -> None:
        extent, grid = bench.extent, bench.extent.causal_grid
        self.store, self._forwards, self._timeline = store, extent.causal_steps + 1, Timeline()
        denoiser = WanDenoiser(model, extent.shape, grid[0] * grid[1], bench, store)
        noise = latents(bench, block, grid).repeat(1, 1, blocks, 1, 1)
        run = Run(Acceleration(), denoiser, self._timeline)
        self._segments = causal_blocks(run, noise, block, flow_sigmas(extent.causal_steps, SHIFT), SEED)

    def step(self, number: int = 0) -> None:
        """The next block."""
        next(self._segments)

    @property
    def flops(self) -> int:
        """Of the last block."""
        return sum(record.flops for record in self._timeline.records[-self._forwards :])


def causal(bench: Bench, told: dict[str, Any]) -> None:
    """Fills ``told`` with times of a block by store and block size, and the roofline floor."""
    extent = bench.extent
    told["ceilings"] = ceilings(bench)
    model = random_model(extent.shape, bench)
    rows: list[dict[str, Any]] = []
    told["rollouts"], told["figures"] = rows, {}
    for block in (1, 3):
        ours, few, theirs = f"ring, {extent.many}", f"ring, {extent.few}", f"clone and roll, {extent.many}"
        stores = {
            few: ring(bench, extent.few, block),
            ours: ring(bench, extent.many, block),
            theirs: Rolling(extent.shape.layers, extent.many, extent.causal_grid[0] * extent.causal_grid[1]),
        }
        found = rolled(bench, model, stores, block)
        rows += found.values()
        floor = roofline(extent.shape, bench, found[few]["keys"], block, told["ceilings"])
        found[few]["floor_seconds"] = floor
        figures = told["figures"]
        if block == 1:
            figures["realised_causal"] = realised(found[ours], found[few])
        else:
            figures["floor_share"] = found[few]["seconds"] / floor
            figures["over_rolling"] = found[theirs]["seconds"] / found[few]["seconds"]


def realised(slow: dict[str, Any], fast: dict[str, Any]) -> float:
    """Ratio of times over ratio of FLOPs of two rows."""
    return slow["seconds"] / fast["seconds"] / (slow["flops"] / fast["flops"])


def ring(bench: Bench, frames: int, block: int) -> KVMemory:
    """Our store with a budget of so many latent frames, the block being denoised among them."""
    shape, extent = bench.extent.shape, bench.extent
    head_dim = shape.dim // shape.heads
    stored = StoreShape(
        shape.layers, shape.heads, head_dim, extent.causal_grid, 1, bench.dtype.itemsize, TimeRotary.of_wan(head_dim)
    )
    config = KVBudgetConfig(frames=frames, sink=extent.sink, span=max(extent.many, frames))
    return make_memory(config, stored, 1, block, _blocks(bench, block) * block)


def _blocks(bench: Bench, block: int) -> int:
    """Blocks of a rollout: until the longer K/V are full, some more, those that are timed and one whose waits count."""
    extent = bench.extent
    return _filling(bench, block) + extent.warmup + extent.rounds + 1


def _filling(bench: Bench, block: int) -> int:
    return -(-bench.extent.many // block) + bench.extent.settle


def rolled(
    bench: Bench, model: TinyWan, stores: dict[str, KVMemory | Rolling], block: int
) -> dict[str, dict[str, Any]]:
    """A row a store: seconds, FLOPs, bytes and waits of a block with full K/V."""
    extent = bench.extent
    rollouts = {name: Rollout(model, bench, store, block, _blocks(bench, block)) for name, store in stores.items()}
    for _ in range(_filling(bench, block)):
        for name, rollout in rollouts.items():
            bench.pace.demand(f"{name}, block of {block}")
            rollout.step()
    works: dict[str, Callable[[int], None]] = {name: rollout.step for name, rollout in rollouts.items()}
    times = in_turn(bench.clock.wall, works, extent.rounds, extent.warmup, bench.pace)
    rows = {}
    for name, rollout in rollouts.items():
        rows[name] = {
            "block": block, "store": name, "seconds": times.median(name), "rounds": times.rounds,
            "flops": rollout.flops, "keys": rollout.store.keys, "kv_bytes": rollout.store.nbytes,
            "syncs": syncs(bench.device, rollout.step),
        }  # fmt: skip
        bench.say(f"causal: block {block}, {name}, {rows[name]['seconds']:.4g} s")
    return rows


def ceilings(bench: Bench) -> dict[str, float]:
    """Rates of a large matrix product, FLOP/s, and of a large copy, bytes read and written a second."""
    side = bench.extent.product
    a, b, out = (bench.random(side, side) for _ in range(3))
    source, target = (torch.empty(bench.extent.kernel_bytes, dtype=torch.uint8, device=bench.device) for _ in range(2))
    times = bench.timed(
        bench.clock.device,
        {"product": lambda number: torch.mm(a, b, out=out), "copy": lambda number: target.copy_(source)},
    )
    return {
        "product": 2 * side**3 / times.median("product"),
        "copy": 2 * source.nbytes / times.median("copy"),
    }


def roofline(shape: WanShape, bench: Bench, keys: float, block: int, rates: dict[str, float]) -> float:
    """Least seconds of a block's forwards: matrix products at the measured rate, attention at ``ATTENTION_SHARE`` of
    it, or the weights and stored K/V read once a forward at the copy rate, whichever is longer."""
    extent = bench.extent
    tokens = block * extent.causal_grid[0] * extent.causal_grid[1]
    total = shape.forward_flops(block, tokens // block, round(keys))
    attention = shape.layers * (
        attention_flops(tokens, round(keys), shape.dim) + attention_flops(tokens, shape.text_tokens, shape.dim)
    )
    weights = shape.layers * (8 * shape.dim**2 + 2 * shape.dim * shape.ffn_dim)
    moved = bench.dtype.itemsize * (weights + 2 * shape.layers * keys * shape.dim)
    arithmetic = ((total - attention) + attention / ATTENTION_SHARE) / rates["product"]
    return (extent.causal_steps + 1) * max(arithmetic, moved / rates["copy"])
