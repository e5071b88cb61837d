"""What the pack adds to ComfyUI's start, and that a graph or a model it was taken out of keeps no trace of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.host.comfy import PACK_ROOT, ComfyServer
from tests.host.help_pictures import comparison
from tests.host.inprocess import run_in_process

MILLISECONDS = 150.0
PROCESSES = 3
TRACES = ("arva", "ar-video-accelerator", "ar video accelerator")
IMPORT = """
import asyncio, json, logging, sys, time, warnings
import comfy.sd, comfy.samplers, nodes, torch
from comfy_config import config_parser  # core's loader asks it for every pack

told = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger().addHandler(handler)
before = set(sys.modules)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    wall, work = time.perf_counter(), time.process_time()
    loaded = asyncio.new_event_loop().run_until_complete(nodes.load_custom_node(sys.argv[1]))
    wall, work = time.perf_counter() - wall, time.process_time() - work
ours = sys.argv[1].replace(".", "_x_")
new = {name.split(".")[0] for name in set(sys.modules) - before if not name.startswith(ours)}
print(json.dumps({
    "loaded": loaded, "wall": 1000 * wall, "work": 1000 * work,
    "warnings": told + [str(one.message) for one in warned],
    "new": sorted(new - set(sys.stdlib_module_names)),
    "nodes": sum(name.startswith("ARVA") for name in nodes.NODE_CLASS_MAPPINGS),
}))
"""
TRACELESS = """
import json, sys
import comfy.sd, comfy.samplers, comfy.sample, torch
from nodes import NODE_CLASS_MAPPINGS as NODES


def execute(name, *inputs, **named):
    return NODES[name].execute(*inputs, **named)


def state(model):
    parts = ("model_options", "patches", "object_patches", "wrappers", "callbacks", "attachments", "injections")
    return json.dumps({part: getattr(model, part, None) for part in parts}, default=str, sort_keys=True)


def plain(model):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(2.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
    euler = comfy.samplers.sampler_object("euler")
    noise = comfy.sample.prepare_noise(latent["samples"], 3)
    with torch.no_grad():
        return guider.sample(noise, latent["samples"], euler, sigmas, seed=3)


model = comfy.sd.load_diffusion_model(sys.argv[1])
positive, negative = execute("ARVATinyPrompt", "red disc")[0], execute("ARVATinyPrompt", "")[0]
latent = execute("ARVATinyLatent", 8, 64, 64, 1)[0]
before, video = state(model), plain(model)
keys = sorted(type(model.model).__dict__) + sorted(vars(model.model)) + sorted(vars(model.model.diffusion_model))
used = execute("ARVAAccelerate", model, "fast")[0]
used = execute("ARVATriModalScheduler", used, 0.2, 0.9, "log-snr", "2", 0.75, 5, 1, 0.0)[0]
used = execute("ARVAHistoryGuidedCache", used, 0.1, "auto", 5, 2)[0]
used = execute("ARVAResidualCorrection", used, "sigma_linear")[0]
used = execute("ARVAActiveFrameWindow", used, "suffix")[0]
settings = dict(seed=3, steps=6, cfg=2.0, mode="auto", segment=8, overlap=4, block=4, ar_step=1, solver="auto",
                shift=3.0, history_noise=0.0)
made = execute("ARVASegmentSampler", used, positive, negative, latent, **settings)[0]["samples"]
after = sorted(type(model.model).__dict__) + sorted(vars(model.model)) + sorted(vars(model.model.diffusion_model))
print(json.dumps({
    "worked": bool(torch.isfinite(made).all()), "model": state(model) == before, "differs": state(used) != before,
    "attributes": keys == after, "video": torch.equal(plain(model), video),
}))
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def starts(comfy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What loading the pack did in several fresh processes of ComfyUI that had torch and comfy already; all but the
    first start after an installation find its modules compiled, so that one is not counted."""
    script = written(tmp_path_factory.mktemp("import"), IMPORT)
    bytecode = tmp_path_factory.mktemp("bytecode")
    options = {"root": comfy_root, "pack": None, "core_nodes": [], "bytecode": bytecode}
    return [run_in_process(script, str(PACK_ROOT), **options) for _ in range(PROCESSES + 1)][1:]


def test_the_pack_adds_little_to_comfyuis_start(starts: list[dict[str, Any]]) -> None:
    """Process time: what else the machine does at that moment is not the pack's."""
    work, wall = (median(start[key] for start in starts) for key in ("work", "wall"))
    print(f"the pack adds {work:.0f} ms of work, {wall:.0f} ms on the clock (median of {len(starts)} starts)")
    assert work < MILLISECONDS, [round(start["work"]) for start in starts]


def test_the_pack_loads_without_a_warning(starts: list[dict[str, Any]], golden: Callable[[str], Any]) -> None:
    for start in starts:
        assert start["loaded"] and start["nodes"] == len(golden("node_ids"))
        assert start["warnings"] == []


def test_nothing_heavy_is_imported_before_it_is_needed(starts: list[dict[str, Any]]) -> None:
    """Kornia and the like belong into the functions that use them."""
    assert set(starts[0]["new"]) <= {"einops", "safetensors"}


def test_a_model_that_our_nodes_used_is_the_model_it_was(comfy_root: Path, tmp_path: Path) -> None:
    checkpoint = PACK_ROOT / "demo" / "weights" / "diffusion_models" / "tiny-df.safetensors"
    answer = run_in_process(written(tmp_path, TRACELESS), str(checkpoint), root=comfy_root, core_nodes=[])
    assert answer == dict.fromkeys(("worked", "model", "differs", "attributes", "video"), True)


@pytest.mark.parametrize("template", sorted((PACK_ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_a_workflow_without_our_nodes_keeps_no_trace_of_them(template: Path) -> None:
    """Nothing of ours is written beside our own nodes: not into other nodes, nor into the workflow's extra data."""
    workflow = json.loads(template.read_text(encoding="utf-8"))
    kept = [node for node in workflow["nodes"] if not node["type"].startswith("ARVA") and "Note" not in node["type"]]
    assert len(kept) < len(workflow["nodes"]), "no node of the pack was taken out"
    for node in kept:
        node.pop("title", None)
    rest = json.dumps({**workflow, "nodes": kept, "links": []}).lower()
    assert [trace for trace in TRACES if trace in rest] == []


def test_a_graph_with_our_acceleration_bypassed_equals_one_that_never_had_it(server: ComfyServer) -> None:
    """What the frontend sends for a bypassed node: its model link leads to the loader."""
    graph = comparison("tiny-df.safetensors", 12, 6, 1, "fast")
    used = ("loader", "positive", "negative", "latent", "accelerate", "sample")
    save = {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "bypass"}}
    accelerated = {key: graph[key] for key in used} | {"save": save}
    bypassed = json.loads(json.dumps(accelerated))
    bypassed["sample"]["inputs"]["model"] = ["loader", 0]
    del bypassed["accelerate"]
    latents = []
    for prompt in (bypassed, accelerated, bypassed):
        latents.append(saved_latent(server, server.run(prompt)))
        server.free()
    assert torch.equal(latents[0], latents[2]) and not torch.equal(latents[0], latents[1])


def saved_latent(server: ComfyServer, entry: dict[str, Any]) -> torch.Tensor:
    """What the graph's node ``save`` wrote."""
    (saved,) = entry["outputs"]["save"]["latents"]
    return load_file(server.output_dir / saved["subfolder"] / saved["filename"])["latent_tensor"]
