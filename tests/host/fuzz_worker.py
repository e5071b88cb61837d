"""Executes fuzz cases inside ComfyUI's process for fuzz_host.py: JSON lines in, JSON lines out.

Arguments: the diffusion-forcing checkpoint and the causal one. The first line out describes the pack's nodes by their
own schemas. A case is ``{"node", "inputs"}``; values that JSON cannot hold are dicts with the key ``$`` (``VALUES``).
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.nested_tensor
import comfy.sd
import folder_paths
import torch
from comfy.ldm.wan.model import WanModel
from run_in_comfy import pack_module

from nodes import NODE_CLASS_MAPPINGS as NODES

PACK = pack_module().__name__
MOST = 10**8
OUTPUT, TEMP = Path(folder_paths.get_output_directory()), Path(folder_paths.get_temp_directory())
BASE = OUTPUT.parent
OURS = {name: node for name, node in NODES.items() if node.__module__.startswith(PACK)}
TITLES = {name: node.define_schema().display_name for name, node in OURS.items()}
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what nodes print is no answer


class Reached(Exception):
    """The inputs passed every check and the model was about to run."""


class Weird:
    """Something that no node expects."""

    def __repr__(self) -> str:
        return "<weird>"


def ours(name: str) -> Any:
    return importlib.import_module(name, PACK)


FILL = {
    "randn": lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(1)), "zeros": torch.zeros,
    "half": lambda shape: torch.full(shape, 0.5), "huge": lambda shape: torch.full(shape, 3e38),
    "nan": lambda shape: spoiled(shape, math.nan), "inf": lambda shape: spoiled(shape, math.inf),
}  # fmt: skip


def spoiled(shape: list[int], value: float) -> torch.Tensor:
    tensor = torch.zeros(shape)
    tensor.view(-1)[-1:] = value
    return tensor


def tensor(spec: dict) -> torch.Tensor:
    if "values" in spec:
        made = torch.tensor(spec["values"], dtype=torch.float64)
    elif spec.get("wide"):
        made = torch.zeros([1] * len(spec["shape"])).expand(spec["shape"])
    else:
        made = FILL[spec.get("fill", "zeros")](spec["shape"])
    return made.to(getattr(torch, spec.get("dtype", "float32")))


def model(spec: dict) -> Any:
    kind = spec["kind"]
    if kind == "image":
        network = WanModel("i2v", in_dim=36, dim=12, ffn_dim=12, num_heads=1, num_layers=1, operations=torch.nn)
    else:
        network = torch.nn.Identity()
    if kind in ("image", "other"):
        clone = MODELS["frames"].clone()
        clone.model = SimpleNamespace(
            diffusion_model=network, latent_format=comfy.latent_formats.Wan21(),
            model_sampling=MODELS["frames"].model.model_sampling,
        )  # fmt: skip
        return clone
    clone, fuel = MODELS[kind].clone(), spec.get("fuel", 0)

    def forward(apply, given):
        nonlocal fuel
        if not fuel:
            raise Reached
        fuel -= 1
        return apply(given["input"], given["timestep"], **given["c"])

    clone.set_model_unet_function_wrapper(forward)
    return clone


def timeline(spec: dict) -> Any:
    module = ours(".accel.timeline")
    made = module.Timeline(rows=2, columns=4, schedule={"mode": "x"}, settings={"a": {"b": 1}})
    for index in range(spec.get("records", 2)):
        number = spec.get("number", 0.5)
        made.add(module.StepRecord(0, index, (0, 2), "recompute", number, discrepancy=number, seconds=0.1, flops=7))
    return made


def vae(spec: dict) -> Any:
    if spec["kind"] == "tiny":
        return run("ARVATinyCodec", {})[0]
    return SimpleNamespace(latent_dim=2, latent_channels=4)


VALUES = {
    "tensor": tensor, "model": model, "timeline": timeline, "vae": vae, "weird": lambda spec: Weird(),
    "nested": lambda spec: comfy.nested_tensor.NestedTensor([torch.zeros(1, 16, 2, 4, 4)] * 2),
    "node": lambda spec: run(spec["node"], build(spec["inputs"]))[spec.get("output", 0)],
    "bytes": lambda spec: spec["text"].encode(),
}  # fmt: skip


def build(value: Any) -> Any:
    if isinstance(value, dict) and "$" in value:
        return VALUES[value["$"]](value)
    if isinstance(value, dict):
        return {key: build(item) for key, item in value.items()}
    return [build(item) for item in value] if isinstance(value, list) else value


def run(node: str, inputs: dict[str, Any]) -> tuple:
    """As core executes a node: through its own normalisation, on a locked clone of the class."""
    if node.startswith("TinyVAE."):
        return (getattr(run("ARVATinyCodec", {})[0], node.partition(".")[2])(**inputs),)
    kind = OURS[node].PREPARE_CLASS_CLONE(None)
    return kind.EXECUTE_NORMALIZED(**inputs).args


def finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or not 0 < value.numel() < MOST:
            return True
        try:
            return all(math.isfinite(edge) for edge in value.aminmax())
        except NotImplementedError:  # 8-bit floats
            return finite(value.float())
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict | list | tuple):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return True


def files() -> list[str]:
    """Everything below the base directory that is no folder."""
    return sorted(str(path.relative_to(BASE)) for path in BASE.rglob("*") if path.is_file() and not path.is_symlink())


def cleared() -> None:
    for folder in (OUTPUT, TEMP):
        for path in folder.iterdir() if folder.exists() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def answer(case: dict) -> dict[str, Any]:
    """What came of a case: ``made``, ``reached`` (the model), ``refused`` in a sentence of ours, or ``fault``."""
    node, began = case["node"], time.perf_counter()
    told: dict[str, Any] = {"outcome": "made"}
    inputs: dict[str, Any] = {}
    try:
        inputs = build(case["inputs"])
        made = run(node, inputs)
        told["seconds"] = time.perf_counter() - began
        told["finite"], told["sound"] = all(map(finite, made)), finite(inputs)
        told["shapes"] = [shape_of(value) for value in made]
    except Reached:
        told["outcome"] = "reached"
    except Exception as error:
        ours_told = isinstance(error, ValueError) and str(error).startswith(tuple(f"{t}: " for t in TITLES.values()))
        told = {"outcome": "refused" if ours_told else "fault", "message": f"{error}"}
        if not ours_told:
            told |= {"type": type(error).__name__, "traceback": traceback.format_exc()}
    told.setdefault("seconds", time.perf_counter() - began)
    del inputs
    left = [name for name in files() if not name.startswith("temp/")]
    kept = told["outcome"] == "made" or "stream" in case["inputs"]
    told["strays"] = [name for name in left if name not in BEFORE and not (kept and name.startswith("output/"))]
    told["strays"] += [name for name in left if name.endswith(".part")] + os.listdir(".")
    cleared()
    return told


def shape_of(value: Any) -> Any:
    value = value.get("samples") if isinstance(value, dict) else value
    return list(value.shape) if isinstance(value, torch.Tensor) else None


def described(name: str) -> dict[str, Any]:
    schema = OURS[name].define_schema()
    inputs = []
    for one in schema.inputs:
        told = {"name": one.id, "type": one.get_io_type(), "optional": bool(one.optional)}
        for key in ("min", "max", "default", "options"):
            value = getattr(one, key, None)
            told |= {key: value} if value is not None else {}
        inputs.append(told)
    outputs = [one.get_io_type() for one in schema.outputs]
    return {"node": name, "title": schema.display_name, "inputs": inputs, "outputs": outputs}


if __name__ == "__main__":
    frames, causal = sys.argv[1:]
    MODELS = {"frames": comfy.sd.load_diffusion_model(frames), "causal": comfy.sd.load_diffusion_model(causal)}
    BEFORE = set(files())
    print(json.dumps([described(name) for name in sorted(OURS)]), file=ANSWERS, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=ANSWERS, flush=True)
