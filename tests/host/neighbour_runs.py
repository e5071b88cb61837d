"""Accelerated models beside what else people put on a MODEL, inside ComfyUI, for test_neighbours.py.

Argument: the diffusion-forcing checkpoint. Facts go to the last line.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import comfy.controlnet
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parent))
from stock_runs import (  # noqa: E402
    SEED,
    WAN,
    common_ksampler,
    counted,
    decisions,
    empty,
    facts,
    ksampler,
    last,
    negative,
    node,
    positive,
    random_model,
    refusal,
    scheduled,
    state_left,
)

from nodes import NODE_CLASS_MAPPINGS as NODES  # noqa: E402

STEPS = 8
SEGMENTS = {
    "seed": SEED, "steps": 6, "cfg": 2.0, "mode": "diffusion forcing", "segment": 4, "overlap": 2, "block": 2,
    "ar_step": 0, "solver": "euler", "shift": 3.0, "history_noise": 0.0,
}  # fmt: skip


def tried(name: str, given, latent: dict, cache: float = 0.9, **named) -> torch.Tensor:
    """Samples ``given`` plain, off and accelerated, and writes down what became of it."""
    run, counts = counted(given)
    exact = ksampler(run, latent, steps=STEPS, **named)
    full = tuple(counts)
    off = ksampler(scheduled(given, 0.0, 0.0), latent, steps=STEPS, **named)
    run, spent = counted(scheduled(given, cache, cache))
    fast = ksampler(run, latent, steps=STEPS, **named)
    facts[name] = {
        "off": torch.equal(exact, off), "full": full, "spent": tuple(spent), "decisions": decisions(last()),
        "error": ((fast - exact).norm() / exact.norm()).item(), "branches": last().branches,
        "conditioning": last().settings.get("conditioning"),
    }  # fmt: skip
    return exact


def segments(given, latent: dict, texts: tuple = (positive, negative), **changes) -> torch.Tensor:
    return node("ARVASegmentSampler", given, *texts, latent, **SEGMENTS | changes)[0]["samples"]


def lora_file(model, parts: tuple[str, ...]) -> str:
    """Name of a new LoRA of random weights for linear layers of the first two blocks."""
    generator = torch.Generator().manual_seed(2)
    lora = {}
    for key in (f"blocks.{index}.{part}" for index in range(2) for part in parts):
        rows, columns = comfy.utils.get_attr(model.model.diffusion_model, f"{key}.weight").shape
        lora[f"diffusion_model.{key}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.2
        lora[f"diffusion_model.{key}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    save_file(lora, Path(folder_paths.get_folder_paths("loras")[0]) / "tiny.safetensors")
    return "tiny.safetensors"


def weights(model, checkpoint: str, latent: dict, plain: torch.Tensor) -> None:
    """LoRA, fp8, merging and compiling."""
    name = lora_file(model, ("self_attn.q", "self_attn.o"))
    loader = NODES["LoraLoaderModelOnly"]()
    (changed,) = loader.load_lora_model_only(model, name, 1.0)
    facts["LoRA changes it"] = not torch.equal(tried("LoRA", changed, latent), plain)
    (behind,) = loader.load_lora_model_only(scheduled(model, 0.9, 0.9), name, 1.0)
    before = scheduled(changed, 0.9, 0.9)
    facts["LoRA before or behind"] = torch.equal(ksampler(behind, latent), ksampler(before, latent))
    facts["LoRA in segments"] = [
        torch.equal(segments(given, empty(6)), segments(changed, empty(6)))
        for given in (scheduled(changed, 0.0, 0.0), model)
    ]
    small = comfy.sd.load_diffusion_model(checkpoint, model_options={"dtype": torch.float8_e4m3fn})
    facts["fp8 is fp8"] = str(small.model_dtype())
    tried("fp8", small, latent)
    other = comfy.sd.load_diffusion_model(checkpoint)
    with torch.no_grad():
        for weight in other.model.diffusion_model.parameters():
            weight.mul_(1.02)
    (merged,) = NODES["ModelMergeSimple"]().merge(scheduled(model, 0.9, 0.9), other, 0.5)
    ksampler(merged, latent, steps=STEPS)
    facts["merged, accelerated first"] = decisions(last())
    (merged,) = NODES["ModelMergeSimple"]().merge(other, scheduled(model, 0.9, 0.9), 0.5)
    facts["merged, accelerated second"] = "arva_acceleration" in merged.model_options["transformer_options"]
    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    tried("compiled", compiled, latent)


class Hint(comfy.controlnet.ControlBase):
    """A control model that counts how often it is asked and gives nothing."""

    asked = 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        Hint.asked += 1

    def copy(self):
        other = Hint()
        self.copy_to(other)
        return other

    def get_models(self):
        return []


def inputs(model, latent: dict) -> None:
    """Control models, VACE, masks, image-to-image and batches."""
    hint = Hint().set_cond_hint(torch.zeros(1, 8, 8, 3), 1.0, (0.0, 0.4))
    shown = [[positive[0][0], {"control": hint, "control_apply_to_uncond": False}]]
    tried("ControlNet", model, latent, 9.0, positive=shown)
    config = WAN | {"model_type": "vace", "num_layers": 4, "vace_layers": 2, "vace_in_dim": 96}
    vace = random_model(comfy.supported_models.WAN21_Vace, config)
    frames = torch.randn(1, 32, 2, 4, 4, generator=torch.Generator().manual_seed(6))
    told = {"vace_frames": [frames], "vace_mask": [torch.ones(1, 64, 2, 4, 4)], "vace_strength": [1.0]}
    seen = tried("VACE", vace, latent, positive=[[positive[0][0], told]])
    facts["VACE changes it"] = not torch.equal(seen, ksampler(vace, latent, steps=STEPS))
    start = {"samples": torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(8))}
    mask = torch.ones(1, 32, 32)
    mask[:, :, :16] = 0.0
    tried("mask", model, start | {"noise_mask": mask}, denoise=0.7)
    tried("batch", model, empty(2, batch=3))


def guidance(model, latent: dict) -> None:
    """Nodes that change guidance; those that ask the model once more do so together with the call."""
    tried("CFGZeroStar", node("CFGZeroStar", model)[0], latent)
    tried("APG", node("APG", model, 1.0, 5.0, -0.5)[0], latent)
    skipped = {"double_layers": "2", "single_layers": "", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0}
    tried("SkipLayerGuidanceDiT", node("SkipLayerGuidanceDiT", model, **skipped)[0], latent)
    late = skipped | {"start_percent": 0.5}
    tried("SkipLayerGuidanceDiT from the middle", node("SkipLayerGuidanceDiT", model, **late)[0], latent, 9.0)


def windows(model) -> None:
    def windowed(schedule: str):
        given = {
            "context_length": 13, "context_overlap": 5, "context_schedule": schedule, "context_stride": 1,
            "closed_loop": False, "fuse_method": "pyramid", "freenoise": False,
        }  # fmt: skip
        return node("WanContextWindowsManual", model, **given)[0]

    tried("static windows", windowed("standard_static"), empty(8))
    tried("moving windows", windowed("standard_uniform"), empty(8))
    facts["windows in segments"] = refusal(segments, windowed("standard_static"), empty(6))


def caches(model, latent: dict) -> None:
    """Core's own caches on the same model, in both orders."""
    facts["caches"] = {}
    for name in ("EasyCache", "LazyCache"):
        under = scheduled(node(name, model, 0.2, 0.15, 0.95, False)[0])
        above = node(name, scheduled(model), 0.2, 0.15, 0.95, False)[0]
        alone = node(name, model, 0.2, 0.15, 0.95, False)[0]
        facts["caches"][name] = [refusal(ksampler, given, latent) for given in (under, above)]
        facts["caches"][name].append(refusal(segments, alone, empty(6)))
        facts["caches"][name].append(refusal(ksampler, alone, latent))


def two_samplers(model, latent: dict) -> None:
    """Two samplers on one MODEL, and one run shared by two (high and low noise levels)."""
    fast = scheduled(model, 0.9, 0.9)
    first, second = (common_ksampler(fast, seed, STEPS, 2.0, "euler", "simple", positive, negative, latent)[0]
                     for seed in (1, 2))  # fmt: skip
    again = common_ksampler(fast, 1, STEPS, 2.0, "euler", "simple", positive, negative, latent)[0]
    facts["two samplers"] = [torch.equal(first["samples"], again["samples"]),
                             torch.equal(first["samples"], second["samples"])]  # fmt: skip

    def halves(given) -> list[str]:
        made, shown = latent, []
        for start, end in ((0, 4), (4, 10000)):
            (made,) = NODES["KSamplerAdvanced"]().sample(
                given, "enable" if start == 0 else "disable", SEED, STEPS, 2.0, "euler", "simple", positive, negative,
                made, start, end, "enable" if start == 0 else "disable",
            )  # fmt: skip
            if given is not model:
                shown.append(decisions(last()))
        halves.made = made["samples"]
        return shown

    halves(model)
    exact = halves.made
    halves(scheduled(model, 0.0, 0.0))
    facts["halves off"] = torch.equal(halves.made, exact)
    facts["halves"] = halves(fast)


def main(frames_file: str) -> None:
    logging.getLogger().setLevel(logging.ERROR)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    model, latent = comfy.sd.load_diffusion_model(frames_file), empty(2)
    plain = tried("nothing", model, latent)
    weights(model, frames_file, latent, plain)
    inputs(model, latent)
    guidance(model, latent)
    windows(model)
    caches(model, latent)
    two_samplers(model, latent)
    facts["nothing outlives it"] = [state_left(), torch.equal(ksampler(model, latent, steps=STEPS), plain)]
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
