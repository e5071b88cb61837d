"""How much the GPU measurement runs: full size, and a toy size that a CPU goes through in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from accel.flops import WAN_1_3B, WAN_14B, WanShape
from accel.sampling import SegmentPlan

from .fullsize import SKYREELS
from .gpu_clock import Clock, Pace, Times, Work, in_turn


@dataclass(frozen=True, slots=True)
class Extent:
    """Sizes, those of models and videos first.

    Attributes:
        shape, large: the model, and the one of which a single block is timed. grid: token rows and columns of a latent
            frame of the diffusion-forcing model. causal_grid: of the causal one. plan: of the whole loops. long: the
            schedule whose time is composed of forwards. steps: calls of the loops whose memory is measured.
        few, many: latent frames of bounded K/V that are compared. sink: of them. causal_steps: of a causal block.
        rounds, warmup: of every timing; loops have ``loop_rounds`` and warm up on their own. settle: blocks of a
            rollout after its K/V are full, before it is timed.
        kernel_bytes: of the largest tensor a kernel reads. densities: of block-sparse attention. tile, query_tile: of
            it. compiled: whether ``torch.compile`` and kernels take part: a CPU compiles long and interprets longer.
        product: side of the square matrix product that stands for the arithmetic rate.
    """

    shape: WanShape = WAN_1_3B
    large: WanShape = WAN_14B
    grid: tuple[int, int] = (34, 60)
    causal_grid: tuple[int, int] = (30, 52)
    plan: SegmentPlan = SegmentPlan(frames=25, segment=25, block=5, ar_step=5, steps=20)
    long: SegmentPlan = SKYREELS
    steps: int = 6
    few: int = 12
    many: int = 21
    sink: int = 1
    causal_steps: int = 4
    rounds: int = 10
    warmup: int = 3
    loop_rounds: int = 2
    settle: int = 2
    kernel_bytes: int = 1 << 28
    densities: tuple[float, ...] = (0.25, 0.1)
    tile: int = 64
    query_tile: int = 256
    compiled: bool = True
    product: int = 8192


WHOLE = Extent()
TOY_SHAPE = WanShape(dim=48, ffn_dim=96, layers=2, heads=2, text_tokens=6, freq_dim=16, text_dim=12)
TOY = Extent(
    shape=TOY_SHAPE,
    large=WanShape(dim=96, ffn_dim=192, layers=3, heads=4, text_tokens=6, freq_dim=16, text_dim=12),
    grid=(4, 6),
    causal_grid=(4, 6),
    plan=SegmentPlan(frames=6, segment=6, block=2, ar_step=2, steps=8),
    long=SegmentPlan(frames=10, segment=6, overlap=2, block=2, ar_step=2, steps=8),
    steps=4,
    few=6,
    many=8,
    causal_steps=2,
    rounds=2,
    warmup=1,
    loop_rounds=1,
    settle=0,
    kernel_bytes=1 << 14,
    densities=(0.25,),
    tile=16,
    query_tile=32,
    compiled=False,
    product=64,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bench:
    """What a part measures with.

    Attributes:
        device, dtype: of models and inputs. pace: what is left of the part's time. say: tells people how it goes on.
    """

    extent: Extent
    device: torch.device
    dtype: torch.dtype
    clock: Clock
    pace: Pace
    say: Callable[[str], Any]

    def timed(self, measure: Callable[[Callable[[], Any]], float], works: dict[str, Work], repeats: int = 1) -> Times:
        """``works`` in turn, as many rounds as the extent says."""
        return in_turn(measure, works, self.extent.rounds, self.extent.warmup, self.pace, repeats)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Numbers from a normal distribution: times of zeros would flatter."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)
