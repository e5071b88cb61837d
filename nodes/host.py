"""How the pack runs inside ComfyUI: what a MODEL can do, core's guider around our loops, progress and previews.

Core's ``CFGGuider`` loads the model, applies LoRA, hooks and wrappers and converts latents; our ``Sampler`` subclass
only replaces the loop. All state of a run lives in that call and is gone when it ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.wan.model import WanModel
from torch import Tensor

from ..accel.engine import Acceleration, Run
from ..accel.timeline import Timeline
from .host_denoiser import CausalHostDenoiser, HostDenoiser, per_frame_sampling
from .host_files import check_size
from .host_identity import describe_run, graph_digest
from .host_kv import BoundedHostDenoiser, take_patches_off, with_own_store
from .host_live import Audience
from .host_neighbours import check_cards, check_other_caches, check_windows
from .host_progress import Progress
from .host_stream import SegmentStream
from .inputs import is_finite, is_floats, shown
from .job import CAUSAL, CLIP, NODE, Job
from .prompts import check_prompts, for_our_sampler


def model_regime(model: Any, node: str = NODE) -> str:
    """``causal`` for a model with core's K/V protocol, ``frames`` for a Wan model that takes a noise level per frame.

    Raises:
        ValueError: neither; the sentence names ``node``.
    """
    network = getattr(model.model, "diffusion_model", None)
    if hasattr(network, "init_kv_caches") and hasattr(network, "init_crossattn_caches"):
        return "causal"
    flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    if type(network) is WanModel and flow and network.in_dim == model.model.latent_format.latent_channels:
        return "frames"
    reads = f" reading {network.in_dim} channels" if hasattr(network, "in_dim") else ""
    raise ValueError(
        f"{node}: model is {type(model.model).__name__} ({type(network).__name__}{reads}), which can make no "
        "autoregressive video here; load a Wan text-to-video model trained with diffusion forcing, or a causal Wan "
        "model."
    )


def model_shift(model: Any) -> float:
    """The flow shift that the model, or a node before, sets."""
    return float(getattr(model.get_model_object("model_sampling"), "shift", 1.0))


def video_latent(model: Any, latent: dict[str, Any]) -> dict[str, Any]:
    """A copy of the LATENT whose samples ``[B, C, T, H, W]`` fit the model.

    Raises:
        ValueError: anything else than one 5-D latent without a noise mask.
    """
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or samples.ndim != 5:
        shape = "several latents in one" if getattr(samples, "is_nested", False) else list(samples.shape)
        raise ValueError(
            f"{NODE}: latent_image must be a video latent [batch, channels, frames, height, width], got {shape}; "
            "connect an empty video latent, such as Empty AR Video Latent or Tiny AR Latent."
        )
    if not is_floats(samples) or not samples.numel():
        raise ValueError(
            f"{NODE}: latent_image is {shown(samples)}; connect an empty video latent made for this model."
        )
    check_size(NODE, samples.shape, samples.device)
    if not is_finite(samples):
        raise ValueError(
            f"{NODE}: latent_image {list(samples.shape)} holds NaN or infinite numbers; connect an empty video latent."
        )
    if latent.get("noise_mask") is not None:
        raise ValueError(f"{NODE}: latent_image carries a noise mask, which is not supported; remove the mask.")
    out = latent.copy()
    ratios = (out.pop("downscale_ratio_spacial", None), out.pop("downscale_ratio_temporal", None))
    out["samples"] = comfy.sample.fix_empty_latent_channels(model, samples, *ratios)
    channels = model.get_model_object("latent_format").latent_channels
    if out["samples"].shape[1] != channels:
        raise ValueError(
            f"{NODE}: latent_image has {out['samples'].shape[1]} channels, the model works on {channels}; "
            "connect an empty latent made for this model."
        )
    _check_patches(model.model.diffusion_model, out["samples"])
    return out


def _check_patches(network: torch.nn.Module, samples: Tensor) -> None:
    """Raises ValueError for a size that core's causal model cannot cut into patches; core pads it for the others."""
    if not hasattr(network, "init_kv_caches"):
        return
    _, rows, columns = network.patch_size
    if samples.shape[3] % rows or samples.shape[4] % columns:
        raise ValueError(
            f"{NODE}: latent_image is {list(samples.shape)}, and causal blocks need a height that divides by {rows} "
            f"and a width that divides by {columns}; use a size in pixels that divides by 16."
        )


def sample_segments(
    model: Any, positive: list, negative: list, latent: dict[str, Any], job: Job, acceleration: Acceleration,
    timeline: Timeline, hidden: Any = None, stream: SegmentStream | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs ``job`` and returns the LATENT; ``timeline`` is filled on the way, before the eyes of whom ``hidden`` (the
    node's hidden inputs ``prompt`` and ``extra_pnginfo``) names, and finished segments go into ``stream``."""
    check_other_caches(NODE, model.model_options)
    check_windows(NODE, model.model_options)
    if job.own_store(acceleration) or any(
        (acceleration.frozen_window, acceleration.shared_prefix, acceleration.chunks)
    ):
        check_cards(NODE, model)
    samples, given = latent["samples"], 0
    positive, negative = for_our_sampler(positive), for_our_sampler(negative)
    for prompt, used in ((positive, True), (negative, job.cfg != 1.0)):
        check_prompts(NODE, prompt, 1 if used and job.mode == CAUSAL else None)
        _check_texts(model, prompt)
    if job.mode == CAUSAL:
        _check_one_branch(model)
        given = _check_start_frames(model, samples)
        if job.own_store(acceleration):
            model = with_own_store(model)
    else:
        model = model.clone()
        model.add_object_patch("model_sampling", per_frame_sampling(model.get_model_object("model_sampling")))
    timeline.columns = job.calls(given) + bool(given)
    audience = Audience(timeline, getattr(hidden, "prompt", None), getattr(hidden, "extra_pnginfo", None))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(job.cfg)
    sampler = SegmentSampler(job, acceleration, timeline, Progress(model, job.calls(given), audience))
    if stream is not None:
        graph = getattr(hidden, "prompt", None)
        above = {name: graph_digest(graph, audience.node, name) for name in ("model", "positive", "negative")}
        told = {"positive": positive, "negative": negative, "start frames": _start_latent(model.model_options)}
        sampler.stream, sampler.describe = stream, partial(describe_run, model, told, above=above)
    noise = comfy.sample.prepare_noise(samples, job.seed, latent.get("batch_index"))
    try:
        video = guider.sample(noise, samples, sampler, job.table.float(), seed=job.seed)
    finally:
        take_patches_off(model)
    audience.tell(done=True)
    return latent | {"samples": video.to(comfy.model_management.intermediate_device())}


def _check_texts(model: Any, conditioning: list) -> None:
    """Raises ValueError for prompts that are none of this model's text encoder."""
    channels = getattr(model.model.diffusion_model, "text_dim", None)
    for text, _ in conditioning:
        if text.ndim != 3 or not text.numel() or channels not in (None, text.shape[2]):
            raise ValueError(
                f"{NODE}: a prompt is {shown(text)}, the model reads [batch, tokens, {channels or 'channels'}]; "
                "connect conditioning made by the model's own text encoder."
            )
        if not is_finite(text):
            raise ValueError(
                f"{NODE}: a prompt {list(text.shape)} holds NaN or infinite numbers; load the text encoder in another "
                "precision."
            )


def _check_one_branch(model: Any) -> None:
    if model.model_options.get("disable_cfg1_optimization", False):
        raise ValueError(
            f"{NODE}: a node on the model forces the negative prompt at cfg 1, which causal blocks keep no K/V for; "
            "remove it, or use another cfg."
        )


def _start_latent(model_options: dict[str, Any]) -> Tensor | None:
    """The start image that core's AR Video I2V leaves in the model's options, as a LATENT's samples."""
    return model_options.get("transformer_options", {}).get("ar_config", {}).get("initial_latent")


def _check_start_frames(model: Any, samples: Tensor) -> int:
    """Latent frames given at the start of the video."""
    start = _start_latent(model.model_options)
    if start is None:
        return 0
    if start.shape[3:] != samples.shape[3:] or start.shape[2] >= samples.shape[2]:
        raise ValueError(
            f"{NODE}: the start image's latent is {list(start.shape[2:])} [frames, height, width], the video's "
            f"{list(samples.shape[2:])}; use the latent that AR Video I2V gives, with more frames than the start."
        )
    return start.shape[2]


class SegmentSampler(comfy.samplers.Sampler):
    """Core's sampler interface around the segment loops."""

    drives_acceleration = True

    def __init__(self, job: Job, acceleration: Acceleration, timeline: Timeline, progress: Progress) -> None:
        self.job, self.acceleration, self.timeline, self.progress = job, acceleration, timeline, progress
        self.stream: SegmentStream | None = None
        self.describe: Callable[..., dict[str, Any]] | None = None

    @torch.no_grad()
    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        """The video ``[B, C, T, H, W]`` in model space; arguments as core's samplers have them."""
        sampling = model_wrap.inner_model.model_sampling
        start = sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))
        prefix = None
        if self.job.mode == CAUSAL:
            prefix = _start_latent(extra_args["model_options"])
            if prefix is not None:
                prefix = model_wrap.inner_model.process_latent_in(prefix).to(start).expand(len(start), -1, -1, -1, -1)
            if self.job.own_store(self.acceleration):
                told = (self.acceleration, self.job.block, self.job.plan.steps + 1, bool(self.job.history_guidance))
                denoiser = BoundedHostDenoiser(model_wrap, extra_args, start, *told)
                self.timeline.settings |= denoiser.notes()
            else:
                denoiser = CausalHostDenoiser(model_wrap, extra_args, start)
        else:
            denoiser = HostDenoiser(
                model_wrap, extra_args, start, self.job.mode == CLIP, history_guidance=self.job.history_guidance
            )
        run = Run(self.acceleration, denoiser, self.timeline)
        pieces = [] if prefix is None else [prefix]
        finished = self._resume(run, model_wrap, start, prefix)
        pieces = [piece.cpu() for piece in (*pieces, *finished)]
        self.progress.begin(start, torch.cat(pieces, 2) if pieces else None, self.timeline.totals()["iterations"])
        segments = self.job.segments(run, start, self.progress, prefix, finished)
        for segment in segments if self.stream is None else self.stream.carry(segments, run):
            pieces.append(segment.latents.cpu())  # a long video is not kept beside the model
            if isinstance(denoiser, BoundedHostDenoiser):
                self.timeline.settings |= denoiser.notes()
        return torch.cat(pieces, 2)

    def _resume(self, run: Run, model_wrap: Any, start: Tensor, prefix: Tensor | None) -> list[Tensor]:
        """Latents of the segments that an earlier run of the same description finished; ``run`` stands behind them."""
        if self.stream is None:
            return []
        description = self.describe(start=start, job=self.job, acceleration=self.acceleration)
        to_latent = model_wrap.inner_model.process_latent_out
        finished = self.stream.begin(run, description, model_wrap.model_patcher, to_latent, prefix)
        return [latents.to(start) for latents in finished]
