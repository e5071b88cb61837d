"""Prompts with anything in them over the real server: refused or failed with a sentence, and the server goes on."""

from __future__ import annotations

import copy
import json
import time
import urllib.error
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demo.model import TinyConfig, TinyWan, save_model
from tests.fuzzing import ODD, assert_sentence, counted
from tests.host.comfy import PACK_NAME, ComfyServer

MODEL = "fuzz-api.safetensors"
SECONDS = 5.0
STREAM = {"filename_prefix": "api", "fps": 16.0, "format": "mp4", "resume": True, "every": 1, "context": 0}
SAMPLER = {
    "model": ["6", 0], "positive": ["8", 0], "negative": ["3", 0], "latent_image": ["4", 0], "stream": ["7", 0],
    "seed": 7, "steps": 1, "cfg": 1.0, "mode": "auto", "segment": 4, "overlap": 2, "block": 2, "ar_step": 1,
    "solver": "auto", "shift": 3.0, "history_noise": 0.0,
}  # fmt: skip
SCHEDULER = {
    "model": ["1", 0], "cache_below": 0.2, "predict_below": 0.9, "signal": "log-snr", "order": "1", "decay": 0.75,
    "max_skip": 5, "warmup": 1, "reach": 0.0,
}  # fmt: skip
BUDGET = {
    "budget": 4.0, "unit": "latent frames", "keep": "window", "sink": 1, "recent": 0, "storage": "model", "offload": 0,
    "trained_frames": 21,
}  # fmt: skip
GRAPH = {
    "1": ("UNETLoader", {"unet_name": MODEL, "weight_dtype": "default"}),
    "2": ("ARVATinyPrompt", {"text": "red disc, gravity, pan"}),
    "3": ("ARVATinyPrompt", {"text": ""}),
    "4": ("ARVATinyLatent", {"frames": 4, "width": 16, "height": 16, "batch_size": 1}),
    "5": ("ARVATriModalScheduler", SCHEDULER),
    "6": ("ARVAKVCacheBudget", {"model": ["5", 0], **BUDGET}),
    "7": ("ARVAStreamSegments", {"vae": ["11", 0], **STREAM}),
    "8": ("ARVASegmentPrompt", {"conditioning": ["2", 0], "next": ["3", 0], "from_segment": 1}),
    "9": ("ARVASegmentSampler", SAMPLER),
    "10": ("ARVATimeline", {"timeline": ["9", 1], "filename_prefix": "api"}),
    "11": ("ARVATinyCodec", {}),
    "12": ("VAEDecode", {"samples": ["9", 0], "vae": ["11", 0]}),
    "13": ("ARVACompareRuns", {"reference": ["12", 0], "video": ["12", 0], "gain": 4.0, "timeline": ["9", 1]}),
}
NODES = [number for number, (name, _) in GRAPH.items() if name.startswith("ARVA") and name != "ARVATinyCodec"]
LINK = st.tuples(st.sampled_from([*GRAPH, "99", 4, None]), st.integers(-1, 3)).map(list)
ODD_NUMBERS = ("1", "0.5", "nan", "1e999", -1, 0, 10**30, 1e308, True)
NUMBER = st.one_of(st.sampled_from(ODD_NUMBERS), st.floats(), st.integers())


def built() -> dict[str, Any]:
    return {key: {"class_type": name, "inputs": copy.deepcopy(inputs)} for key, (name, inputs) in GRAPH.items()}


@pytest.fixture(scope="module")
def model(server: ComfyServer) -> Iterator[None]:
    torch.manual_seed(0)
    small = TinyConfig(dim=48, ffn_dim=64, num_layers=2, num_heads=2, kind="tiny-causal", causal_ar=True)
    path = server.models_dir / "diffusion_models" / MODEL
    save_model(TinyWan(small), path)
    yield
    path.unlink()


def outcome_of(server: ComfyServer, graph: dict[str, Any]) -> tuple[str, str, str]:
    """What came of a prompt, what was said of it, and where: ``made``, ``refused``, ``failed`` or ``stopped``.

    A prompt of which only some outputs are valid is accepted and runs for those, so its end is waited for as well.
    """
    try:
        answer = json.loads(server.post_json("/prompt", {"prompt": graph, "client_id": server.client_id}))
    except urllib.error.HTTPError as error:
        return "refused", error.read().decode(), str(error.code)
    began = time.monotonic()
    while (entry := server.history(answer["prompt_id"])) is None:
        if time.monotonic() - began > SECONDS:
            server.interrupt(answer["prompt_id"])
        assert time.monotonic() - began < 12 * SECONDS, "the prompt neither ended nor stopped"
        time.sleep(0.02)
    for kind, details in entry["status"]["messages"]:
        if kind == "execution_error":
            return "failed", details["exception_message"].strip(), details["node_type"]
        if kind == "execution_interrupted":
            return "stopped", "", ""
    return "made", "", ""


@settings(max_examples=max(12, settings.default.max_examples // 10), suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_prompt_with_anything_in_it_is_answered(server: ComfyServer, model: None, data: st.DataObject) -> None:
    graph = built()
    for _ in range(data.draw(st.sampled_from((1, 1, 1, 2)))):
        inputs = graph[data.draw(st.sampled_from(NODES))]["inputs"]
        name = data.draw(st.sampled_from(sorted(inputs)))
        if data.draw(st.integers(0, 9)) == 0:
            del inputs[name]
            break
        inputs[name] = data.draw(st.one_of(NUMBER, NUMBER, ODD, LINK))
    said_before = len(server.log())
    outcome, message, where = outcome_of(server, graph)
    counted("prompts over the API", outcome)
    if outcome == "failed":
        assert where.startswith("ARVA"), f"{where}: {message}\n{json.dumps(graph)}"
        assert_sentence(message)
    if outcome == "refused":
        log = server.log()[said_before:]
        assert f"{PACK_NAME}/" not in log, f"{message}\n{log}\n{json.dumps(graph)}"


def test_the_server_goes_on_as_before(server: ComfyServer, model: None) -> None:
    graph = built()
    assert outcome_of(server, graph) == ("made", "", "")
    escaped = [path for path in server.base.rglob("*") if path.name.startswith("api") and "output" not in path.parts]
    assert not escaped and not list(server.output_dir.rglob("*.part"))
