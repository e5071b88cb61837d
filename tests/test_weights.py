"""The committed checkpoints: small, readable and trained."""

import json

import pytest
import torch
from safetensors import safe_open

from accel.sampling import SegmentPlan
from demo.codec import WEIGHTS, TinyCodec
from demo.data import render, simulate
from demo.evaluate import figures_table, segment_accuracy
from demo.generate import load, sample, sample_causal, start_noise
from demo.judge import load_judge, read
from demo.model import MODELS, block_causal_mask, load_model
from demo.prompt import embed_scenes

KINDS = ("tiny-df", "tiny-next-clip", "tiny-causal")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_small_and_says_what_it_is(kind):
    path = MODELS / f"{kind}.safetensors"
    assert path.stat().st_size <= 9_000_000
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["config"])["transformer"]
    assert told["num_heads"] == 3 and told["text_dim"] == 64
    assert told.get("causal_ar", False) == (kind == "tiny-causal")
    curve = json.loads((WEIGHTS / f"{kind}.loss.json").read_text())["curve"]
    assert min(loss for _, loss in curve) < 0.3 and (kind != "tiny-df" or curve[-1][1] < 0.5 * curve[0][1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_denoises_held_out_clips(kind):
    scenes = simulate(123_456, 4, 16, cuts=0.0)
    x0 = TinyCodec.load().encode(render(scenes))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    mask = block_causal_mask(16, 16, 4) if kind == "tiny-causal" else None
    with torch.inference_mode():
        found = load_model(MODELS / f"{kind}.safetensors")(
            torch.lerp(x0, noise, 0.6), torch.full((4, 16), 0.6), embed_scenes(scenes), mask=mask
        )
    error = (found - (noise - x0)).square().mean() / (noise - x0).square().mean()
    assert float(error) < 0.2


def test_the_models_show_what_the_prompt_asks_for():
    """A small version of ``demo.evaluate``: sixteen prompts, four latent frames; the causal model in four steps."""
    scenes = simulate(900, 16, 4, cuts=0.0)
    context, noise = embed_scenes(scenes), start_noise(list(range(16)), 4)
    plan = SegmentPlan(frames=4, segment=4, overlap=0, block=4, steps=20)
    forced = sample(load("tiny-df"), context, noise, plan=plan)
    few = sample_causal(load("tiny-causal"), context, noise, steps=4, shift=5.0, renoise_seed=0)
    for made in (forced, few):
        reading = read(load_judge(), TinyCodec.load().decode(made.latents))
        (accuracy,) = segment_accuracy(reading, scenes, [(0, 4)])
        assert accuracy >= 0.6


def test_the_model_card_has_the_figures_of_the_last_evaluation():
    known = json.loads((WEIGHTS / "quality.json").read_text())
    assert figures_table(known) in (WEIGHTS / "README.md").read_text(encoding="utf-8")
