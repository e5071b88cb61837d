"""Causal models with our K/V store in the real ComfyUI: what core refuses works, and what core does is unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from accel.engine import Acceleration, Run, SchedulerConfig
from accel.kv.budget import KVBudgetConfig
from accel.policy import TriModalConfig
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.denoiser import TinyDenoiser
from demo.model import load_model
from demo.prompt import embed_text

from .inprocess import run_in_process
from .test_nodes import TEXT, TOLERANCE, checkpoints, difference, video  # noqa: F401

SCRIPT = Path(__file__).with_name("kv_runs.py")
WINDOW = KVBudgetConfig(frames=9)


@pytest.fixture(scope="module")
def host(comfy_root: Path, checkpoints, tmp_path_factory) -> tuple[dict[str, Any], dict[str, Tensor]]:  # noqa: F811
    """Facts and latents of ``kv_runs.py``."""
    out = tmp_path_factory.mktemp("kv") / "latents.safetensors"
    files = [str(checkpoints["frames"]), str(checkpoints["causal"]), str(out)]
    return run_in_process(SCRIPT, *files, root=comfy_root, core_nodes=["nodes_ar_video.py"]), load_file(out)


@pytest.mark.parametrize(
    ("name", "cfg", "budget", "steps", "seed"),
    [("window", 1.0, WINDOW, 4, 7), ("guided", 2.0, None, 4, 7), ("guided window", 2.0, WINDOW, 4, 7),
     ("guided fast", 2.0, WINDOW, 16, None), ("history guided", 2.0, None, 4, 7),
     ("history guided window", 2.0, WINDOW, 4, 7)],
)  # fmt: skip
def test_the_host_equals_the_library(host, checkpoints, name, cfg, budget, steps, seed) -> None:  # noqa: F811
    facts, latents = host
    model = load_model(checkpoints["causal"])
    noise = torch.randn((2, 16, 14, 8, 8), generator=torch.Generator().manual_seed(7))
    by_history = {"history_guidance": float(name.startswith("history guided"))}
    prompt = embed_text(TEXT).expand(2, -1, -1)
    denoiser = TinyDenoiser(model, prompt, cfg, rollout=14, budget=budget, **by_history).sized(noise)
    scheduler = SchedulerConfig(TriModalConfig(0.3, 2.0), "log-snr", reach=None) if "fast" in name else None
    run = Run(Acceleration(scheduler=scheduler, kv_budget=budget), denoiser, Timeline())
    expected = video(causal_blocks(run, noise, 4, flow_sigmas(steps, 5.0), seed))
    assert difference(latents[name], expected) < TOLERANCE
    totals = run.timeline.totals()
    assert facts[name]["calls"] == totals["calls"] and facts[name]["flops"] == totals["flops"]
    if budget is not None:
        assert facts[name]["kv_bytes"] == totals["kv_bytes"] and facts[name]["flop_ratio"] > 1.0


def test_history_guidance_keeps_no_history_for_the_negative_branch(host) -> None:
    facts, latents = host
    assert difference(latents["history guided"], latents["guided"]) > 0.05
    assert 2 * facts["history guided window"]["kv_bytes"] == facts["guided window"]["kv_bytes"] > 0
    assert facts["history guided, one by one"] < TOLERANCE


def test_a_budget_that_holds_the_video_equals_core(host) -> None:
    facts, _ = host
    assert facts["whole against core"] < 1e-5 and facts["start image against core"] < 1e-5
    assert facts["whole"]["flop_ratio"] == 1.0
    assert facts["start image kept"]


@pytest.mark.parametrize(
    ("name", "cfg", "budget"), [("told", 1.0, None), ("told small", 2.0, WINDOW), ("told sparse", 1.0, None)]
)
def test_a_prompt_can_change_from_a_segment_on(host, checkpoints, name, cfg, budget) -> None:  # noqa: F811
    _, latents = host
    prompts = {0: embed_text(TEXT).expand(2, -1, -1), 2: embed_text("green square, blue disc").expand(2, -1, -1)}
    noise = torch.randn((2, 16, 14, 8, 8), generator=torch.Generator().manual_seed(7))
    model = load_model(checkpoints["causal"])
    denoiser = TinyDenoiser(model, prompts, cfg, rollout=14, budget=budget).sized(noise)
    run = Run(Acceleration(kv_budget=budget), denoiser, Timeline())
    expected = video(causal_blocks(run, noise, 4, flow_sigmas(4, 5.0), 7))
    assert difference(latents[name], expected) < TOLERANCE
    same = {"told": "all tokens", "told small": "guided window", "told sparse": "all tokens"}[name]
    assert difference(latents[name][:, :, :8], latents[same][:, :, :8]) < 1e-4
    assert difference(latents[name][:, :, 8:], latents[same][:, :, 8:]) > 1e-2


def test_the_prompt_of_diffusion_forcing_changes_with_the_segment_too(host, checkpoints) -> None:  # noqa: F811
    _, latents = host
    prompts = {0: embed_text(TEXT), 1: embed_text("green square")}
    noise = torch.randn((1, 16, 28, 8, 8), generator=torch.Generator().manual_seed(7))
    denoiser = TinyDenoiser(load_model(checkpoints["frames"]), prompts, 2.0).sized(noise)
    plan = SegmentPlan(28, 16, 4, 4, 2, 8)
    expected = video(diffusion_forcing(Run(Acceleration(), denoiser, Timeline()), noise, plan, flow_sigmas(8, 3.0)))
    assert difference(latents["told frames"], expected) < TOLERANCE


def test_reading_all_of_the_history_and_the_padding_as_one_token_change_nothing(host) -> None:
    facts, latents = host
    assert facts["all tokens against core"] < 1e-5 and facts["all tokens"]["flop_ratio"] == 1.0
    assert difference(latents["all read"], latents["guided"]) < 1e-4
    assert 1.0 < facts["all read"]["flop_ratio"] < 1.2


def test_reading_less_computes_less_and_changes_something(host) -> None:
    facts, latents = host
    for name, whole in (("sparse", "all of long"), ("sparse prompt", "all tokens")):
        assert facts[name]["flop_ratio"] > facts[whole]["flop_ratio"] >= 1.0
        assert 1e-4 < (latents[name] - latents[whole]).norm() / latents[whole].norm() < 1.0


def test_where_sparse_attention_cannot_pay_it_is_off(host) -> None:
    _, latents = host
    assert torch.equal(latents["not worth it"], latents["all of long"])


def test_a_block_that_runs_out_of_memory_is_made_again_with_less_and_the_next_run_has_all(host) -> None:
    facts, latents = host
    assert facts["less"]["calls"] == facts["window"]["calls"] and facts["less"]["flops"] < facts["window"]["flops"]
    assert "segment 1 was made again with 1 first and 5 latest latent frames" in facts["less told"][0]
    assert bool(latents["less"].isfinite().all()) and difference(latents["less"], latents["window"]) > 1e-3
    assert facts["as much again"]


def test_nothing_is_left_behind(host) -> None:
    facts, _ = host
    assert facts["global random state untouched"] and facts["core after ours"] and facts["again"]
    assert facts["interrupted"] and facts["after interrupt"] and facts["state after interrupt"] == []


def test_weights_of_another_dtype_work(host) -> None:
    facts, latents = host
    assert facts["weights"] == "torch.float8_e4m3fn" != facts["computed in"]
    for name in ("fp8", "fp8 guided", "fp8 core store"):
        assert torch.isfinite(latents[name]).all() and latents[name].std() > 0.1


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("room", "KV Cache Budget: 5 latent frames have no room for 1 sink frame(s), a block of 4"),
        ("part", "KV Cache Budget: budget is 9.5 latent frames; use a whole number."),
        ("offload", "KV Cache Budget: offload is 4"),
        ("trained", "KV Cache Budget: trained_frames is 0; use a whole number from 1"),
        ("changed core", "AR Segment Sampler: this ComfyUI's causal Wan model has changed (no norm_k)"),
        ("no first prompt", "Segment Prompt: the first prompt begins at segment 2"),
        ("same", "Segment Prompt: from_segment is 2, where another prompt begins already"),
        ("two prompts", "AR Segment Sampler: causal blocks keep the K/V of a branch for one prompt"),
        ("density", "ANN Attention: density is 0.0"),
        ("prompt", "ANN Attention: prompt_share is 0.5 with collapse_prompt off"),
        ("no history", "ANN Attention: mode is diffusion forcing, which keeps no K/V"),
        ("no K/V", "KV Cache Budget: mode is diffusion forcing, which keeps no K/V"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(host, case, words) -> None:
    facts, _ = host
    assert words in facts["refusals"][case]
