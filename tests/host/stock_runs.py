"""Core's own samplers on accelerated models inside ComfyUI, for test_stock_samplers.py; facts go to the last line.

Arguments: the diffusion-forcing checkpoint, the causal checkpoint.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import sys

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from run_in_comfy import pack_module

from nodes import NODE_CLASS_MAPPINGS as NODES
from nodes import common_ksampler

STEPS, SEED = 6, 5
TWINS = ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde_gpu", "dpmpp_sde_gpu", "ddim")  # same function
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 2,
    "text_dim": 64, "in_dim": 16, "out_dim": 16,
}  # fmt: skip
COUNTED = comfy.patcher_extension.WrappersMP.PREDICT_NOISE, comfy.patcher_extension.WrappersMP.APPLY_MODEL

facts: dict[str, object] = {}
finished = importlib.import_module(".nodes.host_runs", pack_module().__name__)


def node(name: str, *inputs, **named):
    return NODES[name].execute(*inputs, **named)


positive, negative = node("ARVATinyPrompt", "red disc, blue square, gravity, pan")[0], node("ARVATinyPrompt", "")[0]


def empty(frames: int, batch: int = 1, size: int = 4) -> dict:
    return {"samples": torch.zeros(batch, 16, frames, size, size)}


def scheduled(model, cache: float = 0.3, predict: float = 1.5, signal: str = "log-snr", **named):
    options = {"order": "1", "decay": 0.75, "max_skip": 5, "warmup": 1, "reach": 0.0} | named
    return node("ARVATriModalScheduler", model, cache, predict, signal, **options)[0]


def ksampler(
    model, latent: dict, sampler: str = "euler", cfg: float = 2.0, steps: int = STEPS, **named
) -> torch.Tensor:
    shown, hidden = named.pop("positive", positive), named.pop("negative", negative)
    return common_ksampler(model, SEED, steps, cfg, sampler, "simple", shown, hidden, latent, **named)[0]["samples"]


def custom(model, latent: dict, sampler, sigmas: torch.Tensor, guider=None) -> torch.Tensor:
    guider = guider or node("BasicGuider", model, positive)[0]
    return node("SamplerCustomAdvanced", node("RandomNoise", SEED)[0], guider, sampler, sigmas, latent)[0]["samples"]


def counted(model):
    """A clone of ``model`` that counts guided calls and forwards, as seen from outside."""
    clone, counts = model.clone(), [0, 0]
    for index, place in enumerate(COUNTED):

        def count(executor, *inputs, index=index, **named):
            counts[index] += 1
            return executor(*inputs, **named)

        clone.add_wrapper(place, count)
    return clone, counts


def last():
    return finished._runs[-1].timeline


def decisions(timeline) -> list[str]:
    return [record.decision for record in timeline.records]


def refusal(function, *inputs, **named) -> str:
    try:
        function(*inputs, **named)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was refused"


def state_left() -> list[str]:
    """Class names of our per-run objects that are still alive."""
    gc.collect()
    kinds = {"Run", "StockRun", "Stream", "Branches", "WanInside", "VelocityHistory"}
    package = pack_module().__name__
    return [
        type(thing).__name__
        for thing in gc.get_objects()
        if type(thing).__name__ in kinds and type(thing).__module__.startswith(package)
    ]


def every_sampler(model, latent: dict) -> None:
    off, fast = scheduled(model, 0.0, 0.0), scheduled(model, 0.3, 1.5)
    facts["samplers"] = {}
    for name in comfy.samplers.SAMPLER_NAMES:
        if name == "dpm_adaptive" or name in TWINS:
            continue
        plain, counts = counted(model)
        exact = ksampler(plain, latent, name)
        same = torch.equal(ksampler(off, latent, name), exact)
        run, spent = counted(fast)
        ksampler(run, latent, name)
        timeline = last()
        facts["samplers"][name] = {
            "off is off": same, "full": counts, "accelerated": spent,
            "decisions": decisions(timeline), "sampler": timeline.settings.get("sampler"),
        }  # fmt: skip
    facts["adaptive"] = refusal(ksampler, fast, latent, "dpm_adaptive")


def unknown_sampler(model, latent: dict) -> None:
    """A sampler function that nobody knows, that takes Euler steps."""

    def sample_of_another_pack(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            denoised = model(x, now * x.new_ones(len(x)), **extra_args)
            x = x + (x - denoised) / now * (after - now)
        return x

    custom(scheduled(model), latent, comfy.samplers.KSAMPLER(sample_of_another_pack), levels(model, STEPS))
    facts["unknown"] = [decisions(last()), last().settings["sampler"]]

    class Trainer(comfy.samplers.Sampler):
        """A sampler object of another kind, such as core's trainer."""

    facts["another kind"] = refusal(custom, scheduled(model), latent, Trainer(), levels(model, STEPS))


def levels(model, steps: int) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def prompts_of_segments(model, latent: dict) -> None:
    """Core's samplers, accelerated or not, stop at prompts of later segments; ours gives them their areas back."""
    other = node("ARVATinyPrompt", "green square, blue disc")[0]
    part = [[text, options | {"area": ("percentage", 1.0, 1.0, 0.5, 0.0, 0.0, 0.0)}] for text, options in other]
    script, partly = (node("ARVASegmentPrompt", positive, text, 1)[0] for text in (other, part))
    facts["segment prompts"] = [
        refusal(ksampler, given, latent, positive=script) for given in (model, scheduled(model))
    ] + [refusal(ksampler, model, latent, negative=node("ARVASegmentPrompt", script, other, 3)[0])]
    settings = {
        "seed": SEED, "steps": 4, "cfg": 1.0, "mode": "diffusion forcing", "segment": 4, "overlap": 2, "block": 2,
        "ar_step": 0, "solver": "euler", "shift": 3.0, "history_noise": 0.0,
    }  # fmt: skip
    whole, areas, plain = (
        node("ARVASegmentSampler", model, text, negative, empty(6, size=8), **settings)[0]["samples"]
        for text in (script, partly, positive)
    )
    facts["segment prompts, areas"] = [
        torch.equal(whole[:, :, :4], areas[:, :, :4]), torch.equal(whole[:, :, 4:], areas[:, :, 4:]),
        torch.equal(plain[:, :, 4:], areas[:, :, 4:]),
    ]  # fmt: skip


def like_the_segment_sampler(model, latent: dict) -> None:
    """One segment, all frames at once, Euler, the positive branch alone: both samplers follow the same rules."""
    sigmas = levels(model, 10)
    chosen = {
        "tri-modal": scheduled(model, 0.2, 0.9),
        "corrected": node("ARVAResidualCorrection", scheduled(model, 0.9, 0.9), "sigma_linear")[0],
        "history": node("ARVAHistoryGuidedCache", model, 0.3, "auto", 5, 2)[0],
        "timestep": scheduled(model, 0.1, 0.3, "timestep"),
        "latent": scheduled(model, 0.2, 0.6, "latent"),
    }
    facts["like ours"] = {}
    for name, given in chosen.items():
        core = custom(given, latent, comfy.samplers.sampler_object("euler"), sigmas)
        theirs = decisions(last())
        settings = {
            "seed": SEED, "steps": 10, "cfg": 1.0, "mode": "diffusion forcing", "segment": 8, "overlap": 0, "block": 8,
            "ar_step": 0, "solver": "euler", "shift": 0.0, "history_noise": 0.0, "sigmas": sigmas,
        }  # fmt: skip
        ours, timeline, _ = node("ARVASegmentSampler", given, positive, negative, latent, **settings)
        difference = (core - ours["samples"]).abs().max().item()
        facts["like ours"][name] = [difference, theirs, decisions(timeline)]


def guiders(model, latent: dict) -> None:
    """Held is what comes before guidance, so functions behind it still act: with held outputs as with true ones."""
    fast, sigmas = scheduled(model, 0.9, 0.9), levels(model, 8)
    euler = comfy.samplers.sampler_object("euler")

    def dual(given):
        return node("DualCFGGuider", given, positive, negative, negative, 2.0, 1.5, "regular")[0]

    def two(given):
        return node("DualModelGuider", given, positive, 2.0, given, negative)[0]

    def cfg(given):
        return node("CFGGuider", given, positive, negative, 2.0)[0]

    facts["guiders"] = {}
    for name, make in {"CFGGuider": cfg, "DualCFGGuider": dual, "DualModelGuider": two}.items():
        exact = custom(model, latent, euler, sigmas, make(model))
        off = custom(model, latent, euler, sigmas, make(scheduled(model, 0.0, 0.0)))
        run, counts = counted(fast)
        held = custom(model, latent, euler, sigmas, make(run))
        error = ((held - exact).norm() / exact.norm()).item()
        facts["guiders"][name] = [torch.equal(exact, off), decisions(last()), counts, error]
    changed = custom(model, latent, euler, sigmas, cfg(node("CFGZeroStar", fast)[0]))
    facts["guidance acts on held outputs"] = not torch.equal(changed, custom(model, latent, euler, sigmas, cfg(fast)))


def conditions(model, latent: dict) -> None:
    """Conditionings that begin or end while sampling: what was stored before answers another question."""
    fast = scheduled(model, 9.0, 9.0, max_skip=100)
    halves = [[positive[0][0], {"start_percent": 0.0, "end_percent": 0.5}]]
    halves += [[negative[0][0], {"start_percent": 0.5, "end_percent": 1.0}]]
    ksampler(fast, latent, steps=8)
    facts["one prompt"] = decisions(last())
    ksampler(fast, latent, steps=8, positive=halves)
    facts["two halves"] = [decisions(last()), last().settings.get("conditioning")]
    hooked = comfy.hooks.create_hook_lora({}, 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.2, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength, start_percent=start))
    hooked.set_keyframes_on_hooks(frames)
    ksampler(fast, latent, steps=8, positive=[[positive[0][0], {"hooks": hooked}]])
    facts["hook keyframes"] = decisions(last())
    half_cfg = node("CFGOverride", fast, 1.0, 0.5, 1.0)[0]
    ksampler(half_cfg, latent, steps=8)
    facts["half cfg"] = decisions(last())
    part = [[positive[0][0], {"area": (2, 2, 0, 0), "strength": 1.0}], positive[0]]
    exact = ksampler(model, latent, steps=8, positive=part)
    facts["area off"] = torch.equal(ksampler(scheduled(model, 0.0, 0.0), latent, steps=8, positive=part), exact)
    ksampler(scheduled(model, 0.9, 0.9), latent, steps=8, positive=part)
    facts["area"] = decisions(last())


def end_of_a_run(model, latent: dict) -> None:
    fast = scheduled(model)
    before = ksampler(fast, latent)
    facts["again"] = torch.equal(ksampler(fast, latent), before)

    def stop(executor, *inputs, **named):
        if counts[0] >= 4:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()
        return executor(*inputs, **named)

    cancelled, counts = counted(fast)
    cancelled.add_wrapper(COUNTED[1], stop)
    runs = len(finished._runs)
    try:
        ksampler(cancelled, latent)
        facts["cancelled"] = False
    except comfy.model_management.InterruptProcessingException:
        facts["cancelled"] = True
    finally:
        comfy.model_management.interrupt_current_processing(False)
    facts["state after cancel"] = state_left()
    facts["no timeline of a cancelled run"] = len(finished._runs) == runs
    facts["after cancel"] = torch.equal(ksampler(fast, latent), before)
    facts["options"] = sorted(fast.model_options["transformer_options"])
    facts["wrappers"] = {place: sorted(map(str, keys)) for place, keys in fast.wrappers.items() if keys}
    plain = node("ARVAAccelerate", fast, "exact")[0]
    facts["exact leaves nothing"] = [
        "arva_acceleration" in plain.model_options["transformer_options"],
        [place for place, keys in plain.wrappers.items() if any(keys.values())],
    ]
    other = ksampler(fast, empty(3, batch=2, size=6))
    facts["other shape"] = list(other.shape)
    facts["after another shape"] = torch.equal(ksampler(fast, latent), before)


def run_timeline(model, latent: dict) -> None:
    first = common_ksampler(scheduled(model), 1, STEPS, 2.0, "euler", "simple", positive, negative, latent)[0]
    told = last()
    second = common_ksampler(scheduled(model), 2, STEPS, 2.0, "euler", "simple", positive, negative, latent)[0]
    facts["found"] = [finished.run_of(first, None, None) is told, finished.run_of(second, None, None) is last()]
    changed = {"samples": first["samples"] + 1}
    facts["not found"] = finished.run_of(changed, None, None)
    kept = [type(value).__name__ for run in finished._runs for value in (run.latent, run.asked, run.timeline)]
    facts["kept"] = sorted(set(kept))


def other_models(model, latent: dict) -> None:
    """Flow models whose inside is not known here, and one that is no flow model."""
    tiny = {
        "HunyuanVideo": (
            comfy.supported_models.HunyuanVideo,
            {
                "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2],
                "vec_in_dim": 32, "axes_dim": [16, 56, 56], "meanflow": False, "context_in_dim": 32,
                "hidden_size": 128, "mlp_ratio": 2.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 1,
                "theta": 256, "qkv_bias": True, "byt5": False, "guidance_embed": True, "use_cond_type_embedding": False,
                "vision_in_dim": None, "meanflow_sum": False,
            },
            (1, 16, 3, 4, 4), 32,
        ),
        "LTXV": (
            comfy.supported_models.LTXV,
            {
                "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 64, "attention_head_dim": 32,
                "num_attention_heads": 2, "caption_channels": 32, "num_layers": 2,
            },
            (1, 128, 3, 4, 4), 32,
        ),
    }  # fmt: skip
    facts["models"] = {}
    for name, (kind, config, shape, width) in tiny.items():
        given = random_model(kind, config)
        words = torch.randn(1, 6, width, generator=torch.Generator().manual_seed(3))
        options = (
            {"attention_mask": torch.ones(1, 6, dtype=torch.long)} if name == "LTXV" else {"pooled_output": words[:, 0]}
        )
        shown, hidden = ([[each, options]] for each in (words, words.flip(1)))
        prompts = {"positive": shown, "negative": hidden}
        start = {"samples": torch.zeros(shape)}
        exact = ksampler(given, start, steps=8, **prompts)
        told = {"off": torch.equal(ksampler(scheduled(given, 0.0, 0.0), start, steps=8, **prompts), exact)}
        chosen = {
            "tri-modal": scheduled(given, 0.2, 0.9), "timestep": scheduled(given, 0.2, 0.6, "timestep"),
            "history": node("ARVAHistoryGuidedCache", given, 0.4, "auto", 5, 2)[0],
        }  # fmt: skip
        for label, model_given in chosen.items():
            run, counts = counted(model_given)
            held = ksampler(run, start, steps=8, **prompts)
            told[label] = {
                "decisions": decisions(last()), "counts": counts, "signal": last().settings.get("signal"),
                "error": ((held - exact).norm() / exact.norm()).item(), "finite": bool(held.isfinite().all()),
                "report": last().summary(),
            }  # fmt: skip
        facts["models"][name] = told
    (eps,) = NODES["ModelSamplingDiscrete"]().patch(model, "eps", False)
    facts["no flow"] = refusal(ksampler, scheduled(eps), latent)


def random_model(kind, config: dict):
    """A model of core's own classes with small random weights."""
    description = kind(config)
    description.set_inference_dtype(torch.float32, None)
    model = description.get_model({}, device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.diffusion_model.named_parameters():
            scale = 0.3 if "scale_shift" in name or weight.ndim < 2 else weight.shape[-1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def causal(checkpoint: str) -> None:
    model, latent = comfy.sd.load_diffusion_model(checkpoint), empty(10)
    sigmas, sampler = levels(model, 8), node("SamplerARVideo", 4)[0]
    exact = custom(model, latent, sampler, sigmas)
    off = custom(scheduled(model, 0.0, 0.0), latent, sampler, sigmas)
    facts["causal off"] = [torch.equal(exact, off), decisions(last())]
    fast = scheduled(model, 0.8, 2.0)
    run, counts = counted(fast)
    held = custom(run, latent, sampler, sigmas)
    facts["causal"] = [counts, [[r.segment, r.decision, list(r.frames)] for r in last().records]]
    facts["causal report"] = last().summary()
    settings = {
        "seed": SEED, "steps": 8, "cfg": 1.0, "mode": "causal blocks", "segment": 16, "overlap": 4, "block": 4,
        "ar_step": 0, "solver": "re-noise", "shift": 0.0, "history_noise": 0.0, "sigmas": sigmas,
    }  # fmt: skip
    ours, timeline, _ = node("ARVASegmentSampler", fast, positive, negative, latent, **settings)
    facts["causal like ours"] = [(held - ours["samples"]).abs().max().item(), decisions(timeline)]
    image = fast.clone()
    start = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    image.model_options["transformer_options"]["ar_config"] = {"initial_latent": start}
    held = custom(image, latent, sampler, sigmas)
    facts["start image"] = [decisions(last())[:2], [list(r.frames) for r in last().records][:2]]
    ours, _, _ = node("ARVASegmentSampler", image, positive, negative, latent, **settings)
    facts["start image like ours"] = (held - ours["samples"]).abs().max().item()
    facts["causal euler off"] = torch.equal(ksampler(model, latent), ksampler(scheduled(model, 0.0, 0.0), latent))
    facts["elsewhere"] = refusal(custom, node("ARVAKVCacheBudget", model, 8.0, "latent frames", "window", 1)[0], latent,
                                 sampler, sigmas)  # fmt: skip
    facts["chunks"] = refusal(
        ksampler, node("ARVAChunkCache", model, 0.2, 0.9, "log-snr", "1, 0", "1", 5, 1, 0.0)[0], latent
    )


def main(frames_file: str, causal_file: str) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    model, latent = comfy.sd.load_diffusion_model(frames_file), empty(2)
    every_sampler(random_model(comfy.supported_models.WAN21_T2V, WAN), latent)
    unknown_sampler(model, latent)
    like_the_segment_sampler(model, empty(8))
    guiders(model, latent)
    conditions(model, latent)
    prompts_of_segments(model, latent)
    end_of_a_run(model, latent)
    run_timeline(model, latent)
    other_models(model, latent)
    facts["targets"] = [
        refusal(ksampler, node("ARVAAccelerate", model, "target", 35.0)[0], latent),
        refusal(ksampler, node("ARVAAccelerate", model, "target", 35.0)[0], latent, cfg=1.0),
    ]
    causal(causal_file)
    facts["state at the end"] = state_left()
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
