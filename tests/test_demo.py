"""The embedded default: data, codec, prompts, judge, transformer and denoiser."""

import math

import pytest
import torch

from accel.call import Call, Kind
from accel.engine import Acceleration
from accel.kv.store import KVStore
from accel.metrics import psnr
from accel.sampling import SegmentPlan
from demo.codec import TinyCodec
from demo.data import COLOURS, KINDS, SIZE, render, simulate, visible_labels
from demo.denoiser import TinyDenoiser
from demo.generate import fewer_steps, sample, sample_causal, start_noise
from demo.judge import attribute_accuracy, clear, held_out_accuracy, load_judge, read, track
from demo.model import TinyConfig, TinyWan, block_causal_mask, load_model, save_model
from demo.prompt import VECTORS, describe, embed_scenes, embed_text, parse


def tiny(**changes) -> TinyWan:
    torch.manual_seed(0)
    config = TinyConfig(dim=48, ffn_dim=64, num_layers=2, num_heads=2, **changes)
    return TinyWan(config).eval().requires_grad_(False)


def test_clips_repeat_by_seed_and_shapes_stay_inside():
    scenes, again = simulate(5, 6, 12), simulate(5, 6, 12)
    assert torch.equal(render(scenes), render(again))
    frames = render(scenes)
    assert frames.shape == (6, 3, 12, SIZE, SIZE) and frames.min() >= 0 and frames.max() <= 1
    assert bool((scenes.centre >= scenes.radius[:, None, :, None] - 1e-4).all())
    assert bool((scenes.centre <= SIZE - scenes.radius[:, None, :, None] + 1e-4).all())
    assert not torch.equal(render(simulate(6, 6, 12)), frames)


def test_shapes_of_a_clip_have_colours_of_their_own_and_are_labelled_where_seen():
    scenes = simulate(1, 50, 2, cuts=0.0)
    assert all(len(set(row.tolist())) == 3 for row in scenes.colour)
    kind, colour = visible_labels(scenes)
    assert bool(((kind > 0) == (colour > 0)).all())
    assert 0.1 < float((colour > 0).float().mean()) < 0.3


def test_the_codec_keeps_33_db_of_held_out_clips():
    codec, clips = TinyCodec.load(), render(simulate(31337, 24, 3))
    assert psnr(clips, codec.decode(codec.encode(clips))) >= 33.0
    latents = codec.encode(clips)
    assert latents.shape == (24, 16, 3, 8, 8)
    assert abs(float(latents.square().mean()) - 1) < 0.15


def test_the_codec_refuses_what_it_cannot_code():
    with pytest.raises(ValueError, match="divisible by 8"):
        TinyCodec.load().encode(torch.zeros(1, 3, 2, 60, 64))
    with pytest.raises(ValueError, match="must be .batch, 16"):
        TinyCodec.load().decode(torch.zeros(1, 4, 2, 8, 8))


def test_prompts_say_what_is_simulated():
    scenes = simulate(3, 8, 1)
    assert torch.allclose(embed_text(describe(scenes, 2))[0].sum(0), embed_scenes(scenes)[2].sum(0), atol=1e-5)
    assert embed_text("").abs().sum() == 0
    similarity = torch.nn.functional.cosine_similarity(VECTORS[:, None], VECTORS[None], dim=-1)
    assert float((similarity - torch.eye(len(VECTORS))).abs().max()) < 0.5


@pytest.mark.parametrize(
    "text", ["red cube", "red disc, red square", "gravity", "red disc, blue disc, green disc, cyan disc"]
)
def test_prompts_that_cannot_be_shown_are_refused(text):
    with pytest.raises(ValueError, match="Tiny AR Prompt"):
        parse(text)


def test_the_judge_reads_real_clips():
    judge = load_judge()
    assert held_out_accuracy(judge, 77) >= 0.95
    scenes = simulate(78, 24, 4, cuts=0.0)
    seen = read(judge, render(scenes))
    error = (track(seen, scenes.colour) - scenes.centre).norm(dim=-1)[clear(scenes)]
    assert float(error.nanmean()) < 1.0
    wrong = scenes.kind.clone()
    scenes.kind = (wrong + 1) % len(KINDS)
    assert float(attribute_accuracy(seen, scenes, clear(simulate(78, 24, 4, cuts=0.0))).mean()) < 0.1
    assert seen.area.shape == (24, 4, len(COLOURS))


def test_blocks_with_a_store_equal_the_block_causal_mask():
    model = tiny(causal_ar=True)
    x, context = torch.randn(1, 16, 6, 4, 4), torch.randn(1, 8, 64)
    sigma = torch.rand(1, 6)
    whole = model(x, sigma, context, mask=block_causal_mask(6, 4, 2))
    store, pieces = KVStore(2, 24), []
    for first in (0, 2, 4):
        part = slice(first, first + 2)
        pieces.append(model(x[:, :, part], sigma[:, part], context, torch.arange(first, first + 2), store=store))
        store.commit()
    assert torch.allclose(torch.cat(pieces, 2), whole, atol=1e-5)


def test_a_store_that_is_too_small_is_refused():
    store = KVStore(1, 4)
    store.append(0, torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2))
    store.commit()
    with pytest.raises(ValueError, match="5 tokens do not fit the 4"):
        store.append(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))


def test_checkpoints_round_trip(tmp_path):
    model = tiny()
    save_model(model, tmp_path / "model.safetensors", torch.float32)
    again = load_model(tmp_path / "model.safetensors")
    x, sigma, context = torch.randn(1, 16, 2, 4, 4), torch.rand(1, 2), torch.randn(1, 8, 64)
    assert again.config == model.config
    assert torch.equal(again(x, sigma, context), model(x, sigma, context))


def test_guidance_mixes_the_branches_and_one_runs_a_single_one():
    model, x = tiny(), torch.randn(1, 16, 2, 4, 4)
    context = embed_text("red disc")
    call = Call(Kind.DENOISE, 0, 0, (0, 2), (0.5, 0.4), (1, 1), (True, True), total_steps=4)
    one, two = (TinyDenoiser(model, context, guidance).sized(x) for guidance in (1.0, 3.0))
    sigma = torch.tensor([[0.5, 0.4]])
    conditional, unconditional = model(x, sigma, context), model(x, sigma, torch.zeros_like(context))
    assert torch.allclose(one.velocity(call, x), conditional, atol=1e-6)
    assert torch.allclose(two.velocity(call, x), unconditional + 3 * (conditional - unconditional), atol=1e-5)
    assert two.flops(call, 2) == 2 * one.flops(call, 2)


def test_a_causal_rollout_commits_every_block_and_repeats():
    model, noise = tiny(causal_ar=True, kind="tiny-causal"), start_noise(3, 12, 4)
    runs = [sample_causal(model, embed_text("red disc"), noise, steps=3) for _ in range(2)]
    assert torch.equal(runs[0].latents, runs[1].latents)
    assert runs[0].timeline.totals()["calls"] == {"recompute": 9, "predict": 0, "cache": 0, "commit": 3}


def test_a_next_clip_model_is_told_one_time():
    model, noise = tiny(kind="tiny-next-clip"), start_noise(3, 8, 4)
    result = sample(model, embed_text("red disc"), noise, Acceleration(), SegmentPlan(8, 4, 2, 2, 0, 3))
    assert result.latents.shape == noise.shape
    denoiser = TinyDenoiser(model, embed_text("red disc")).sized(noise)
    call = Call(
        Kind.DENOISE, 1, 0, (0, 4), (0.0, 0.0, 0.7, 0.7), (4, 4, 1, 1), (False, False, True, True), total_steps=3
    )
    assert denoiser._told(call, noise[:, :, :4]).tolist() == [pytest.approx([0.7] * 4)]


def test_start_noise_is_what_a_seed_draws_in_the_host():
    torch.manual_seed(9)
    expected = torch.randn(1, 16, 4, 8, 8)
    assert torch.equal(start_noise(9, 4), expected)
    assert torch.equal(start_noise([8, 9], 4)[1:], expected)


@pytest.mark.parametrize("ratio", [1.0, 1.7, 2.5, 3.0, 4.6, 20.0])
def test_the_fewer_steps_run_never_costs_less_than_what_it_is_compared_with(ratio):
    plan = SegmentPlan(52, 16, 4, 4, 5, 50)
    target = int(plan.calls() * 1000 / ratio)
    shorter = fewer_steps(plan, target, 1000)
    assert shorter.calls() * 1000 >= target
    assert shorter.steps == 1 or math.isclose(shorter.ar_step, 5 * shorter.steps / 50, abs_tol=0.5)
    cheaper = fewer_steps(plan, target - 1000 * 60, 1000)
    assert cheaper.steps <= shorter.steps


@pytest.mark.parametrize("kind", ["latent", "timestep", "modulated", "block0"])
def test_every_feature_of_the_denoiser_has_a_row_per_latent_frame(kind):
    x = torch.randn(1, 16, 20, 8, 8)
    denoiser = TinyDenoiser(tiny(), embed_text("red disc"), 2.0).sized(x)
    call = Call(Kind.DENOISE, 0, 0, (0, 20), (0.5,) * 20, (1,) * 20, (True,) * 20, total_steps=1)
    feature = denoiser.feature(kind, call, x)
    assert feature.shape[:2] == (1, 20)
    if kind == "latent":
        assert torch.equal(feature[:, 3], x[:, :, 3])
