"""Runs the pack's nodes inside ComfyUI for test_nodes.py: latents go to OUT, facts to the last line.

Arguments: the diffusion-forcing checkpoint, the causal checkpoint, the file for latents (in the models' space).
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.ldm.wan.model import WanModel
from run_in_comfy import pack_module
from safetensors.torch import save_file

from nodes import NODE_CLASS_MAPPINGS as NODES

TEXT = "red disc, blue square, gravity, pan"
SETTINGS = {
    "seed": 7, "steps": 8, "cfg": 2.0, "mode": "auto", "segment": 16, "overlap": 4, "block": 4, "ar_step": 2,
    "solver": "auto", "shift": 3.0, "history_noise": 0.0,
}  # fmt: skip
CAUSAL = {"cfg": 1.0, "steps": 4, "shift": 0.0}


def node(name: str, *inputs, **named):
    return NODES[name].execute(*inputs, **named)


positive, negative = node("ARVATinyPrompt", TEXT)[0], node("ARVATinyPrompt", "")[0]
latents: dict[str, torch.Tensor] = {}
facts: dict[str, object] = {}
reports: list[str] = []


def empty(frames: int, batch: int = 1) -> dict:
    return node("ARVATinyLatent", frames=frames, width=64, height=64, batch_size=batch)[0]


def sample(model, latent: dict, **changes):
    """Latents in the model's space, and the timeline's totals."""
    shown = changes.pop("positive", positive)
    out, timeline, report = node("ARVASegmentSampler", model, shown, negative, latent, **{**SETTINGS, **changes})
    assert report == timeline.summary()
    reports.extend(report.splitlines())
    return model.model.process_latent_in(out["samples"]), timeline.totals()


def core_sample(model, latent: dict, sampler, sigmas, cfg: float, seed: int) -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    noise = comfy.sample.prepare_noise(latent["samples"], seed)
    with torch.no_grad():
        out = guider.sample(noise, latent["samples"], sampler, sigmas, seed=seed)
    return model.model.process_latent_in(out)


def refusal(function, *inputs, **named) -> str:
    try:
        function(*inputs, **named)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def state_left() -> list[str]:
    """Class names of our per-run objects that are still alive."""
    gc.collect()
    kinds = {"Run", "HostDenoiser", "CausalHostDenoiser", "SegmentSampler", "Progress", "VelocityHistory"}
    package = pack_module().__name__
    return [
        type(thing).__name__
        for thing in gc.get_objects()
        if type(thing).__name__ in kinds and type(thing).__module__.startswith(package)
    ]


def interrupted(model, latent: dict, at: int, **changes) -> bool:
    """Samples, and interrupts when the progress bar reaches ``at``."""

    def hook(value, total, preview, node_id=None):
        if value >= at:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        sample(model, latent, **changes)
    except comfy.model_management.InterruptProcessingException:
        return True
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    return False


def diffusion_forcing(checkpoint: str) -> None:
    model, latent = comfy.sd.load_diffusion_model(checkpoint), empty(20)
    sampling = model.get_model_object("model_sampling")
    sigmas, euler = comfy.samplers.calculate_sigmas(sampling, "simple", 4), comfy.samplers.sampler_object("euler")
    core = core_sample(model, latent, euler, sigmas, 2.0, 7)

    scheduled = node("ARVATriModalScheduler", model, 0.2, 0.9, "log-snr", "2", 0.75, 5, 1, 0.0)[0]
    windowed = node("ARVAActiveFrameWindow", scheduled, "suffix")[0]
    corrected = node("ARVAResidualCorrection", windowed, "sigma_linear")[0]
    latents["full"], facts["full"] = sample(model, latent)
    latents["fast"], facts["fast"] = sample(corrected, latent)
    latents["unipc"], _ = sample(windowed, latent, solver="unipc", cfg=1.0)
    latents["next clip"], _ = sample(windowed, latent, mode="next clip")
    frozen = node("ARVAActiveFrameWindow", scheduled, "frozen K/V", 0.5, "log-signal")[0]
    latents["frozen"], facts["frozen"] = sample(frozen, latent)
    shared = node("ARVASharedPrefixCache", model, 0.1, "history")[0]
    latents["shared prefix"], facts["shared prefix"] = sample(shared, latent)
    chunked = node("ARVAChunkCache", model, 0.2, 0.9, "log-snr", "1, 0", "1", 5, 1, 0.0)[0]
    latents["chunks"], facts["chunks"] = sample(chunked, latent, solver="unipc")
    timed = node("ARVAChunkCache", model, 0.05, 0.05, "timestep", "1, 0", "1", 0, 2, 0.0)[0]
    latents["timed chunks"], facts["timed chunks"] = sample(timed, latent)
    facts["options left"] = sorted(frozen.model_options["transformer_options"])
    several = [[positive[0][0], {}], [positive[0][0].flip(1), {}]]
    part = [[positive[0][0], {"area": (4, 4, 0, 0), "strength": 1.0}]]
    facts["kept K/V refuse"] = [
        refusal(node, "ARVASegmentSampler", frozen, asked, negative, latent, **SETTINGS) for asked in (several, part)
    ]
    history_guidance(model, frozen, latent, part)
    latents["noised history"], _ = sample(model, latent, history_noise=0.05)
    cached = node("ARVAHistoryGuidedCache", model, 10.0, "auto", 5, 2)[0]
    _, facts["history"] = sample(cached, latent)
    off = node("ARVATriModalScheduler", model, 0.0, 0.0, "log-snr", "2", 0.75, 5, 1, 0.0)[0]
    off = node("ARVAHistoryGuidedCache", off, 0.0, "auto", 5, 2)[0]
    facts["off is off"] = torch.equal(sample(off, latent)[0], latents["full"])
    again, totals = sample(corrected, latent)
    facts["second run"] = torch.equal(again, latents["fast"]) and totals["calls"] == facts["fast"]["calls"]
    facts["nodes keep the model"] = "arva_acceleration" not in model.model_options["transformer_options"]

    facts["interrupted"] = interrupted(corrected, latent, at=9)
    facts["state after interrupt"] = state_left()
    facts["patches after interrupt"] = list(corrected.object_patches) + list(model.object_patches)
    facts["sampling restored"] = model.get_model_object("model_sampling") is sampling
    facts["after interrupt"] = torch.equal(sample(corrected, latent)[0], latents["fast"])
    facts["core after ours"] = torch.equal(core_sample(model, latent, euler, sigmas, 2.0, 7), core)

    facts["last tick"], facts["previews"] = progress_of(lambda: sample(corrected, latent))
    limited = [[positive[0][0], {"start_percent": 0.0, "end_percent": 0.5}]]
    limited += [[positive[0][0], {"start_percent": 0.5, "end_percent": 1.0}]]
    out = node("ARVASegmentSampler", model, limited, negative, latent, **SETTINGS)[0]["samples"]
    facts["prompt ranges"] = (model.model.process_latent_in(out) - latents["full"]).abs().max().item()
    shifted_window(model)
    refusals(model, latent)


@contextmanager
def one_forward_a_branch(model):
    """Core finds that no two branches fit into memory together."""
    kind = type(model.model)
    before = kind.memory_required
    kind.memory_required = lambda *inputs, **named: 1e18
    try:
        yield
    finally:
        kind.memory_required = before


def history_guidance(model, frozen, latent: dict, part: list) -> None:
    """The same as one batch, as one forward a branch (as core does where memory is short), and beside somebody else's
    wrapper of the forward, which still gets every forward."""
    on, key = {"history_guidance": 1.0}, comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    latents["history guidance"], facts["history guidance"] = sample(model, latent, **on)
    latents["history guidance in part"], _ = sample(model, latent, history_guidance=0.4)
    latents["history guidance in part, next clip"], _ = sample(model, latent, mode="next clip", history_guidance=0.4)
    latents["history guidance, next clip"], _ = sample(model, latent, mode="next clip", **on)
    latents["history guidance, frozen"], facts["history guidance, frozen"] = sample(frozen, latent, **on)
    facts["history guidance off is off"] = torch.equal(sample(model, latent, history_guidance=0.0)[0], latents["full"])
    seen: list[int] = []

    def watching(executor, *inputs, **named):
        seen.append(len(inputs[0]))
        return executor(*inputs, **named)

    watched = model.clone()
    watched.add_wrapper_with_key(key, "somebody else", watching)
    with one_forward_a_branch(model):
        single, totals = sample(watched, latent, **on)
    facts["history guidance, one by one"] = (single - latents["history guidance"]).abs().max().item()
    facts["history guidance, forwards"] = [sorted(set(seen)), len(seen), totals["iterations"]]
    facts["history guidance leaves"] = sorted(model.model_options["transformer_options"])
    sample(model, empty(16), **on)
    told = [line for line in reports if line.startswith("history guidance")]
    facts["history guidance told"] = [told[0], told[-1]]
    facts["history guidance refuses"] = refusal(
        node, "ARVASegmentSampler", model, part, negative, latent, **SETTINGS, **on
    )


def progress_of(function) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """The last value and total of the progress bar, and the sizes of the previews, while ``function`` runs."""
    ticks, sizes, keep = [], [], args.preview_method
    args.preview_method = LatentPreviewMethod.Latent2RGB

    def hook(value, total, preview, node_id=None):
        ticks.append((value, total))
        if preview is not None:
            sizes.append(preview[1].size)

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        function()
    finally:
        args.preview_method = keep
        comfy.utils.set_progress_bar_global_hook(None)
    return ticks[-1], sizes


def shifted_window(model) -> None:
    """A window that starts inside the segment sees the positions it has there: attention is invariant to a shift of
    all positions together, so the velocity may not change, and the rope option must be gone after."""
    denoisers = importlib.import_module(".nodes.host_denoiser", pack_module().__name__)
    calls = importlib.import_module(".accel.call", pack_module().__name__)
    answers = []

    class Probe(comfy.samplers.Sampler):
        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, *rest):
            denoiser = denoisers.HostDenoiser(guider, extra_args, noise)
            for start in (0, 4):
                call = calls.Call(
                    calls.Kind.DENOISE, 0, 0, (start, start + 8), (0.5,) * 8, (1,) * 8, (True,) * 8, total_steps=1
                )
                seen = []
                guider.inner_model.diffusion_model.rope_encode = spy(guider.inner_model.diffusion_model, seen)
                try:
                    answers.append((denoiser.velocity(call, noise[:, :, :8]), seen))
                finally:
                    del guider.inner_model.diffusion_model.rope_encode
            facts["rope options left"] = extra_args["model_options"]["transformer_options"].get("rope_options")
            return noise

    patched = model.clone()
    patched.add_object_patch("model_sampling", denoisers.per_frame_sampling(model.get_model_object("model_sampling")))
    core_sample(patched, empty(20), Probe(), torch.tensor([1.0, 0.0]), 1.0, 3)
    (first, _), (second, seen) = answers
    facts["window shift"] = [(first - second).abs().max().item(), seen]


def spy(network: WanModel, seen: list) -> object:
    def rope_encode(*inputs, **named):
        seen.append(named["transformer_options"].get("rope_options", {}).get("shift_t", 0.0))
        return WanModel.rope_encode(network, *inputs, **named)

    return rope_encode


def refusals(model, latent: dict) -> None:
    def sampler(model=model, latent=latent, **changes) -> str:
        return refusal(sample, model, latent, **changes)

    def stub(network) -> SimpleNamespace:
        return SimpleNamespace(
            model=SimpleNamespace(diffusion_model=network, latent_format=SimpleNamespace(latent_channels=16)),
            get_model_object=model.get_model_object, model_options={},
        )  # fmt: skip

    image_model = WanModel("i2v", in_dim=36, dim=12, ffn_dim=12, num_heads=1, num_layers=1, operations=torch.nn)
    identity = stub(torch.nn.Identity())
    mask = latent | {"noise_mask": torch.ones(1, 64, 64)}
    facts["refusals"] = {
        "4-D latent": sampler(latent={"samples": torch.zeros(1, 16, 8, 8)}),
        "noise mask": sampler(latent=mask),
        "channels": sampler(latent={"samples": torch.ones(1, 4, 20, 8, 8)}),
        "image model": refusal(node, "ARVASegmentSampler", identity, positive, negative, latent, **SETTINGS),
        "i2v model": refusal(node, "ARVASegmentSampler", stub(image_model), positive, negative, latent, **SETTINGS),
        "block": sampler(latent=empty(22)),
        "segment": sampler(segment=18),
        "overlap": sampler(overlap=16),
        "re-noise": sampler(solver="re-noise"),
        "causal": sampler(mode="causal blocks"),
        "sigmas": sampler(sigmas=torch.tensor([1.0, 0.5, 0.1])),
        "rising sigmas": sampler(sigmas=torch.tensor([0.5, 1.0, 0.0])),
        "history noise": sampler(history_noise=1.0),
        "too much history guidance": sampler(history_guidance=1.5),
        "history guidance": sampler(history_guidance=1.0, cfg=1.0),
        "thresholds": refusal(node, "ARVATriModalScheduler", model, 0.7, 0.6, "log-snr", "2", 0.75, 5, 1, 0.0),
        "decay": refusal(node, "ARVATriModalScheduler", model, 0.0, 0.6, "log-snr", "1", 0.0, 5, 1, 0.0),
        "threshold": refusal(node, "ARVAHistoryGuidedCache", model, -1.0, "auto", 5, 2),
        "warmup": refusal(node, "ARVAHistoryGuidedCache", model, 0.1, "auto", 5, 0),
        "source": refusal(node, "ARVAResidualCorrection", model, "nothing"),
    }  # fmt: skip


def causal_blocks(checkpoint: str) -> None:
    model, latent = comfy.sd.load_diffusion_model(checkpoint), empty(14, batch=2)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    sampler = node("SamplerARVideo", 4)[0]
    core = core_sample(model, latent, sampler, sigmas, 1.0, 7)
    ours, facts["causal"] = sample(model, latent, **CAUSAL)
    facts["causal against core"] = (ours - core).abs().max().item()
    given, _ = sample(model, latent, **CAUSAL, sigmas=sigmas)
    facts["causal sigmas against core"] = (given - core).abs().max().item()
    latents["euler"], _ = sample(model, latent, **CAUSAL | {"steps": 8}, solver="euler")
    guided = node("ARVATriModalScheduler", model, 0.3, 2.0, "log-snr", "2", 0.75, 5, 1, 0.0)[0]
    latents["fast euler"], facts["fast euler"] = sample(guided, latent, **CAUSAL | {"steps": 16}, solver="euler")
    latents["fast re-noise"], facts["fast re-noise"] = sample(guided, latent, **CAUSAL | {"steps": 16})

    image = model.clone()
    image.model_options["transformer_options"]["ar_config"] = {"initial_latent": torch.randn(1, 16, 2, 8, 8)}
    single = empty(14)
    with_start, totals = sample(image, single, **CAUSAL)
    core_start = core_sample(image, single, sampler, sigmas, 1.0, 7)
    facts["start image against core"] = (with_start - core_start).abs().max().item()
    facts["start image calls"] = totals["calls"]

    facts["causal interrupted"] = interrupted(guided, latent, at=7, **CAUSAL)
    facts["causal state after interrupt"] = state_left()
    facts["ar_state left"] = "ar_state" in guided.model_options["transformer_options"]
    facts["causal after interrupt"] = torch.equal(sample(model, latent, **CAUSAL)[0], ours)
    facts["core causal after ours"] = torch.equal(core_sample(model, latent, sampler, sigmas, 1.0, 7), core)
    unreadable = node("ARVATriModalScheduler", model, 0.0, 0.6, "history-mod", "1", 0.75, 5, 1, 0.0)[0]
    facts["refusals"] |= {
        "unipc": refusal(sample, model, latent, **CAUSAL, solver="unipc"),
        "causal history guidance": refusal(sample, model, latent, **CAUSAL, history_guidance=1.0),
        "causal history guidance in part": refusal(
            sample, model, latent, **CAUSAL | {"cfg": 2.0}, history_guidance=0.5
        ),
        "history signal": refusal(sample, unreadable, latent, **CAUSAL),
    }


if __name__ == "__main__":
    frames_file, causal_file, out = sys.argv[1:]
    diffusion_forcing(frames_file)
    causal_blocks(causal_file)
    save_file({name: value.contiguous() for name, value in latents.items()}, out)
    print(json.dumps(facts))
