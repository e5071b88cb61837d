"""What the K/V measurements share: how much is measured, which stores are compared, and a rollout block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.attention.ann import AnnConfig
from accel.call import Call, Family, Kind
from accel.kv.budget import IMPORTANCE, KEEPS, MERGE, KVBudgetConfig, StoreShape
from accel.kv.memory import KVMemory, make_memory
from accel.kv.ring import Layout
from accel.kv.rotary import TimeRotary
from accel.kv.store import KVStore
from accel.schedule import flow_sigmas
from demo.denoiser import TinyDenoiser
from demo.generate import start_noise
from demo.prompt import embed_scenes

from .scenes import CAUSAL, loaded, shapes

STEPS, SHIFT, BLOCK = 4, 5.0, 4
FORWARDS = STEPS + 1  # of a block: its solver steps, and the pass that commits its clean K/V
SINK = 1
UNBOUNDED, WINDOW, NO_SINK = "unbounded", "sliding window + sink", "sliding window"
BYTES_AS_MANY, BYTES_EQUAL, ANN = (
    "8-bit window, as many latents",
    "8-bit window, equal bytes",
    "unbounded, ANN attention",
)


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured; lengths in latent frames.

    Attributes:
        budget: of every bounded store, those being denoised included. frames: of a quality clip. clips: how many.
        real: of a growth rollout that is denoised, before clean latents are committed up to ``growth``.
        endless: of the long rollout. histories: lengths at which blocks are timed. pairs: timed rounds at each.
    """

    budget: int
    frames: int
    clips: int
    real: int
    growth: int
    endless: int
    histories: tuple[int, ...]
    pairs: int


WHOLE = Extent(16, 64, 8, 320, 2500, 10_000, (100, 500, 2500), 12)
QUICK = Extent(8, 16, 1, 16, 40, 48, (16, 24), 2)


@dataclass(frozen=True, slots=True)
class Strategy:
    """A store: ``config`` None keeps everything, ``ann`` None attends densely. ``fixed``: whether what it keeps has the
    same size from the moment it is full."""

    name: str
    config: KVBudgetConfig | None = None
    ann: AnnConfig | None = None
    fixed: bool = True


def bounded(budget: int) -> list[Strategy]:
    """Stores of a budget of ``budget`` latent frames, the plain window first."""
    window = KVBudgetConfig(frames=budget, sink=SINK)
    found = [Strategy(WINDOW, window)]
    found += [Strategy(keep, replace(window, keep=keep), fixed=keep != MERGE) for keep in KEEPS[1:]]
    return [*found, _sized(BYTES_AS_MANY, replace(window, storage="8-bit"), budget - SINK, 0)]


def compared(budget: int, frames: int) -> list[Strategy]:
    """All stores of the quality measurement for videos of ``frames`` latent frames; the unbounded one comes first.

    What a store needs for a moment is one layer in six here and one in thirty or forty at full size, so at equal bytes
    a middle has less room than it would have there; ``as many tokens`` gives it the window's.
    """
    shape, window = tiny_shape(), KVBudgetConfig(frames=budget, sink=SINK)
    planned = make_memory(window, shape, 1, BLOCK, frames).planned_bytes
    equal = KVBudgetConfig(gigabytes=planned / 1e9, sink=SINK, storage="8-bit")
    found = [Strategy(UNBOUNDED), Strategy(NO_SINK, replace(window, sink=0)), *bounded(budget)]
    recent = max(1, (budget - SINK - BLOCK) // 2)
    middle = (budget - SINK - recent - BLOCK) * shape.tokens
    for keep in (IMPORTANCE, MERGE):
        config = replace(window, keep=keep, recent=recent)
        found.append(_sized(f"{keep}, as many tokens", config, recent + BLOCK, middle, keep != MERGE))
    sparse = Strategy(ANN, ann=AnnConfig(density=0.33, tile=shape.tokens))
    return [*found, Strategy(BYTES_EQUAL, equal), sparse]


def _sized(name: str, config: KVBudgetConfig, ring: int, middle: int, fixed: bool = True) -> Strategy:
    """A store with exactly this room, whatever it takes for a moment."""
    shape = tiny_shape()
    size = shape.bytes(Layout(shape.tokens, SINK, ring, middle, config.span), config)
    return Strategy(name, replace(config, frames=0, gigabytes=(size + 1) / 1e9), fixed=fixed)


def tiny_shape() -> StoreShape:
    """What one branch of ``tiny-causal`` stores."""
    config = loaded(CAUSAL).config
    head_dim = config.dim // config.num_heads
    return StoreShape(config.num_layers, config.num_heads, head_dim, (4, 4), 1, 4, TimeRotary.of_wan(head_dim))


class Rollout:
    """``tiny-causal`` in four steps with fresh noise after each, one block at a time, with the store of a strategy.

    Args:
        strategy: the store. seed: of prompt and noise. frames: of the whole video. context: another prompt.

    Attributes:
        store: the keys and values. flops: spent so far. end: latent frames committed.
    """

    def __init__(self, strategy: Strategy, seed: int, frames: int, context: Tensor | None = None) -> None:
        self.seed, self.levels, self.flops, self.end, self.index = seed, flow_sigmas(STEPS, SHIFT).tolist(), 0, 0, 0
        context = embed_scenes(shapes(seed)) if context is None else context
        self.denoiser = TinyDenoiser(
            loaded(CAUSAL), context, 1.0, rollout=frames, budget=strategy.config, ann=strategy.ann, calls=FORWARDS
        ).sized(start_noise(0, 1))
        self.store: KVMemory | KVStore = self.denoiser.inputs(self._call(1, 1), start_noise(0, 1))[-1]

    def prefill(self, latents: Tensor) -> None:
        """Commits clean latents ``[1, 16, T, 8, 8]`` in one forward, as those that a video continues."""
        self._forward(self._call(0, latents.shape[2], Kind.PREFILL), latents)
        self.end += latents.shape[2]

    def denoise(self, noise: Tensor) -> Tensor:
        """Clean latents of the next block from its noise ``[1, 16, T, 8, 8]``; they are not committed."""
        x = noise
        for step in range(1, STEPS + 1):
            velocity = self._forward(self._call(step, x.shape[2]), x)
            x = x - self.levels[step - 1] * velocity
            if self.levels[step] > 0.0:
                generator = torch.Generator().manual_seed(self.seed + self.index * 1000 + step - 1)
                fresh = torch.randn(x.shape, generator=generator)
                x = (1.0 - self.levels[step]) * x + self.levels[step] * fresh
        return x

    def commit(self, latents: Tensor) -> None:
        """Makes clean latents of the block history."""
        self._forward(self._call(FORWARDS, latents.shape[2], Kind.COMMIT), latents)
        self.end, self.index = self.end + latents.shape[2], self.index + 1

    def look(self, latents: Tensor) -> None:
        """The forward of a commit, but the block stays open: for timing at one history length."""
        self._forward(self._call(FORWARDS, latents.shape[2]), latents)

    def _forward(self, call: Call, x: Tensor) -> Tensor:
        velocity = self.denoiser.velocity(call, x)
        self.flops += self.denoiser.flops(call, x.shape[2])
        return velocity

    def _call(self, step: int, frames: int, kind: Kind = Kind.DENOISE) -> Call:
        clean = kind is not Kind.DENOISE or step > STEPS
        sigma = 0.0 if clean else self.levels[step - 1]
        return Call(
            kind, self.index, max(step - 1, 0), (0, frames), (sigma,) * frames, (step,) * frames,
            (not clean,) * frames, self.end, Family.RENOISE, STEPS,
        )  # fmt: skip


def demand(holds: bool, words: str) -> None:
    """Stops the measurement where what must hold does not.

    Raises:
        AssertionError: with ``words``.
    """
    if not holds:
        raise AssertionError(words)
