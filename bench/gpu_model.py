"""Wan at any size with random weights, as a ``Denoiser`` that leaves all its data on one device.

The layers are those of ``demo.model``, which has Wan's names, shapes and formulas. Noise levels and positions are sent
to the device once and found again, so a forward makes the host wait for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accel.call import Call, Kind
from accel.flops import WanShape
from accel.kv.frozen import FrozenKV
from accel.kv.memory import KVMemory
from demo.model import PATCH, TinyConfig, TinyWan

from .gpu_extent import Bench


def random_model(shape: WanShape, bench: Bench, layers: int | None = None) -> TinyWan:
    """A model of a Wan shape, its matrices scaled so that activations stay of size 1; ``layers`` of it, or all."""
    config = TinyConfig(
        shape.dim, shape.ffn_dim, layers or shape.layers, shape.heads, shape.in_channels, shape.text_dim,
        shape.freq_dim, kind="random",
    )  # fmt: skip
    with bench.device:
        model = TinyWan(config)
    torch.manual_seed(0)
    weights = {name: _random(name, made.shape, bench) for name, made in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _random(name: str, size: Sequence[int], bench: Bench) -> Tensor:
    if len(size) == 1:
        return torch.full(size, float("norm" in name and name.endswith("weight")), device=bench.device).to(bench.dtype)
    return bench.random(*size) / size[1:].numel() ** 0.5


class WanDenoiser:
    """One CFG branch of a model. ``store``: what keeps the K/V of a causal rollout, None for windows that see
    themselves; ``tokens``: of a latent frame."""

    branches = 1
    shares_time = False

    def __init__(self, model: TinyWan | None, shape: WanShape, tokens: int, bench: Bench, store=None) -> None:
        self.model, self.shape, self.store, self._bench = model, shape, store, bench
        self.recomputes_history = store is None
        self._tokens = tokens
        self._context = bench.random(1, shape.text_tokens, shape.text_dim)
        self._sent: dict[tuple, Tensor] = {}
        self._kept: FrozenKV | None = None

    def velocity(self, call: Call, x: Tensor) -> Tensor:
        first, last = call.queries or call.frames
        asked, store, start = slice(first - call.frames[0], last - call.frames[0]), self.store, first
        if call.queries is not None:
            store = self._kept.view(call.queries, call.frames)
        elif store is not None:
            start = store.begin(call.offset, last - first)
        levels = self._device(call.sigmas[asked])[None].expand(x.shape[0], -1)
        positions = self._device(tuple(range(start, start + last - first)))
        out = self.model(x[:, :, asked].to(self._bench.dtype), levels, self._context, positions, None, store)
        if self.store is not None and call.kind is not Kind.DENOISE:
            self.store.commit()
        return out

    def feature(self, kind: str, call: Call, x: Tensor) -> Tensor:
        if kind == "latent":
            return x.transpose(1, 2)
        levels = self._device(call.sigmas)[None].expand(x.shape[0], -1)
        _, e0 = self.model.embed_time(levels)
        if kind == "timestep":
            return e0
        tokens, rotations = self.model.embed(x.to(self._bench.dtype), self._device(tuple(range(*call.frames))))
        block = self.model.blocks[0]
        if kind == "modulated":
            return block.modulated(tokens, e0).unflatten(1, (x.shape[2], -1))
        context = self.model.text_embedding(self._context)
        return block(tokens, e0, rotations, context).unflatten(1, (x.shape[2], -1))

    def flops(self, call: Call, frames: int) -> int:
        keys = None
        if call.queries is not None:
            keys = (call.frames[1] - call.frames[0]) * self._tokens
        elif self.store is not None:
            keys = round(self.store.keys)
        unread = self.store.unread_flops if isinstance(self.store, KVMemory) else 0
        return self.shape.forward_flops(frames, self._tokens, keys) - unread

    def full_flops(self, call: Call, frames: int) -> int:
        keys = None if self.store is None else (call.offset + frames) * self._tokens
        return self.shape.forward_flops(frames, self._tokens, keys)

    def feature_flops(self, kind: str, call: Call, frames: int) -> int:
        return 0

    def keep(self, frames: int) -> str | None:
        if self._kept is None:
            self._kept = FrozenKV(self.model.config.num_layers, frames, self._tokens)
        return None

    @property
    def kept_bytes(self) -> int:
        return 0 if self._kept is None else self._kept.nbytes

    def _device(self, values: tuple) -> Tensor:
        """Host numbers on the device, sent once."""
        if values not in self._sent:
            self._sent[values] = torch.tensor(values, device=self._bench.device)
        return self._sent[values]


class InstantDenoiser(WanDenoiser):
    """Answers at once with velocities made before, each time another, so that what is timed is everything but the
    model."""

    def __init__(self, shape: WanShape, tokens: int, bench: Bench, answers: Sequence[Tensor]) -> None:
        super().__init__(None, shape, tokens, bench)
        self._answers, self._given = answers, 0

    def velocity(self, call: Call, x: Tensor) -> Tensor:
        self._given += 1
        answer = self._answers[self._given % len(self._answers)]
        first, last = call.queries or call.frames
        return answer[:, :, : last - first]

    def keep(self, frames: int) -> str | None:
        return None


def latents(bench: Bench, frames: int, grid: tuple[int, int]) -> Tensor:
    """Start noise ``[1, 16, frames, H, W]`` in float32, as samplers hold it."""
    return bench.random(
        1, bench.extent.shape.in_channels, frames, grid[0] * PATCH, grid[1] * PATCH, dtype=torch.float32
    )
