"""Makes videos with the tiny models: one function a regime, each returning latents, timeline and process time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.engine import Acceleration, Denoiser, Run
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing, next_clip
from accel.schedule import flow_sigmas
from accel.timeline import Timeline

from .codec import CHANNELS
from .denoiser import TinyDenoiser
from .model import MODELS, TinyWan, load_model

SHIFT = 3.0
GUIDANCE = 2.0
PLAN = SegmentPlan(frames=52, segment=16, overlap=4, block=4, ar_step=5, steps=50)
NEXT_CLIP_PLAN = replace(PLAN, ar_step=0)
CAUSAL_FRAMES = 32
MakeRun = Callable[[Denoiser, Timeline], Run]


@dataclass(frozen=True, slots=True)
class Result:
    """What a run made: ``latents`` ``[B, 16, T, 8, 8]``, its timeline and the process seconds it took."""

    latents: Tensor
    timeline: Timeline
    seconds: float


def lasting(plan: SegmentPlan, segments: int) -> SegmentPlan:
    """The plan with as many latent frames as this number of segments has."""
    return replace(plan, frames=plan.segment + (segments - 1) * (plan.segment - plan.overlap))


def load(kind: str) -> TinyWan:
    """One of the embedded models: ``tiny-df``, ``tiny-next-clip`` or ``tiny-causal``."""
    path = MODELS / f"{kind}.safetensors"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in MODELS.glob("*.safetensors"))) or "none"
        raise ValueError(f"demo: there is no model {kind!r}; embedded models: {known}.")
    return load_model(path)


def start_noise(seeds: int | list[int], frames: int, size: int = 8) -> Tensor:
    """Start noise ``[B, 16, frames, size, size]``, one private generator a seed (the numbers ComfyUI draws for it)."""
    seeds = [seeds] if isinstance(seeds, int) else seeds
    shape = (1, CHANNELS, frames, size, size)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sample(
    model: TinyWan,
    context: Tensor | Mapping[int, Tensor],
    noise: Tensor,
    acceleration: Acceleration | None = None,
    plan: SegmentPlan = PLAN,
    guidance: float = GUIDANCE,
    solver: str = "euler",
    prefix: Tensor | None = None,
    make_run: MakeRun | None = None,
    history_guidance: float = 0.0,
    negative: Tensor | None = None,
    history_noise: float = 0.0,
) -> Result:
    """Diffusion forcing, or next-clip continuation for a model trained for it.

    Args:
        context: prompts ``[B, 64, 64]``, or several by the segment each begins at. noise: ``[B, 16, frames, H, W]``.
        make_run: makes the engine of this run; None for one of ``acceleration``.
        history_guidance, negative: see ``TinyDenoiser``. history_noise: see ``diffusion_forcing``.
    """
    denoiser = TinyDenoiser(model, context, guidance, history_guidance=history_guidance, negative=negative).sized(noise)
    timeline = Timeline(row_unit="chunk", frames_per_row=plan.block, title=f"{model.config.kind}, {plan.steps} steps")
    timeline.rows, timeline.columns = -(-plan.frames // plan.block), plan.calls()
    run = make_run(denoiser, timeline) if make_run else Run(acceleration or Acceleration(), denoiser, timeline)
    loop = next_clip if denoiser.shares_time else diffusion_forcing
    started = time.process_time()
    with torch.inference_mode():
        table = flow_sigmas(plan.steps, SHIFT)
        segments = loop(run, noise, plan, table, solver=solver, history_noise=history_noise, prefix=prefix)
        pieces = [segment.latents for segment in segments]
    latents = torch.cat(pieces if prefix is None else [prefix, *pieces], 2)
    return Result(latents, timeline, time.process_time() - started)


def sample_causal(
    model: TinyWan,
    context: Tensor | Mapping[int, Tensor],
    noise: Tensor,
    acceleration: Acceleration | None = None,
    steps: int = 50,
    renoise_seed: int | None = None,
    guidance: float = 1.0,
    shift: float = SHIFT,
    prefix: Tensor | None = None,
    make_run: MakeRun | None = None,
    history_guidance: float = 0.0,
    negative: Tensor | None = None,
) -> Result:
    """Block-causal rollout with a K/V store; ``renoise_seed`` samples as core's ``ar_video`` does, the rest as in
    ``sample``."""
    frames = noise.shape[2]
    told = acceleration or Acceleration()
    denoiser = TinyDenoiser(
        model, context, guidance, rollout=frames, budget=told.kv_budget, ann=told.ann, calls=steps + 1,
        history_guidance=history_guidance, negative=negative,
    ).sized(noise)  # fmt: skip
    timeline = Timeline(
        row_unit="chunk", frames_per_row=model.config.block, title=f"{model.config.kind}, {steps} steps"
    )
    timeline.rows = -(-frames // model.config.block)
    run = make_run(denoiser, timeline) if make_run else Run(acceleration or Acceleration(), denoiser, timeline)
    started = time.process_time()
    with torch.inference_mode():
        table = flow_sigmas(steps, shift)
        blocks = causal_blocks(run, noise, model.config.block, table, renoise_seed, prefix)
        pieces = [segment.latents for segment in blocks]
    latents = torch.cat(pieces if prefix is None else [prefix, *pieces], 2)
    return Result(latents, timeline, time.process_time() - started)


def fewer_steps(plan: SegmentPlan, flops: int, row_flops: int) -> SegmentPlan:
    """The plan with the fewest solver steps, ``ar_step`` scaled with them, that costs at least ``flops``.

    Args:
        flops: cost of the run it is compared with. row_flops: cost of one guided call of the full window.
    """
    for steps in range(1, plan.steps + 1):
        ar_step = max(1, round(plan.ar_step * steps / plan.steps)) if plan.ar_step else 0
        shorter = replace(plan, steps=steps, ar_step=ar_step)
        if shorter.calls() * row_flops >= flops:
            return shorter
    return plan
