"""One forward of a core sampler's call as the engine sees it: its CFG branches as one ``Denoiser``, and its ``Run``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.ldm.wan.ar_model import CausalWanModel
from comfy.ldm.wan.model import WanModel
from torch import Tensor

from ..accel.acceleration import Acceleration
from ..accel.call import Call, Decision
from ..accel.engine import Run
from ..accel.timeline import Timeline
from .host_denoiser import HostDenoiser


class WanInside(HostDenoiser):
    """What a signal and the FLOP count ask of core's Wan models; the forward itself is core's."""

    def __init__(self, guider: Any, model_options: dict[str, Any], x: Tensor, causal: bool) -> None:
        super().__init__(guider, {"model_options": model_options}, x, shares_time=True)
        self.causal, self.recomputes_history = causal, not causal

    def show_prompt(self, segment: int) -> None:
        """Core shows the prompts."""

    def _keys(self, call: Call, frames: int) -> int | None:
        return (call.offset + frames) * self.tokens if self.causal else None

    _full_keys = _keys


class Branches:
    """The CFG branches of one forward as a ``Denoiser``: their velocities one after the other along the batch.

    Args:
        inside: where signals and FLOPs come from; None for models not known here.
    """

    shares_time = False
    kept_bytes = 0

    def __init__(self, inside: WanInside | None) -> None:
        self.inside = inside
        self.recomputes_history = inside is None or inside.recomputes_history
        self.branches, self.forwards = 1, 1
        self.answer: list[Tensor] = []

    def begin(self, forward: Callable[[], list[Tensor]], shown: Sequence[int], forwards: int) -> None:
        """The next call: how core makes it, which of its outputs are CFG branches, and how many forwards it takes."""
        self.forward, self.shown, self.forwards = forward, shown, forwards
        self.branches = len(shown)

    def velocity(self, call: Call, x: Tensor) -> Tensor:
        self.answer = self.forward()
        noisy, sigma = x[: len(x) // self.branches], max(call.sigmas)
        parts = [as_video(self.answer[index]) for index in self.shown]
        return torch.cat([(noisy - part) / sigma if sigma > 0 else torch.zeros_like(noisy) for part in parts])

    def feature(self, kind: str, call: Call, x: Tensor) -> Tensor:
        x = x[: len(x) // self.branches]
        return x.transpose(1, 2) if self.inside is None else self.inside.feature(kind, call, x)

    def flops(self, call: Call, frames: int) -> int:
        if self.inside is None:
            return 0
        self.inside.branches = self.forwards
        return self.inside.flops(call, frames)

    full_flops = flops

    def feature_flops(self, kind: str, call: Call, frames: int) -> int:
        return 0 if self.inside is None else self.inside.feature_flops(kind, call, frames)

    def keep(self, frames: int) -> str | None:
        return "off: core's sampler runs the whole window"


class Stream:
    """One forward of every guided call: what conditions it, and its ``Run``."""

    def __init__(self, acceleration: Acceleration, denoiser: Branches, timeline: Timeline) -> None:
        self.denoiser, self.run = denoiser, Run(acceleration, denoiser, timeline)
        self.told: tuple | None = None
        self.segment = -1

    def begin(self, call: Call, told: tuple, table: Sequence[float]) -> None:
        """Forgets what is stored: a trajectory under other conditions starts."""
        frames = call.frames[1]
        self.told, self.segment = told, call.segment
        self.run.begin_segment(call.segment, frames, 0, frames, table)

    def answer(
        self, call: Call, given: Tensor, outputs: Sequence[Any], x: Tensor, decision: Decision | None
    ) -> tuple[list[Tensor], bool]:
        """What core's ``calc_cond_batch`` returns, and whether core made it; ``decision`` is that of the forward that
        leads, None where this one does."""
        stacked = given.repeat(self.denoiser.branches, 1, 1, 1, 1)
        step = self.run.step if decision is None else self.run.follow
        velocity, true = step(call, stacked) if decision is None else step(call, stacked, decision)
        if true:
            answer, self.denoiser.answer = self.denoiser.answer, []
            return answer, True
        held = [torch.zeros_like(x) for _ in outputs]
        for index, part in zip(self.denoiser.shown, velocity.chunk(self.denoiser.branches), strict=True):
            held[index] = (given - call.sigmas[0] * part).reshape(x.shape).to(x.dtype)
        return held, False


def as_video(x: Tensor) -> Tensor:
    """Latents of any model as ``[B, C, T, H, W]``: pictures are one latent frame, packed latents one row of it."""
    if x.ndim == 5:
        return x
    return x.unsqueeze(2) if x.ndim == 4 else x.reshape(x.shape[0], x.shape[1], 1, 1, -1)


def inside_of(guider: Any, model: Any, model_options: dict[str, Any], x: Tensor, causal: bool) -> WanInside | None:
    """The inside of core's plain Wan models; None for others."""
    network = model.diffusion_model
    prompt = (getattr(guider, "conds", {}).get("positive") or [{}])[0].get("model_conds", {}).get("c_crossattn")
    plain = type(network) in (WanModel, CausalWanModel) and x.ndim == 5 and network.in_dim == x.shape[1]
    if not plain or prompt is None or model is not guider.inner_model:
        return None
    return WanInside(guider, model_options, x, causal)
