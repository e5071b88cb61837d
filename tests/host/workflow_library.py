"""The same run without ComfyUI: reads a workflow's graph and makes its latents with the library alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accel.attention.ann import AnnConfig
from accel.chunks import ChunkConfig
from accel.correct import CorrectionConfig
from accel.engine import Acceleration, HistoryGuidedConfig, SchedulerConfig
from accel.kv.budget import KVBudgetConfig
from accel.kv.frozen import FrozenConfig
from accel.policy import TriModalConfig
from accel.presets import EXACT, PRESETS, TARGET, quality_target
from accel.sampling import SegmentPlan
from demo import generate
from demo.model import TinyWan
from demo.prompt import embed_text

# Wan 2.1's latent format, in which core keeps the LATENT of a Wan model: LATENT = deviation * model space + mean.
WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_DEVIATION = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

CAUSAL_SHIFT = 5.0  # core's for causal models


def host_latents(path: Path) -> Tensor:
    """What core's Save Latent wrote, in the model's space."""
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN_MEAN, WAN_DEVIATION))
    return (load_file(path)["latent_tensor"] - mean) / deviation


def library_latents(graph: dict[str, dict[str, Any]], model: TinyWan, sampler_id: str, nudge: float = 0.0) -> Tensor:
    """The latents of one sampler of a workflow on a tiny model, in the model's space, from widgets and links alone.

    Args:
        graph: API format. model: what the graph's loader would load.
        sampler_id: an AR Segment Sampler whose mode is not left to the host, or a Run Timeline behind core's KSampler
            or Sampler AR Video.
        nudge: how much larger the start noise is made, relative; to see how the run amplifies rounding errors.

    Raises:
        ValueError: the graph holds a setting that this reading of it does not know.
    """
    if core_sampler(graph, sampler_id) != sampler_id:
        return _core_latents(graph, model, core_sampler(graph, sampler_id), nudge)
    sampler = graph[sampler_id]["inputs"]
    context, negative = _prompts(graph, sampler["positive"][0]), _prompts(graph, sampler["negative"][0])[0]
    frames, seed = graph[sampler["latent_image"][0]]["inputs"]["frames"], _number(graph, sampler["seed"])
    noise = generate.start_noise(seed, frames) * (1.0 + nudge)
    if negative.any() or sampler["history_noise"] or "sigmas" in sampler:
        raise ValueError("The library's twin knows an empty negative prompt, no history noise and no sigmas input.")
    acceleration = _acceleration(graph, sampler["model"][0], model)
    settings = {"guidance": sampler["cfg"], "shift": sampler["shift"]}
    told = {"history_guidance": sampler.get("history_guidance", 0.0)}
    with torch.inference_mode():
        if sampler["mode"] == "causal blocks":
            steps = {"steps": sampler["steps"], "renoise_seed": None if sampler["solver"] == "euler" else seed}
            return generate.sample_causal(model, context, noise, acceleration, **steps, **settings).latents
        if sampler["mode"] == "auto" or settings.pop("shift") != generate.SHIFT:
            raise ValueError(f"The library's twin needs a mode, and shift {generate.SHIFT:g} without causal blocks.")
        if (sampler["mode"] == "next clip") != (model.config.kind == "tiny-next-clip"):
            raise ValueError(f"The library's twin samples {model.config.kind} in its own mode only.")
        plan = SegmentPlan(frames, *(sampler[key] for key in ("segment", "overlap", "block", "ar_step", "steps")))
        solver = sampler["solver"].replace("auto", "euler")
        return generate.sample(model, context, noise, acceleration, plan, solver=solver, **told, **settings).latents


def core_sampler(graph: dict[str, dict[str, Any]], node_id: str) -> str:
    """Id of the sampler whose run a Run Timeline tells; of any other node its own."""
    told = graph[node_id]["class_type"] == "ARVARunTimeline"
    return graph[node_id]["inputs"]["latent"][0] if told else node_id


def _core_latents(graph: dict[str, dict[str, Any]], model: TinyWan, sampler_id: str, nudge: float) -> Tensor:
    """What KSampler and Sampler AR Video make: one segment that all frames denoise together, or causal blocks."""
    given = graph[sampler_id]["inputs"]
    frames = graph[given["latent_image"][0]]["inputs"]["frames"]
    if graph[sampler_id]["class_type"] == "KSampler":
        if (given["sampler_name"], given["scheduler"], given["cfg"]) != ("euler", "simple", 1.0):
            raise ValueError("The library's twin of KSampler knows Euler over the simple schedule at cfg 1.")
        noise = generate.start_noise(given["seed"], frames) * (1.0 + nudge)
        context = _prompts(graph, given["positive"][0])
        plan = SegmentPlan(frames, frames, block=frames, steps=given["steps"])
        acceleration = _acceleration(graph, given["model"][0], model)
        with torch.inference_mode():
            return generate.sample(model, context, noise, acceleration, plan, guidance=1.0).latents
    guider, levels = (graph[given[name][0]]["inputs"] for name in ("guider", "sigmas"))
    seed = graph[given["noise"][0]]["inputs"]["noise_seed"]
    noise = generate.start_noise(seed, frames) * (1.0 + nudge)
    context = _prompts(graph, guider["conditioning"][0])
    acceleration = _acceleration(graph, guider["model"][0], model)
    steps = {"steps": levels["steps"], "renoise_seed": seed}
    with torch.inference_mode():
        return generate.sample_causal(model, context, noise, acceleration, **steps, shift=CAUSAL_SHIFT).latents


def _prompts(graph: dict[str, dict[str, Any]], node_id: str) -> dict[int, Tensor]:
    """The prompts of a chain of Segment Prompt, by the segment each begins at."""
    inputs = graph[node_id]["inputs"]
    if graph[node_id]["class_type"] == "ARVATinyPrompt":
        return {0: embed_text(inputs["text"])}
    (following,) = _prompts(graph, inputs["next"][0]).values()
    return _prompts(graph, inputs["conditioning"][0]) | {inputs["from_segment"]: following}


def _number(graph: dict[str, dict[str, Any]], value: Any) -> Any:
    """A widget's value, or that of the primitive node linked to it."""
    return graph[value[0]]["inputs"]["value"] if isinstance(value, list) else value


def _acceleration(graph: dict[str, dict[str, Any]], node_id: str, model: TinyWan) -> Acceleration:
    """What the nodes between the loader and the sampler describe."""
    node = graph[node_id]
    if node["class_type"] == "UNETLoader":
        return Acceleration()
    inputs = node["inputs"]
    if node["class_type"] == "ModelSamplingSD3":
        if inputs["shift"] != generate.SHIFT:
            raise ValueError(f"The library's twin needs shift {generate.SHIFT:g}.")
        return _acceleration(graph, inputs["model"][0], model)
    if node["class_type"] == "ARVAAccelerate":
        if inputs["quality"] == EXACT:
            return Acceleration()
        if inputs["quality"] == TARGET:
            return quality_target(inputs["target_db"])
        regime = "causal" if model.config.causal_ar else "frames"
        return PRESETS.find(inputs["quality"], model.config.kind, regime).acceleration
    before = _acceleration(graph, inputs["model"][0], model)
    if node["class_type"] == "ARVATriModalScheduler":
        thresholds = TriModalConfig(*(inputs[key] for key in ("cache_below", "predict_below", "decay", "max_skip")))
        order = int(inputs["order"]) if inputs["order"].isdigit() else inputs["order"]
        reach = inputs["reach"] or None
        scheduler = SchedulerConfig(thresholds, inputs["signal"], order, warmup=inputs["warmup"], reach=reach)
        return replace(before, scheduler=scheduler)
    if node["class_type"] == "ARVAHistoryGuidedCache":
        config = HistoryGuidedConfig(*(inputs[key] for key in ("threshold", "signal", "max_skip", "warmup")))
        return replace(before, history_guided=config)
    if node["class_type"] == "ARVAResidualCorrection":
        return replace(before, correction=CorrectionConfig(inputs["source"]))
    if node["class_type"] == "ARVAActiveFrameWindow":
        if inputs["mode"] == "suffix":
            return replace(before, suffix_window=True)
        return replace(before, frozen_window=FrozenConfig(inputs["refresh"], inputs["signal"]))
    if node["class_type"] == "ARVASharedPrefixCache":
        return replace(before, shared_prefix=FrozenConfig(inputs["refresh"], inputs["signal"]))
    if node["class_type"] == "ARVAKVCacheBudget":
        frames = inputs["unit"] == "latent frames"
        size = {"frames": int(inputs["budget"])} if frames else {"gigabytes": inputs["budget"]}
        same = {key: inputs[key] for key in ("sink", "keep", "recent", "storage", "offload")}
        return replace(before, kv_budget=KVBudgetConfig(**size, **same, span=inputs["trained_frames"]))
    if node["class_type"] == "ARVAANNAttention":
        ann = AnnConfig(inputs["density"], inputs["bits"], shortest=inputs["shortest"] or None, groups=inputs["groups"])
        return replace(before, ann=ann)
    if node["class_type"] == "ARVAChunkCache":
        thresholds = TriModalConfig(inputs["cache_below"], inputs["predict_below"], 1.0, inputs["max_skip"] or None)
        order = int(inputs["order"]) if inputs["order"].isdigit() else inputs["order"]
        coefficients = tuple(float(part) for part in inputs["coefficients"].split(","))
        reach = inputs["reach"] or None
        chunks = ChunkConfig(thresholds, inputs["signal"], coefficients, order, reach=reach, warmup=inputs["warmup"])
        return replace(before, chunks=chunks)
    raise ValueError(f"The library's twin does not know the node {node['class_type']}.")
