"""The nodes in the real ComfyUI: equal to the library and to core, no spent state, refusals in one sentence."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from accel.chunks import ChunkConfig
from accel.correct import CorrectionConfig
from accel.engine import Acceleration, Run, SchedulerConfig
from accel.kv.frozen import FrozenConfig
from accel.policy import TriModalConfig
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing, next_clip
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.codec import WEIGHTS
from demo.denoiser import TinyDenoiser
from demo.model import TinyConfig, TinyWan, load_model, save_model
from demo.prompt import embed_text
from tests.host.comfy import ComfyServer, PromptError, PromptInterrupted
from tests.host.inprocess import run_in_process

SCRIPT = Path(__file__).with_name("node_runs.py")
TEXT = "red disc, blue square, gravity, pan"
FRAMES, STEPS = 20, 8
TOLERANCE = 1e-3
SCHEDULE = SchedulerConfig(TriModalConfig(0.2, 0.9), "log-snr", reach=None)
CHUNKS = ChunkConfig(TriModalConfig(0.2, 0.9, 1.0), "log-snr", reach=None)
TIMED = ChunkConfig(TriModalConfig(0.05, 0.05, 1.0, None), "timestep", reach=None, warmup=2)
OURS = {
    "ARVASegmentSampler": "AR Segment Sampler",
    "ARVAHistoryGuidedCache": "History-Guided Cache",
    "ARVATriModalScheduler": "Tri-Modal Scheduler",
    "ARVAResidualCorrection": "Residual Correction",
    "ARVAActiveFrameWindow": "Active Frame Window",
    "ARVASharedPrefixCache": "Shared Prefix Cache",
    "ARVAChunkCache": "Chunk Cache",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``frames``: tiny-df, or a random model where it has not been trained; ``causal``: a random causal model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {"frames": folder / "nodes-df.safetensors", "causal": folder / "nodes-causal.safetensors"}
    torch.manual_seed(0)
    save_model(TinyWan(TinyConfig(kind="tiny-causal", causal_ar=True)), paths["causal"])
    trained = [WEIGHTS / "diffusion_models" / "tiny-df.safetensors", WEIGHTS / "tiny-df.safetensors"]
    found = next((path for path in trained if path.exists()), None)
    if found is not None:
        shutil.copy(found, paths["frames"])
    else:
        save_model(TinyWan(TinyConfig()), paths["frames"])
    return paths


@pytest.fixture(scope="module")
def host(
    comfy_root: Path, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and latents of ``node_runs.py``."""
    out = tmp_path_factory.mktemp("latents") / "latents.safetensors"
    files = [str(checkpoints["frames"]), str(checkpoints["causal"]), str(out)]
    facts = run_in_process(SCRIPT, *files, root=comfy_root, core_nodes=["nodes_ar_video.py"])
    return facts, load_file(out)


def library(
    path: Path, frames: int, batch: int = 1, cfg: float = 2.0, kind: str | None = None, history_guidance: float = 0.0
) -> tuple:
    """The tiny model as ``accel`` sees it, and the start noise of seed 7."""
    model = load_model(path)
    if kind is not None:
        object.__setattr__(model.config, "kind", kind)
    noise = torch.randn((batch, 16, frames, 8, 8), generator=torch.Generator().manual_seed(7))
    context = embed_text(TEXT).expand(batch, -1, -1)
    denoiser = TinyDenoiser(model, context, cfg, rollout=frames, history_guidance=history_guidance)
    return denoiser.sized(noise), noise


def video(segments: Iterator) -> Tensor:
    return torch.cat([segment.latents for segment in segments], 2)


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


@pytest.mark.parametrize(
    ("name", "loop", "acceleration", "options"),
    [
        ("full", diffusion_forcing, Acceleration(), {}),
        ("fast", diffusion_forcing, Acceleration(None, SCHEDULE, CorrectionConfig(), True), {}),
        ("unipc", diffusion_forcing, Acceleration(None, SCHEDULE, None, True), {"solver": "unipc", "cfg": 1.0}),
        ("next clip", next_clip, Acceleration(None, SCHEDULE, None, True), {}),
        ("frozen", diffusion_forcing, Acceleration(scheduler=SCHEDULE, frozen_window=FrozenConfig(0.5)), {}),
        ("shared prefix", diffusion_forcing, Acceleration(shared_prefix=FrozenConfig(0.1, "history")), {}),
        ("chunks", diffusion_forcing, Acceleration(chunks=CHUNKS), {"solver": "unipc"}),
        ("timed chunks", diffusion_forcing, Acceleration(chunks=TIMED), {}),
        ("noised history", diffusion_forcing, Acceleration(), {"history_noise": 0.05}),
        ("history guidance", diffusion_forcing, Acceleration(), {"history_guidance": 1.0}),
        ("history guidance in part", diffusion_forcing, Acceleration(), {"history_guidance": 0.4}),
        ("history guidance in part, next clip", next_clip, Acceleration(), {"history_guidance": 0.4}),
        ("history guidance, next clip", next_clip, Acceleration(), {"history_guidance": 1.0}),
        (
            "history guidance, frozen",
            diffusion_forcing,
            Acceleration(scheduler=SCHEDULE, frozen_window=FrozenConfig(0.5)),
            {"history_guidance": 1.0},
        ),
    ],
)
def test_segments_equal_the_library(host, checkpoints, name, loop, acceleration, options) -> None:
    options = dict(options)
    kind = "tiny-next-clip" if loop is next_clip else None
    guided = options.pop("history_guidance", 0.0)
    denoiser, noise = library(checkpoints["frames"], FRAMES, 1, options.pop("cfg", 2.0), kind, guided)
    timeline = Timeline()
    run = Run(acceleration, denoiser, timeline)
    plan = SegmentPlan(FRAMES, 16, 4, 4, 0 if loop is next_clip else 2, STEPS)
    expected = video(loop(run, noise, plan, flow_sigmas(STEPS, 3.0), **options))
    facts, latents = host
    assert difference(latents[name], expected) < TOLERANCE
    if name in facts:
        assert facts[name]["calls"] == timeline.totals()["calls"]
        assert facts[name]["flops"] == timeline.totals()["flops"]


def test_history_guidance_shows_only_the_negative_branch_no_history(host) -> None:
    facts, latents = host
    assert difference(latents["history guidance"], latents["full"]) > 0.05
    assert facts["history guidance"]["calls"] == facts["full"]["calls"]
    assert facts["history guidance"]["flops"] == facts["full"]["flops"]
    assert facts["history guidance off is off"]
    assert facts["history guidance, one by one"] < TOLERANCE
    sizes, forwards, calls = facts["history guidance, forwards"]
    assert sizes == [1] and forwards == 2 * calls
    assert "wrappers" not in facts["history guidance leaves"]
    line, alone = facts["history guidance told"]
    assert line == "history guidance: 1" and "no segment continues another" in alone
    assert "history_guidance" in facts["history guidance refuses"] and "area" in facts["history guidance refuses"]


@pytest.mark.parametrize(
    ("name", "steps", "seed"), [("fast euler", 16, None), ("euler", 8, None), ("fast re-noise", 16, 7)]
)
def test_causal_blocks_equal_the_library(host, checkpoints, name, steps, seed) -> None:
    denoiser, noise = library(checkpoints["causal"], 14, batch=2, cfg=1.0)
    fast = name.startswith("fast")
    timeline = Timeline()
    run = Run(
        Acceleration(scheduler=SchedulerConfig(TriModalConfig(0.3, 2.0), "log-snr", reach=None) if fast else None),
        denoiser,
        timeline,
    )
    expected = video(causal_blocks(run, noise, 4, flow_sigmas(steps, 5.0), seed))
    facts, latents = host
    assert difference(latents[name], expected) < TOLERANCE
    if fast:
        calls = facts[name]["calls"]
        assert calls == timeline.totals()["calls"]
        assert calls["cache"] > 0 and calls["commit"] == 4


def test_causal_blocks_without_acceleration_equal_core(host) -> None:
    facts, _ = host
    assert facts["causal against core"] < 1e-5
    assert facts["causal sigmas against core"] < 1e-5
    assert facts["start image against core"] < 1e-5
    assert facts["causal"]["calls"] == {"recompute": 16, "predict": 0, "cache": 0, "commit": 4}
    assert facts["start image calls"] == {"recompute": 12, "predict": 0, "cache": 0, "commit": 4}


def test_acceleration_computes_less(host) -> None:
    facts, _ = host
    assert facts["full"]["flop_ratio"] == 1
    assert facts["fast"]["flop_ratio"] > 1.5
    assert facts["history"]["calls"]["cache"] > 0


def test_kept_kv_leave_nothing_and_refuse_what_they_cannot_serve(host) -> None:
    facts, _ = host
    assert facts["options left"] == ["arva_acceleration"]
    several, part = facts["kept K/V refuse"]
    assert "several conditionings are used at the same time" in several and "remove" in several
    assert "a part of the picture" in part and "remove" in part


def test_thresholds_of_zero_change_nothing(host) -> None:
    assert host[0]["off is off"]


def test_a_model_keeps_nothing_of_a_run(host) -> None:
    facts, _ = host
    assert facts["second run"]
    assert facts["nodes keep the model"]
    assert facts["core after ours"] and facts["core causal after ours"]
    assert facts["sampling restored"]


def test_an_interrupt_leaves_nothing_behind(host) -> None:
    facts, _ = host
    assert facts["interrupted"] and facts["causal interrupted"]
    assert facts["state after interrupt"] == facts["causal state after interrupt"] == []
    assert facts["patches after interrupt"] == []
    assert not facts["ar_state left"]
    assert facts["after interrupt"] and facts["causal after interrupt"]


def test_prompts_with_time_ranges_work(host) -> None:
    """Core compares one noise level per call with a prompt's range; the same prompt in two ranges changes nothing."""
    assert host[0]["prompt ranges"] < TOLERANCE


def test_a_window_inside_the_segment_keeps_its_positions(host) -> None:
    facts, _ = host
    change, shifts = facts["window shift"]
    assert change < TOLERANCE
    assert shifts == [4.0]
    assert facts["rope options left"] is None


def test_progress_counts_calls_and_shows_the_growing_clip(host) -> None:
    facts, _ = host
    assert facts["last tick"] == [22, 22]
    assert facts["previews"] and all(size == [5 * 8, 4 * 8] for size in facts["previews"])


REFUSED = {
    "4-D latent": ("AR Segment Sampler", "[1, 16, 8, 8]"),
    "noise mask": ("AR Segment Sampler", "noise mask"),
    "channels": ("AR Segment Sampler", "4 channels"),
    "image model": ("AR Segment Sampler", "Identity"),
    "i2v model": ("AR Segment Sampler", "36 channels"),
    "block": ("AR Segment Sampler", "22 latent frames leave 2 over"),
    "segment": ("AR Segment Sampler", "segment is 18"),
    "overlap": ("AR Segment Sampler", "overlap 16"),
    "re-noise": ("AR Segment Sampler", "re-noise"),
    "causal": ("AR Segment Sampler", "causal blocks"),
    "sigmas": ("AR Segment Sampler", "0.1"),
    "rising sigmas": ("AR Segment Sampler", "fall"),
    "history noise": ("AR Segment Sampler", "history_noise is 1"),
    "history guidance": ("AR Segment Sampler", "cfg is 1"),
    "causal history guidance": ("AR Segment Sampler", "cfg is 1"),
    "causal history guidance in part": ("AR Segment Sampler", "nothing between"),
    "too much history guidance": ("AR Segment Sampler", "history_guidance is 1.5"),
    "unipc": ("AR Segment Sampler", "unipc"),
    "thresholds": ("Tri-Modal Scheduler", "cache_below 0.7"),
    "decay": ("Tri-Modal Scheduler", "decay is 0.0"),
    "history signal": ("Tri-Modal Scheduler", "history-mod"),
    "threshold": ("History-Guided Cache", "-1"),
    "warmup": ("History-Guided Cache", "0"),
    "source": ("Residual Correction", "nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_sentence(host, case: str) -> None:
    sentence = host[0]["refusals"][case]
    name, value = REFUSED[case]
    assert sentence.startswith(f"{name}: "), sentence
    assert value in sentence, sentence
    assert sentence.count("\n") == 0 and sentence.endswith(".")


# The rest goes through the server, as a user's graph does.


@pytest.fixture(scope="module")
def models(server: ComfyServer, checkpoints: dict[str, Path]) -> dict[str, str]:
    for path in checkpoints.values():
        shutil.copy(path, server.models_dir / "diffusion_models")
    return {name: path.name for name, path in checkpoints.items()}


def graph(model: str, frames: int = FRAMES, **changes: Any) -> dict[str, Any]:
    """Prompt, latent, two acceleration nodes, sampler, and what is saved."""
    sampler = {
        "model": ["6", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 7,
        "steps": STEPS, "cfg": 2.0, "mode": "auto", "segment": 16, "overlap": 4, "block": 4, "ar_step": 2,
        "solver": "auto", "shift": 3.0, "history_noise": 0.0,
    }  # fmt: skip
    latent = {"frames": frames, "width": 64, "height": 64, "batch_size": 1}
    scheduler = {
        "model": ["1", 0], "cache_below": 0.2, "predict_below": 0.9, "signal": "log-snr", "order": "1", "decay": 0.75,
        "max_skip": 5, "warmup": 1, "reach": 0.0,
    }  # fmt: skip
    nodes = {
        "1": ("UNETLoader", {"unet_name": model, "weight_dtype": "default"}),
        "2": ("ARVATinyPrompt", {"text": TEXT}),
        "3": ("ARVATinyPrompt", {"text": ""}),
        "4": ("ARVATinyLatent", latent),
        "5": ("ARVATriModalScheduler", scheduler),
        "6": ("ARVAActiveFrameWindow", {"model": ["5", 0], "mode": "suffix"}),
        "7": ("ARVASegmentSampler", sampler),
        "8": ("SaveLatent", {"samples": ["7", 0], "filename_prefix": "nodes"}),
        "9": ("PreviewAny", {"source": ["7", 2]}),
    }
    built = {key: {"class_type": name, "inputs": inputs} for key, (name, inputs) in nodes.items()}
    for key, value in changes.items():
        owner = next(number for number in "75" if key in built[number]["inputs"])
        built[owner]["inputs"][key] = value
    return built


def result(server: ComfyServer, entry: dict[str, Any]) -> tuple[Tensor, str]:
    """The saved latent and the report."""
    (saved,) = entry["outputs"]["8"]["latents"]
    tensors = load_file(server.output_dir / saved["subfolder"] / saved["filename"])
    return tensors["latent_tensor"], entry["outputs"]["9"]["text"][0]


def without_seconds(report: str) -> list[str]:
    return [line for line in report.splitlines() if " s" not in line]


def test_the_nodes_are_offered_with_a_tooltip_everywhere(server: ComfyServer) -> None:
    for node_id, name in OURS.items():
        info = server.object_info(node_id)[node_id]
        assert (info["display_name"], info["category"]) == (name, "AR Video")
        assert info["description"]
        inputs = info["input"]["required"] | info["input"].get("optional", {})
        assert all(len(spec) > 1 and spec[1].get("tooltip") for spec in inputs.values()), node_id
        assert all(info["output_tooltips"]), node_id
    assert server.failed_imports() == []


def test_sampler_inputs_keep_their_order(server: ComfyServer) -> None:
    info = server.object_info("ARVASegmentSampler")["ARVASegmentSampler"]
    order = "model positive negative latent_image seed steps cfg mode segment overlap block ar_step solver shift"
    visible = {kind: names for kind, names in info["input_order"].items() if kind != "hidden"}
    optional = ["history_guidance", "sigmas", "stream"]
    assert visible == {"required": [*order.split(), "history_noise"], "optional": optional}
    assert info["output"] == ["LATENT", "ARVA_TIMELINE", "STRING"]
    assert info["output_name"] == ["latent", "timeline", "report"]


def test_a_second_queue_gives_the_same_result_and_still_accelerates(server: ComfyServer, models) -> None:
    first, report = result(server, server.run(graph(models["frames"])))
    other, _ = result(server, server.run(graph(models["frames"], seed=8)))
    again, second_report = result(server, server.run(graph(models["frames"])))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert without_seconds(report) == without_seconds(second_report)
    assert int(re.search(r"(\d+) % skipped", second_report)[1]) > 10
    assert server.log().count("AR Video Accelerator: ") >= 3


def test_progress_ends_at_the_number_of_calls(server: ComfyServer, models) -> None:
    prompt_id = server.run(graph(models["frames"], seed=9))["prompt_id"]
    progress = [data for data in server.events_of(prompt_id, "progress") if data["node"] == "7"]
    assert progress[-1]["value"] == progress[-1]["max"] == SegmentPlan(FRAMES, 16, 4, 4, 2, STEPS).calls()


def test_interrupt_then_queue_again(server: ComfyServer, models) -> None:
    before, _ = result(server, server.run(graph(models["frames"], seed=10)))
    prompt_id = server.queue(graph(models["frames"], seed=11, steps=400, ar_step=80))
    while not server.events_of(prompt_id, "progress"):
        pass
    server.interrupt(prompt_id)
    with pytest.raises(PromptInterrupted):
        server.wait(prompt_id, timeout=30)
    after, _ = result(server, server.run(graph(models["frames"], seed=10)))
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cache_below": 0.7, "predict_below": 0.6}, "Tri-Modal Scheduler: cache_below 0.7 is above predict_below 0.6"),
        ({"block": 5}, "AR Segment Sampler: segment plan: segment is 16 latent frames, not a multiple"),
        ({"mode": "causal blocks"}, "AR Segment Sampler: mode is causal blocks"),
    ],
)
def test_a_wrong_value_reaches_the_user_as_a_sentence(server: ComfyServer, models, changes, sentence) -> None:
    with pytest.raises(PromptError) as caught:
        server.run(graph(models["frames"], **changes))
    assert caught.value.details["exception_message"].startswith(sentence)
    assert caught.value.details["exception_type"] == "ValueError"


def test_a_4d_latent_is_refused_and_guided_causal_blocks_run(server: ComfyServer, models) -> None:
    flat = graph(models["frames"])
    flat["4"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    with pytest.raises(PromptError, match="latent_image must be a video latent"):
        server.run(flat)
    server.run(graph(models["causal"]))
