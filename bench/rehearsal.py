"""A run without its model: what is decided, and what it costs, where decisions need the noise levels alone.

Signals of the noise level and of the timestep embedding, fixed lists and fewer steps know nothing of the video, so
their whole decision list can be had in a moment: velocities are zeros, latents are one token wide, and only FLOPs are
counted, those of the real size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.call import Call
from accel.engine import Acceleration, Run
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing, next_clip
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.codec import CHANNELS
from demo.denoiser import TinyDenoiser
from demo.generate import GUIDANCE, SHIFT, start_noise

from .scenes import CAUSAL, Scene, loaded, prompt

VIDEO_FREE = ("timestep",)


class CountingDenoiser(TinyDenoiser):
    """Costs what the tiny model costs and answers zeros."""

    def velocity(self, call: Call, x: Tensor) -> Tensor:
        first, last = call.queries or call.frames
        return torch.zeros_like(x[:, :, first - call.frames[0] : last - call.frames[0]])

    def feature(self, kind: str, call: Call, x: Tensor) -> Tensor:
        if kind not in VIDEO_FREE:
            raise ValueError(
                f"Rehearsal: feature {kind!r} depends on the video; measure this method on a clip instead."
            )
        return super().feature(kind, call, x)


def rehearse(
    scene: Scene, acceleration: Acceleration | None = None, make_run: Any = None, plan: SegmentPlan | None = None
) -> Timeline:
    """Timeline of a run of ``scene`` (its decisions and FLOPs; the seconds mean nothing).

    Raises:
        ValueError: a signal that looks at the video.
    """
    plan = plan or scene.plan
    causal = scene.kind == CAUSAL
    denoiser = CountingDenoiser(loaded(scene.kind), prompt(0), 1.0 if causal else GUIDANCE, rollout=plan.frames)
    denoiser.sized(start_noise(0, 1))
    timeline = Timeline()
    run = make_run(denoiser, timeline) if make_run else Run(acceleration or Acceleration(), denoiser, timeline)
    noise = torch.ones(1, CHANNELS, plan.frames, 2, 2)
    table = flow_sigmas(plan.steps, SHIFT)
    with torch.inference_mode():
        if causal:
            segments = causal_blocks(run, noise, plan.block, table)
        else:
            segments = (next_clip if denoiser.shares_time else diffusion_forcing)(run, noise, plan, table)
        for _ in segments:
            pass
    return timeline
