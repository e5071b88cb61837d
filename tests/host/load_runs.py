"""Loads model files through Load AR Video Model inside ComfyUI, for test_load.py: outputs go to OUT, facts to the last
line.

Arguments: a JSON file with what to do, the file for tensors.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections import Counter
from pathlib import Path

import comfy.samplers
import comfy.sd
import folder_paths
import torch
from run_in_comfy import pack_module
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
from node_runs import core_sample, empty, node, refusal, sample  # noqa: E402

from nodes import NODE_CLASS_MAPPINGS as NODES  # noqa: E402

CAUSAL = {"cfg": 1.0, "steps": 2, "shift": 0.0, "block": 3}
out: dict[str, torch.Tensor] = {}
facts: dict[str, object] = {}
latent = empty(6)


def load(name: str, family: str = "auto", fps: str = "24", weight_dtype: str = "default"):
    """Model and report."""
    return node("ARVALoadModel", name, family, fps, weight_dtype).args


def core(name: str, weight_dtype: str = "default"):
    return NODES["UNETLoader"]().load_unet(name, weight_dtype)[0]


def told(model) -> dict[str, object]:
    network = model.model.diffusion_model
    return {"class": type(model.model).__name__, "network": type(network).__name__, "dim": network.dim,
            "shift": model.model.model_sampling.shift}  # fmt: skip


@torch.no_grad()
def forward(model, x: torch.Tensor, levels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The network itself, a noise level per latent frame."""
    return model.model.diffusion_model.float()(x, 1000.0 * levels, text)


def block_by_block(model) -> torch.Tensor:
    """Core's own causal sampler with sigmas that are the same for every shift."""
    return core_sample(model, latent, node("SamplerARVideo", 3)[0], torch.tensor([1.0, 0.7, 0.0]), 1.0, 5)


def with_lora(model, file: str):
    return comfy.sd.load_lora_for_models(model, None, load_file(file), 0.7, 0.0)[0]


def damaged(file: str, count: int) -> dict[str, int]:
    """What becomes of a file with flipped bits, mostly near its start, or cut off somewhere."""
    source = Path(folder_paths.get_full_path("diffusion_models", file))
    whole, chance, outcomes = source.read_bytes(), random.Random(5), Counter()
    target = source.with_name(f"damaged{source.suffix}")
    for number in range(count):
        data = bytearray(whole)
        if number % 3 == 0:
            data = data[: chance.randrange(len(data))]
        for _ in range(1 + number % 4) if data else ():
            data[chance.randrange(len(data) if number % 2 else min(len(data), 8000))] ^= 1 << chance.randrange(8)
        target.write_bytes(data)
        folder_paths.filename_list_cache.clear()
        try:
            load(target.name, "Self-Forcing")
            outcomes["loaded"] += 1
        except ValueError as error:
            told = str(error)
            fine = told.startswith("Load AR Video Model: damaged") and told.endswith(".") and "\n" not in told
            outcomes["refused" if fine else told] += 1
        except Exception as error:
            outcomes[f"{type(error).__name__}: {error}"] += 1
    target.unlink()
    return dict(outcomes)


def main(plan: dict) -> None:
    x, levels, text = (load_file(plan["inputs"])[name] for name in ("x", "levels", "text"))
    for name, file, fps in plan["frames"]:
        model, facts[f"{name} {fps}"] = load(file, fps=fps)
        out[f"{name} {fps}"] = forward(model, x, levels, text)
        facts[name] = told(model)
    reference = core(plan["reference"])
    out["core"], facts["core"] = block_by_block(reference), told(reference)
    for name, file, family in plan["causal"]:
        model, facts[f"{name} report"] = load(file, family)
        out[name], facts[name] = block_by_block(model), told(model)
    ours = load(plan["reference"])[0]
    for name, model in (("core", reference), ("ours", ours)):
        out[f"{name} lora"] = block_by_block(with_lora(model, plan["lora"]))
    out["ours after lora"] = block_by_block(ours)
    for name, model in (("core", core(plan["reference"], "fp8_e4m3fn")), ("ours", load(plan["raw"], "Self-Forcing",
                        weight_dtype="fp8_e4m3fn")[0])):  # fmt: skip
        facts[f"{name} fp8"] = str(model.model.get_dtype())
        out[f"{name} fp8"], _ = sample(model, latent, **CAUSAL)
    for name, file in plan["sampled"].items():
        out[f"sampled {name}"], facts[f"sampled {name}"] = sample(load(file, fps="16")[0], empty(8), **plan["settings"])
    again, inputs = ours.cached_patcher_init
    facts["path first"] = inputs[0] == folder_paths.get_full_path("diffusion_models", plan["reference"])
    for dynamic in (True, False):
        same = again(*inputs, disable_dynamic=not dynamic)
        one, other = (model.model.diffusion_model.state_dict() for model in (same, ours))
        facts[f"again {dynamic}"] = all(torch.equal(one[key], other[key]) for key in other)
    reloaded = load(plan["warped"], "CausVid")[0]
    facts["shift again"] = reloaded.cached_patcher_init[0](*reloaded.cached_patcher_init[1]).model.model_sampling.shift
    tiny, facts["tiny report"] = load("tiny-df.safetensors")
    files = importlib.import_module(".nodes.host_files", pack_module().__name__)
    facts["tiny"] = (files.embedded_model(tiny) or [None])[0]
    facts["damaged"] = {file: damaged(file, 60) for file in (plan["reference"], plan["bare"])}
    facts["refusals"] = {name: refusal(load, *given) for name, given in plan["refusals"].items()}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    save_file({name: value.float().contiguous() for name, value in out.items()}, sys.argv[2])
    print(json.dumps(facts))
