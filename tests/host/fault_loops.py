"""The loops that test_faults.py throws faults at, inside ComfyUI: acceleration nodes, widgets, and how to run one."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sd
import torch

from nodes import NODE_CLASS_MAPPINGS as NODES

COMMON = {
    "seed": 7, "steps": 5, "cfg": 2.0, "mode": "auto", "segment": 8, "overlap": 4, "block": 4, "ar_step": 2,
    "solver": "auto", "shift": 3.0, "history_noise": 0.0,
}  # fmt: skip
CAUSAL = COMMON | {"steps": 3, "solver": "euler"}
FEW = CAUSAL | {"steps": 2}
STREAM = {"fps": 16.0, "format": "mkv", "resume": True, "every": 1, "context": 2}
SCHEDULED = ("ARVATriModalScheduler", 0.2, 0.9, "log-snr", "2", 0.75, 5, 1, 0.0)
CORRECTED = ("ARVAResidualCorrection", "seg1_l1")


def node(name: str, *inputs, **named):
    return NODES[name].execute(*inputs, **named)


def budget(keep: str, storage: str = "model", offload: int = 0, frames: float = 9.0) -> tuple:
    return ("ARVAKVCacheBudget", frames, "latent frames", keep, 1, 0, storage, offload)


@dataclass(frozen=True)
class Loop:
    """One way to make a video: acceleration nodes, the sampler's widgets, and the latent's size."""

    checkpoint: str
    nodes: tuple = ()
    settings: dict[str, Any] = field(default_factory=lambda: COMMON)
    frames: int = 12
    size: tuple[int, int] = (64, 64)
    batch: int = 1
    prompts: bool = False
    vae: bool = False
    stream: str = ""


LOOPS = {
    "staircase": Loop("frames", (SCHEDULED, CORRECTED, ("ARVAActiveFrameWindow", "frozen K/V", 3.0, "log-signal"))),
    "suffix": Loop(
        "frames", (("ARVAHistoryGuidedCache", 10.0, "auto", 5, 2), ("ARVAActiveFrameWindow", "suffix")),
        COMMON | {"cfg": 1.0, "solver": "unipc", "history_noise": 0.02},
    ),
    "shared prefix": Loop(
        "frames", (("ARVASharedPrefixCache", 0.1, "history"), (*SCHEDULED[:3], "current", *SCHEDULED[4:]))
    ),
    "chunk cache": Loop(
        "frames",
        (("ARVAChunkCache", 0.2, 0.9, "current", "1, 0", "1", 5, 1, 0.0), ("ARVASharedPrefixCache", 0.0, "log-signal")),
    ),
    "next clip": Loop(
        "frames", (("ARVAHistoryGuidedCache", 10.0, "mod", 5, 2), CORRECTED),
        COMMON | {"mode": "next clip", "ar_step": 0},
    ),
    "quality target": Loop("frames", (("ARVAAccelerate", "target", 30.0),)),
    "core store": Loop("causal", (SCHEDULED,), CAUSAL | {"cfg": 1.0, "steps": 5}, 10, prompts=True),
    "guided": Loop("causal", (), CAUSAL | {"solver": "re-noise"}, 10, prompts=True),
    "window": Loop("causal", (SCHEDULED, budget("window")), CAUSAL | {"steps": 4}, 16),
    "importance-redundancy": Loop("causal", (budget("importance-redundancy", frames=14.0),), FEW | {"cfg": 1.0}, 20),
    "temporal-merge": Loop("causal", (budget("temporal-merge", frames=14.0),), FEW | {"cfg": 1.0}, 20),
    "head-groups": Loop("causal", (budget("head-groups"),), CAUSAL, 16),
    "8-bit": Loop("causal", (budget("importance-redundancy", "8-bit", frames=24.0),), FEW | {"cfg": 1.0}, 28),
    "offload": Loop("causal", (budget("temporal-merge", offload=4, frames=24.0),), FEW | {"cfg": 1.0}, 28),
    "sparse": Loop(
        "causal", (("ARVAANNAttention", 0.1, 1, 12, "head", True, 0.5),), FEW | {"cfg": 1.0}, 24, prompts=True
    ),
    "streamed blocks": Loop(
        "causal", (SCHEDULED, budget("temporal-merge", frames=14.0)), FEW | {"cfg": 1.0}, 20, stream="blocks"
    ),
    "streamed segments": Loop("frames", (SCHEDULED, CORRECTED), COMMON, 12, vae=True, stream="segments"),
}  # fmt: skip


positive, negative = node("ARVATinyPrompt", "red disc, blue square, gravity, pan")[0], node("ARVATinyPrompt", "")[0]
script = node("ARVASegmentPrompt", positive, node("ARVATinyPrompt", "green square, blue disc")[0], 1)[0]
codec = node("ARVATinyCodec")[0]


def load(loop: Loop, **options: Any) -> Any:
    """A MODEL as a loader gives it."""
    return comfy.sd.load_diffusion_model(str(Path(sys.argv[1]) / f"{loop.checkpoint}.safetensors"), options)


def accelerated(loop: Loop, model: Any) -> Any:
    """The MODEL behind the loop's nodes."""
    for name, *widgets in loop.nodes:
        model = node(name, model, *widgets)[0]
    return model


def sample(loop: Loop, model: Any, prefix: str = "", dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict]:
    """The latents, and the timeline's settings. ``prefix``: of the files of a loop that streams; others ignore it."""
    width, height = loop.size
    latent = node("ARVATinyLatent", frames=loop.frames, width=width, height=height, batch_size=loop.batch)[0]
    latent["samples"] = latent["samples"].to(dtype)
    stream = None
    if loop.stream and prefix:
        stream = node("ARVAStreamSegments", prefix, **STREAM, vae=codec if loop.vae else None)[0]
    shown = script if loop.prompts else positive
    made = node("ARVASegmentSampler", model, shown, negative, latent, stream=stream, **loop.settings)
    return made[0]["samples"], made[1].settings
