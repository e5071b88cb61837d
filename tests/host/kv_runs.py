"""Causal blocks with our K/V store inside ComfyUI, for test_kv.py: latents go to OUT, facts to the last line.

Arguments: the causal checkpoint, the file for latents (in the model's space).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import comfy.model_management
import comfy.samplers
import comfy.sd
import torch
from run_in_comfy import pack_module
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parent))
from node_runs import (  # noqa: E402
    CAUSAL,
    core_sample,
    empty,
    facts,
    interrupted,
    latents,
    node,
    one_forward_a_branch,
    positive,
    refusal,
    reports,
    sample,
    state_left,
)


def budget(model, *given, **named):
    return node("ARVAKVCacheBudget", model, *given, **named)[0]


def against_core(checkpoint: str) -> None:
    model, latent = comfy.sd.load_diffusion_model(checkpoint), empty(14, batch=2)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    sampler = node("SamplerARVideo", 4)[0]
    core = core_sample(model, latent, sampler, sigmas, 1.0, 7)
    whole, facts["whole"] = sample(budget(model, 14.0, "latent frames", "window", 1), latent, **CAUSAL)
    facts["whole against core"] = (whole - core).abs().max().item()
    random = torch.get_rng_state()
    latents["window"], facts["window"] = sample(budget(model, 9.0, "latent frames", "window", 1), latent, **CAUSAL)
    facts["global random state untouched"] = torch.equal(random, torch.get_rng_state())
    facts["core after ours"] = torch.equal(core_sample(model, latent, sampler, sigmas, 1.0, 7), core)
    facts["again"] = torch.equal(
        sample(budget(model, 9.0, "latent frames", "window", 1), latent, **CAUSAL)[0], latents["window"]
    )
    latents["guided"], facts["guided"] = sample(model, latent, **CAUSAL | {"cfg": 2.0})
    small = budget(model, 9.0, "latent frames", "window", 1)
    latents["guided window"], facts["guided window"] = sample(small, latent, **CAUSAL | {"cfg": 2.0})
    by_history = CAUSAL | {"cfg": 2.0, "history_guidance": 1.0}
    latents["history guided"], facts["history guided"] = sample(model, latent, **by_history)
    latents["history guided window"], facts["history guided window"] = sample(small, latent, **by_history)
    with one_forward_a_branch(model):
        single, _ = sample(model, latent, **by_history)
    facts["history guided, one by one"] = (single - latents["history guided"]).abs().max().item()
    scheduled = node("ARVATriModalScheduler", small, 0.3, 2.0, "log-snr", "2", 0.75, 5, 1, 0.0)[0]
    settings = CAUSAL | {"cfg": 2.0, "steps": 16}
    latents["guided fast"], facts["guided fast"] = sample(scheduled, latent, **settings, solver="euler")

    def sparse(*given, **named):
        return node("ARVAANNAttention", model, *given, **named)[0]

    latents["all read"], facts["all read"] = sample(sparse(1.0), latent, **CAUSAL | {"cfg": 2.0})
    latents["all tokens"], facts["all tokens"] = sample(sparse(1.0, collapse_prompt=False), latent, **CAUSAL)
    long = empty(48)
    latents["all of long"], facts["all of long"] = sample(sparse(1.0), long, **CAUSAL)
    latents["sparse"], facts["sparse"] = sample(sparse(0.33, 8), long, **CAUSAL)
    latents["not worth it"], facts["not worth it"] = sample(sparse(0.7), long, **CAUSAL)
    latents["sparse prompt"], facts["sparse prompt"] = sample(sparse(1.0, prompt_share=0.5), latent, **CAUSAL)
    facts["all tokens against core"] = (latents["all tokens"] - core).abs().max().item()

    other = node("ARVATinyPrompt", "green square, blue disc")[0]
    script = node("ARVASegmentPrompt", positive, other, 2)[0]
    for name, given, cfg in (("told", model, 1.0), ("told small", small, 2.0), ("told sparse", sparse(1.0), 1.0)):
        latents[name], _ = sample(given, latent, **CAUSAL | {"cfg": cfg}, positive=script)
    facts["conditioning untouched"] = len(positive) == 1 and "arva_segment" not in positive[0][1]
    frames_prompt = refusal(sample, model, latent, **CAUSAL, positive=script[1:])
    facts["refusals"] = {"no first prompt": frames_prompt, "same": refusal(node, "ARVASegmentPrompt", script, other, 2)}
    facts["refusals"]["two prompts"] = refusal(sample, model, latent, **CAUSAL, positive=[*positive, *other])

    image = model.clone()
    image.model_options["transformer_options"]["ar_config"] = {"initial_latent": torch.randn(1, 16, 2, 8, 8)}
    single = empty(14)
    core_start = core_sample(image, single, sampler, sigmas, 1.0, 7)
    start, totals = sample(budget(image, 14.0, "latent frames", "window", 1), single, **CAUSAL)
    facts["start image against core"] = (start - core_start).abs().max().item()
    bounded, totals = sample(budget(image, 9.0, "latent frames", "window", 1), single, **CAUSAL)
    facts["start image kept"] = torch.equal(bounded[:, :, :2], start[:, :, :2])

    memory = importlib.import_module(".accel.kv.memory", pack_module().__name__).KVMemory
    attend, calls = memory.attend, []

    def full(self, *given):
        calls.append(given)
        if len(calls) == 45:
            raise torch.OutOfMemoryError("as a GPU would")
        return attend(self, *given)

    memory.attend = full
    latents["less"], facts["less"] = sample(small, latent, **CAUSAL)
    memory.attend = attend
    facts["less told"] = [line for line in reports if "made again" in line][-1:]
    facts["as much again"] = torch.equal(sample(small, latent, **CAUSAL)[0], latents["window"])

    facts["interrupted"] = interrupted(small, latent, at=9, **CAUSAL | {"cfg": 2.0})
    facts["state after interrupt"] = state_left()
    after, _ = sample(small, latent, **CAUSAL | {"cfg": 2.0})
    facts["after interrupt"] = torch.equal(after, latents["guided window"])
    facts["refusals"] |= {
        "room": refusal(sample, budget(model, 5.0, "latent frames", "window", 1), latent, **CAUSAL),
        "part": refusal(budget, model, 9.5, "latent frames", "window", 1),
        "offload": refusal(budget, model, 9.0, "latent frames", "window", 1, 0, "model", 4),
        "density": refusal(sparse, 0.0),
        "prompt": refusal(sparse, 0.5, collapse_prompt=False, prompt_share=0.5),
        "trained": refusal(budget, model, 9.0, "latent frames", "window", 1, trained_frames=0),
    }
    changed = model.clone()
    attention = model.model.diffusion_model.blocks[0].self_attn
    attention.__dict__["norm_k_moved"], kept = attention._modules.pop("norm_k"), attention._modules.get("norm_k")
    facts["refusals"]["changed core"] = refusal(sample, small, latent, **CAUSAL)
    attention.norm_k = attention.__dict__.pop("norm_k_moved")
    assert changed is not None and kept is None


def other_dtypes(checkpoint: str) -> None:
    """Weights of a dtype that is not the one computed in."""
    options = {"dtype": torch.float8_e4m3fn}
    model, latent = comfy.sd.load_diffusion_model(checkpoint, model_options=options), empty(14)
    facts["weights"] = str(model.model.get_dtype())
    facts["computed in"] = str(model.model.get_dtype_inference())
    latents["fp8"], _ = sample(budget(model, 9.0, "latent frames", "window", 1), latent, **CAUSAL)
    latents["fp8 guided"], _ = sample(model, latent, **CAUSAL | {"cfg": 2.0})
    latents["fp8 core store"], _ = sample(model, latent, **CAUSAL)


def frames_model(checkpoint: str) -> None:
    model = comfy.sd.load_diffusion_model(checkpoint)
    script = node("ARVASegmentPrompt", positive, node("ARVATinyPrompt", "green square")[0], 1)[0]
    latents["told frames"], _ = sample(model, empty(28), positive=script)
    facts["refusals"]["no K/V"] = refusal(sample, budget(model, 9.0, "latent frames", "window", 1), empty(20))
    facts["refusals"]["no history"] = refusal(sample, node("ARVAANNAttention", model, 0.33)[0], empty(20))


if __name__ == "__main__":
    frames_file, causal_file, out = sys.argv[1:]
    against_core(causal_file)
    other_dtypes(causal_file)
    frames_model(frames_file)
    save_file({name: value.contiguous() for name, value in latents.items()}, out)
    print(json.dumps(facts))
