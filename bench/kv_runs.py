"""What the K/V measurements share: strategies at equal bytes, and rollouts of ``tiny-causal`` that can be watched.

Equal bytes are those of a full-size model: what 8-bit storage, a compressed middle and scratch take of a budget is
counted at ``FULL`` (Wan 1.3B, 832 x 480, bfloat16), and the tiny model's store gets the same room in latent frames. Its
own float32 and its six layers would favour 8-bit storage and let scratch of one layer count five times as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from accel.attention.ann import AnnConfig
from accel.call import Call, Kind
from accel.engine import Acceleration, Run
from accel.kv.budget import HEADS, IMPORTANCE, KEEPS, MERGE, SLACK, KVBudgetConfig, StoreShape, plan
from accel.kv.ring import Layout
from accel.kv.rotary import TimeRotary
from accel.sampling import Segment, causal_blocks
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.denoiser import TinyDenoiser
from demo.generate import MakeRun

from .scenes import CAUSAL, loaded

STEPS, SHIFT = 4, 5.0
BLOCK, SPAN = 4, 32  # latent frames: of a block, and of the longest clips that the model was trained with
GRID = (4, 4)  # tokens of a latent frame
TOKENS = GRID[0] * GRID[1]
FULL = StoreShape(30, 12, 128, (30, 52), 1, 2, TimeRotary.of_wan(128))
UNBOUNDED, NO_SINK, SINK, BYTES, ANN = "unbounded", "window, no sink", "window + sink", "8-bit window", "ANN attention"
EQUAL_BYTES = (NO_SINK, SINK, IMPORTANCE, MERGE, HEADS, BYTES)
LONG = 10_000  # latent frames of a video that no budget holds


def tiny_shape() -> StoreShape:
    """What one branch of ``tiny-causal`` stores."""
    config = loaded(CAUSAL).config
    head = config.dim // config.num_heads
    return StoreShape(config.num_layers, config.num_heads, head, GRID, 1, 4, TimeRotary.of_wan(head))


def configurations(frames: int) -> dict[str, KVBudgetConfig]:
    """What is kept under ``EQUAL_BYTES``, as a budget in latent frames or, in 8-bit storage, in their bytes."""
    window, bought = KVBudgetConfig(frames=frames, span=SPAN), frames * FULL.frame_bytes() * SLACK / 1e9
    kept = {NO_SINK: replace(window, sink=0), SINK: window}
    kept |= {keep: replace(window, keep=keep) for keep in KEEPS[1:]}
    return kept | {BYTES: replace(window, frames=0, gigabytes=bought, storage="8-bit")}


def full_layout(config: KVBudgetConfig) -> Layout:
    """The room that a budget buys at full size."""
    return plan(config, FULL, 1, BLOCK, LONG)


def with_room_of_full_size(config: KVBudgetConfig) -> KVBudgetConfig:
    """The budget with which ``tiny-causal`` has the room, in latent frames, that ``config`` buys at full size."""
    full, shape = full_layout(config), tiny_shape()
    middle = round(full.middle / full.tokens * TOKENS)
    layout = Layout(TOKENS, full.sink, full.ring, middle, full.span)
    recent = full.ring - BLOCK if config.has_middle else 0
    enough = shape.bytes(layout, config) / 1e9 * (1 + 1e-12)
    return replace(config, frames=0, gigabytes=enough, recent=recent)


def accelerations(frames: int) -> dict[str, Acceleration]:
    """Every strategy of ``EQUAL_BYTES`` with what ``frames`` latent frames take, ANN attention, and unbounded K/V."""
    made = {UNBOUNDED: Acceleration(), ANN: Acceleration(ann=AnnConfig(density=0.33, shortest=4, tile=16))}
    for name, config in configurations(frames).items():
        made[name] = Acceleration(kv_budget=with_room_of_full_size(config))
    return made


class Rollout:
    """A video of ``tiny-causal`` in four steps with fresh noise, block by block.

    Args:
        acceleration: what is kept and read. context: prompt ``[1, 64, 64]``. frames: latent frames of the video.
        make_run: makes the engine; None for one of ``acceleration``.

    Attributes:
        denoiser, timeline: of this run.
    """

    def __init__(
        self, acceleration: Acceleration, context: Tensor, frames: int, make_run: MakeRun | None = None
    ) -> None:
        self.denoiser = TinyDenoiser(
            loaded(CAUSAL), context, 1.0, rollout=frames, budget=acceleration.kv_budget, ann=acceleration.ann,
            calls=STEPS + 1,
        ).sized(torch.empty(1, 16, 1, 2 * GRID[0], 2 * GRID[1]))  # fmt: skip
        self.timeline = Timeline(row_unit="chunk", frames_per_row=BLOCK, title=f"{CAUSAL}, {STEPS} steps")
        self._run = (make_run or (lambda *parts: Run(acceleration, *parts)))(self.denoiser, self.timeline)

    @torch.inference_mode()
    def blocks(
        self, noise: Tensor, seed: int, prefix: Tensor | None = None, finished: Sequence[Tensor] = ()
    ) -> Iterator[Segment]:
        """Blocks of the video; arguments as of ``accel.sampling.causal_blocks``, ``seed`` of the fresh noise."""
        table = flow_sigmas(STEPS, SHIFT)
        yield from causal_blocks(self._run, noise, BLOCK, table, seed, prefix, finished=finished)

    def latents(self, noise: Tensor, seed: int, prefix: Tensor | None = None) -> Tensor:
        """The whole video, ``[1, 16, T, 8, 8]``."""
        pieces = [block.latents for block in self.blocks(noise, seed, prefix)]
        return torch.cat(pieces if prefix is None else [prefix, *pieces], 2)

    @torch.inference_mode()
    def fill(self, latents: Tensor, block: int = BLOCK) -> None:
        """Commits clean latents ``[1, 16, T, 8, 8]`` in one forward a ``block`` of latent frames."""
        for index, first in enumerate(range(0, latents.shape[2], block)):
            part = latents[:, :, first : first + block]
            frames = part.shape[2]
            call = Call(
                Kind.COMMIT, index, STEPS, (0, frames), (0.0,) * frames, (STEPS + 1,) * frames, (False,) * frames,
                first, total_steps=STEPS,
            )  # fmt: skip
            self.denoiser.velocity(call, part)

    def pretend(self, latents: int, seed: int) -> None:
        """Gives an unbounded store random keys and values of so many latent frames, without a forward."""
        shape, generator = tiny_shape(), torch.Generator().manual_seed(seed)
        size = (1, latents * TOKENS, shape.heads, shape.head_dim)
        names = [f"{layer}.{side}" for layer in range(shape.layers) for side in ("key", "value")]
        self.denoiser.load({name: torch.randn(size, generator=generator) for name in names})

    def block_flops(self, segment: int) -> int:
        """FLOPs of one block, its commit included."""
        return sum(record.flops for record in self.timeline.records if record.segment == segment)


def flops_of_block(places: int) -> int:
    """FLOPs of a block whose queries read ``places`` tokens in every layer, its commit included."""
    shape = TinyDenoiser(loaded(CAUSAL), torch.zeros(1, 64, 64), 1.0).shape
    return (STEPS + 1) * shape.forward_flops(BLOCK, TOKENS, places)
