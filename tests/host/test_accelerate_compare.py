"""Accelerate AR Video and Compare Runs in the real ComfyUI: what is set for which model, no trace of exact, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from accel.presets import PRESETS, QUALITIES, digest
from demo.model import MODELS, TinyConfig, TinyWan, save_model
from tests.host.comfy import ComfyServer, PromptError
from tests.host.help_pictures import comparison, images
from tests.host.inprocess import run_in_process

FRAMES, STEPS = 16, 8
SCRIPT = """
import importlib, json, sys
import comfy.sd, folder_paths
from nodes import NODE_CLASS_MAPPINGS as NODES
from run_in_comfy import pack_module

presets = importlib.import_module(".accel.presets", pack_module().__name__)
accelerate, answer = NODES["ARVAAccelerate"].execute, {"settings": {}, "equal": []}


def options(model):
    return model.model_options.get("transformer_options", {})


for name, path in json.loads(sys.argv[1]).items():
    model = comfy.sd.load_diffusion_model(path)
    before = json.dumps(model.model_options, default=str, sort_keys=True)
    for quality in presets.QUALITIES:
        made, settings = accelerate(model, quality)
        answer["settings"][f"{name} {quality}"] = settings
        told = options(made).get("arva_acceleration")
        known = name if presets.PRESETS.knows(name) else None
        regime = "causal" if "causal" in name else "frames"
        expected = None if quality == "exact" else presets.PRESETS.find(quality, known, regime).acceleration
        answer["equal"].append(told == expected and (told is None) == (quality == "exact"))
    made, settings = accelerate(model, "target", 37.5)
    held = options(made)["arva_acceleration"] == presets.quality_target(37.5)
    answer.setdefault("target", []).append(held and settings.startswith("target: 37.5 dB"))
    described = NODES["ARVATriModalScheduler"].execute(model, 0.2, 0.9, "log-snr", "2", 0.75, 5, 1, 0.0)[0]
    described = NODES["ARVAActiveFrameWindow"].execute(described, "suffix")[0]
    exact = accelerate(accelerate(described, "fast")[0], "exact")[0]
    answer.setdefault("replaced", []).append(
        options(accelerate(described, "fast")[0])["arva_acceleration"]
        == options(accelerate(model, "fast")[0])["arva_acceleration"]
    )
    answer.setdefault("no trace", []).append(json.dumps(exact.model_options, default=str, sort_keys=True) == before)
    answer.setdefault("given model untouched", []).append(
        json.dumps(model.model_options, default=str, sort_keys=True) == before
    )
    answer.setdefault("patches", []).append(list(exact.object_patches) + list(exact.patches))
    changed = options(NODES["ARVAActiveFrameWindow"].execute(accelerate(model, "fast")[0], "suffix")[0])
    changed = changed["arva_acceleration"]
    answer.setdefault("changed after", []).append(changed.suffix_window and changed.scheduler is not None)
unloaded = model.clone()
unloaded.cached_patcher_init = None
answer["without a file"] = accelerate(unloaded, "fast")[1]


class NoVideo:
    model_options = {}
    model = type("Flux", (), {"diffusion_model": object()})()
    get_model_object = staticmethod(lambda name: object())


try:
    accelerate(NoVideo(), "balanced")
except ValueError as error:
    answer["refusal"] = str(error)
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded models, and two that the pack cannot know: random weights without its metadata."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {name: MODELS / f"{name}.safetensors" for name in ("tiny-df", "tiny-next-clip", "tiny-causal")}
    for name, causal in (("other", False), ("other-causal", True)):
        save_model(TinyWan(TinyConfig(causal_ar=causal)), folder / "tagged.safetensors")
        layout = {"num_heads": 3, "text_dim": 64} | ({"causal_ar": True} if causal else {})
        paths[name] = folder / f"{name}.safetensors"
        config = json.dumps({"transformer": layout})
        save_file(load_file(folder / "tagged.safetensors"), paths[name], {"config": config})
    return paths


@pytest.fixture(scope="module")
def answer(comfy_root: Path, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = tmp_path_factory.mktemp("script") / "accelerate.py"
    script.write_text(SCRIPT)
    paths = json.dumps({name: str(path) for name, path in checkpoints.items()})
    return run_in_process(script, paths, root=comfy_root, core_nodes=[])


def test_every_quality_sets_what_the_table_says(answer: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    assert len(answer["equal"]) == len(checkpoints) * len(QUALITIES) and all(answer["equal"])


def test_target_holds_the_quality_that_is_set_on_every_model(answer: dict[str, Any]) -> None:
    assert answer["target"] and all(answer["target"])


def test_the_settings_text_is_the_tables_report(answer: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    for name in ("tiny-df", "tiny-next-clip", "tiny-causal"):
        regime = "causal" if "causal" in name else "frames"
        for quality in QUALITIES:
            expected = PRESETS.report(quality, name, regime, digest(checkpoints[name]))
            assert answer["settings"][f"{name} {quality}"] == expected


def test_an_unknown_model_gets_its_regimes_values_and_is_told_so(answer: dict[str, Any]) -> None:
    for name, stand_in in (("other", "tiny-df"), ("other-causal", "tiny-causal")):
        text = answer["settings"][f"{name} fast"]
        assert "not measured here" in text and stand_in in text
    assert "not measured here" in answer["without a file"]


def test_exact_removes_every_acceleration_and_leaves_no_trace(answer: dict[str, Any]) -> None:
    assert all(answer["no trace"]) and all(answer["given model untouched"])
    assert not any(answer["patches"])


def test_a_preset_replaces_what_stands_before_it_and_can_be_changed_after_it(answer: dict[str, Any]) -> None:
    assert all(answer["replaced"]) and all(answer["changed after"])


def test_another_kind_of_model_is_refused_by_the_nodes_own_name(answer: dict[str, Any]) -> None:
    assert answer["refusal"].startswith("Accelerate AR Video: model is Flux")
    assert "load a Wan" in answer["refusal"]


@pytest.fixture(scope="module")
def model(server: ComfyServer, checkpoints: dict[str, Path]) -> str:
    shutil.copy(checkpoints["tiny-df"], server.models_dir / "diffusion_models" / "compared-df.safetensors")
    return "compared-df.safetensors"


def test_a_fast_run_is_compared_with_an_exact_one(server: ComfyServer, model: str) -> None:
    entry = server.run(comparison(model, FRAMES, STEPS, 2, "fast"))
    shown = entry["outputs"]["compare"]
    (text,) = shown["text"]
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.count(" | ") > 1)
    exact, fast = (int(cell) for cell in rows["calls: recompute"].split(" | "))
    assert fast < exact and "| PSNR | " in text and "measured speed-up" in text
    assert float(rows["FLOP ratio"].strip("| x")) > 1.2
    assert shown["images"][0]["type"] == "temp"
    assert entry["outputs"]["settings"]["text"][0] == PRESETS.report("fast", "tiny-df", "frames", digest(
        MODELS / "tiny-df.safetensors"))  # fmt: skip
    difference = np.stack([np.asarray(image) for image in images(server, entry, "difference")])
    frames = [
        np.stack([np.asarray(image) for image in images(server, entry, name)]).astype(float)
        for name in ("decode_exact_saved", "decode_saved")
    ]
    expected = np.clip(8.0 * abs(frames[0] - frames[1]), 0, 255)
    assert difference.shape == (FRAMES, 64, 64, 3) and difference.max() > 20
    assert abs(difference - expected).max() <= 17, "not the amplified difference (rounded twice, times the gain)"
    (plot,) = images(server, entry, "plot")
    assert isinstance(plot, Image.Image) and plot.size[0] > plot.size[1] > 300
    assert text.encode() in b"".join(event["data"] for event in server.events if event["type"] == "binary")


def test_exact_equals_a_run_without_any_of_our_acceleration(server: ComfyServer, model: str) -> None:
    graph = comparison(model, FRAMES, STEPS, 2, "exact")
    graph["sample_exact"]["inputs"]["model"] = ["loader", 0]
    (text,) = server.run(graph)["outputs"]["compare"]["text"]
    assert "| PSNR | equal |" in text and "| FLOP ratio |  | 1.00x |" in text


def test_videos_of_another_length_are_refused(server: ComfyServer, model: str) -> None:
    graph = comparison(model, FRAMES, STEPS, 2, "exact")
    graph["latent_short"] = {"class_type": "ARVATinyLatent", "inputs": {**graph["latent"]["inputs"], "frames": 12}}
    graph["sample"]["inputs"]["latent_image"] = ["latent_short", 0]
    with pytest.raises(PromptError) as caught:
        server.run(graph)
    assert caught.value.details["exception_message"].startswith("Compare Runs: reference has 16 frames and video 12;")


def test_timelines_are_optional(server: ComfyServer, model: str) -> None:
    graph = comparison(model, FRAMES, STEPS, 2, "fast")
    for name in ("reference_timeline", "timeline"):
        del graph["compare"]["inputs"][name]
    (text,) = server.run(graph)["outputs"]["compare"]["text"]
    assert "| PSNR | " in text and "calls" not in text
