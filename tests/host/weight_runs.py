"""Acceleration on weights that are kept elsewhere or otherwise than as plain tensors, for test_weights.py.

Arguments: the diffusion-forcing checkpoint, the causal one, the folder of custom node packs. Facts go to the last line.

A graphics card that is too small makes core leave weights on the other device and bring them as they are used. On one
CPU both devices are the same, but all else happens as there: core is told how little there is room for, and what it
does then (casting at use, LoRA applied at use) is its own code.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.patcher_extension import CallbacksMP

sys.path.append(str(Path(__file__).parent))
from neighbour_runs import STEPS, lora_file, segments, tried  # noqa: E402
from stock_runs import (
    WAN,
    empty,
    facts,
    ksampler,
    negative,
    node,
    positive,
    random_model,
    refusal,
    scheduled,
    state_left,
)  # noqa: E402

import nodes  # noqa: E402

NOVRAM = 0.1  # what core asks for under --novram
KEPT = {
    "budget": 6.0, "unit": "latent frames", "keep": "window", "sink": 1, "recent": 0, "storage": "model", "offload": 0,
    "trained_frames": 21,
}  # fmt: skip
CAUSAL = {"mode": "causal blocks", "segment": 2, "overlap": 0, "block": 2, "cfg": 1.0}


@contextmanager
def room_for(amount: float) -> Iterator[None]:
    """Core loads models with room for so many bytes of weights."""
    comfy.model_management.unload_all_models()
    loaded = comfy.model_management.LoadedModel
    whole = loaded.model_load
    loaded.model_load = lambda self, memory=0, force_patch_weights=False: whole(self, amount, force_patch_weights)
    try:
        yield
    finally:
        loaded.model_load = whole
        comfy.model_management.unload_all_models()


def left_behind(model) -> list[int]:
    """Layers whose weights are brought as they are used, of all; and LoRA that is applied then."""
    layers = [layer for layer in model.model.modules() if hasattr(layer, "comfy_cast_weights")]
    return [
        sum(layer.comfy_cast_weights for layer in layers), len(layers),
        sum(len(layer.weight_function) for layer in layers),
    ]  # fmt: skip


def with_lora(checkpoint: str):
    plain = comfy.sd.load_diffusion_model(checkpoint)
    file = lora_file(plain, ("ffn.0",))
    return nodes.NODE_CLASS_MAPPINGS["LoraLoaderModelOnly"]().load_lora_model_only(plain, file, 1.0)[0]


def little_room(frames: str, causal: str) -> None:
    """All weights, or half of them, stay on the other device; every way of sampling gives what it gives otherwise."""
    model, blocks = with_lora(frames), with_lora(causal)
    prefix = node("ARVASharedPrefixCache", model, 0.5, "history")[0]
    window = node("ARVAActiveFrameWindow", model, "frozen K/V")[0]
    budget = node("ARVAKVCacheBudget", scheduled(blocks, 0.9, 0.9), **KEPT)[0]
    ways = {
        "KSampler": (model, lambda: ksampler(scheduled(model, 0.9, 0.9), empty(2), steps=STEPS)),
        "shared prefix": (model, lambda: segments(prefix, empty(6))),
        "frozen K/V": (model, lambda: segments(window, empty(6), ar_step=1)),
        "K/V budget": (blocks, lambda: segments(budget, empty(10), **CAUSAL)),
    }
    facts["little room"] = {}
    for name, (given, way) in ways.items():
        whole, told = way(), {"all": left_behind(given)}
        for share, amount in (("none", NOVRAM), ("half", given.model_size() / 2)):
            with room_for(amount):
                made, told[share] = way(), left_behind(given)
            told[f"{share}, error"] = ((made - whole).norm() / whole.norm()).item()
        facts["little room"][name] = told


async def pack(folder: Path) -> bool:
    return folder.is_dir() and await nodes.load_custom_node(str(folder), module_parent="custom_nodes")


def quantized(folder: Path) -> None:
    """A random Wan written as GGUF files and loaded by ComfyUI-GGUF, if it is there."""
    if find_spec("gguf") is None or not asyncio.new_event_loop().run_until_complete(pack(folder)):
        return
    import gguf

    source = random_model(comfy.supported_models.WAN21_T2V, WAN | {"ffn_dim": 512, "text_dim": 4096})
    generator = torch.Generator().manual_seed(4)
    texts = tuple([[torch.randn(1, 8, 4096, generator=generator), {}]] for _ in range(2))
    shown = dict(zip(("positive", "negative"), texts, strict=True))
    whole = ksampler(source, empty(2), steps=STEPS, **shown)
    weights = source.model.diffusion_model.state_dict()
    models = Path(folder_paths.get_folder_paths("diffusion_models")[0])
    models.mkdir(parents=True, exist_ok=True)
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        path = models / f"tiny-{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, "wan")
        for name, weight in weights.items():
            linear = weight.ndim == 2 and name.startswith("blocks.")
            told = kind if linear else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(weight.float().numpy(), told), raw_dtype=told)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (model,) = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(path.name)
        exact = tried(f"GGUF {kind.name}", model, empty(2), **shown)
        facts[f"GGUF {kind.name} against the source"] = ((exact - whole).norm() / whole.norm()).item()
        in_segments(f"GGUF {kind.name}", model, texts)


def in_segments(name: str, model, texts: tuple) -> None:
    """AR Segment Sampler without acceleration, with thresholds of zero, and with frozen K/V and skipped calls."""
    plain = segments(model, empty(6), texts)
    window = node("ARVAActiveFrameWindow", scheduled(model, 0.9, 0.9), "frozen K/V")[0]
    facts[f"{name} in segments"] = [
        torch.equal(segments(scheduled(model, 0.0, 0.0), empty(6), texts), plain),
        segments(window, empty(6), texts, ar_step=1).isfinite().all().item(),
    ]


def swapped(folder: Path) -> None:
    """The block swap pack moves blocks when a model is loaded; its card is this CPU here."""
    if not asyncio.new_event_loop().run_until_complete(pack(folder)):
        return
    swap = nodes.NODE_CLASS_MAPPINGS["wanBlockSwap"]
    sys.modules[swap.__module__].torch = SimpleNamespace(device=lambda name: torch.device("cpu"))
    model = random_model(comfy.supported_models.WAN21_T2V, WAN)
    (behind,) = swap().set_callback(model, 1, True, False, False)
    callbacks = []
    behind.add_callback(CallbacksMP.ON_LOAD, lambda *_: callbacks.append(1))
    plain = ksampler(model, empty(2), steps=STEPS)
    comfy.model_management.unload_all_models()
    exact = tried("block swap", behind, empty(2))
    facts["block swap does not change it"] = torch.equal(plain, exact)
    facts["block swap was called"] = bool(callbacks)
    in_segments("block swap", behind, (positive, negative))


def two_cards(frames: str, causal: str) -> None:
    """Core's MultiGPU CFG Split over two names of the CPU: each guidance branch is computed by a model of its own."""
    cards = [torch.device("cpu"), torch.device("cpu", 0)]
    comfy.model_management.get_all_torch_devices = lambda exclude_current=False: cards
    model, blocks = comfy.sd.load_diffusion_model(frames), comfy.sd.load_diffusion_model(causal)
    split, split_blocks = (node("MultiGPU_WorkUnits", given, 2)[0] for given in (model, blocks))
    facts["copies"] = len(split.get_additional_models_with_key("multigpu"))
    plain = ksampler(model, empty(2), steps=STEPS)
    told = {"KSampler": (plain, tried("two cards", split, empty(2)))}
    fast, split_fast = scheduled(model, 0.9, 0.9), scheduled(split, 0.9, 0.9)
    for name, one, two, changes in (
        ("segments", model, split, {}), ("staircase", fast, split_fast, {"ar_step": 1}),
        ("causal blocks", blocks, split_blocks, CAUSAL),
    ):  # fmt: skip
        told[name] = segments(one, empty(6), **changes), segments(two, empty(6), **changes)
    facts["two cards, error"] = {name: ((two - one).norm() / one.norm()).item() for name, (one, two) in told.items()}
    window = node("ARVAActiveFrameWindow", split_fast, "frozen K/V")[0]
    facts["two cards, refused"] = [
        refusal(segments, window, empty(6), ar_step=1),
        refusal(segments, split_blocks, empty(6), **CAUSAL | {"cfg": 2.0}),
    ]


def main(frames: str, causal: str, packs: str) -> None:
    logging.getLogger().setLevel(logging.ERROR)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    little_room(frames, causal)
    quantized(Path(packs) / "ComfyUI-GGUF")
    swapped(Path(packs) / "ComfyUI-wanBlockswap")
    two_cards(frames, causal)
    facts["nothing outlives it"] = state_left()
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
