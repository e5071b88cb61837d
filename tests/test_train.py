import argparse
import json
import math
import threading
from functools import partial

import pytest
import torch
from torch import Tensor

from demo import train
from demo.codec import TinyCodec
from demo.data import render, simulate
from demo.model import TinyConfig, TinyWan, load_model, save_model
from demo.prompt import embed_text, pack
from demo.train import Together, between, curve_until, newest
from demo.train_forward import HalfForward, stretches
from demo.train_muon import Muon, orthogonalise
from demo.train_objective import TAUGHT_GUIDANCE, Objective, clip_levels, forget, noise_levels, teacher_mask


def test_newton_schulz_brings_all_singular_values_close_to_one():
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for shape in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(shape))
        assert float(values.min()) > 0.5 and float(values.max()) < 1.4


def test_muon_descends():
    weight = torch.nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
    optimiser, losses = Muon([weight], 0.1), []
    for _ in range(100):
        loss = (weight - torch.eye(16)).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_noise_levels_mix_clean_prefixes_staircases_and_free_frames():
    sigma = noise_levels(torch.Generator().manual_seed(2), 400, 16)
    assert sigma.shape == (400, 16) and sigma.min() >= 0 and sigma.max() <= 1
    prefixed = (sigma[:, 0] == 0).float().mean()
    assert 0.72 < float(prefixed) < 0.87
    rising = (sigma.diff() >= 0).all(1).float().mean()
    assert 0.3 < float(rising) < 0.9


def test_levels_are_of_all_heights_and_often_near_pure_noise():
    level = clip_levels(torch.Generator().manual_seed(4), 4000)
    assert level.shape == (4000, 1) and level.min() >= 0 and level.max() <= 1
    assert 0.18 < float((level > 0.95).float().mean()) < 0.27  # 0.03 of logit-normal ones
    assert 0.1 < float((level < 0.5).float().mean()) < 0.25
    frames = noise_levels(torch.Generator().manual_seed(4), 4000, 16)
    assert 0.3 < float(((frames > 0.95) & (frames < 1)).any(1).float().mean()) < 0.4


def test_some_histories_forget_one_shape_up_to_the_end_of_a_block():
    scenes = simulate(5, 400, 16)
    chosen, few = forget(scenes, torch.Generator().manual_seed(3))
    assert 0.03 < float(chosen.float().mean()) < 0.09
    gone = few.centre[..., 0] < -500
    assert gone[:, :4].any(2).all(), "the first block lacks a shape"
    assert (gone.any(1).sum(1) == 1).all() and few.present[gone.any(1)].all(), "one, of those that the prompt names"
    until = gone.any(2).sum(1)
    assert set((until % 4).tolist()) == {0} and len(set(until.tolist())) > 1
    kept = ~gone[..., None].expand_as(few.centre)
    assert torch.equal(few.centre[kept], scenes.centre[chosen][kept])


def test_history_differs_from_the_clip_where_it_slipped_or_forgot():
    objective = Objective("tiny-df", TinyCodec.load(), 64, torch.device("cpu"))
    x0, history, _ = objective.clips(5, 16, torch.Generator().manual_seed(3))
    off = (x0 - history).square().mean((1, 3, 4))
    same, forgotten = off.amax(1) == 0, off[:, 0] > 0.05
    assert same.float().mean() > 0.3 and 1 <= int(forgotten.sum()) <= 12
    assert off[~forgotten].max() < 0.015, "a slip is small"


def test_teacher_forcing_shows_a_noisy_block_the_clean_blocks_before_it_and_itself():
    mask = teacher_mask(frames=4, tokens=1, block=2)
    clean, noisy = mask[:2], mask[2:]
    assert clean.int().tolist() == [[1, 1, 0, 0, 0, 0]] * 2
    assert noisy[:2].int().tolist() == [[0, 0, 1, 1, 0, 0]] * 2
    assert noisy[2:].int().tolist() == [[1, 1, 0, 0, 1, 1]] * 2


def test_stretches_say_what_the_mask_says():
    free = torch.rand(5, 5, generator=torch.Generator().manual_seed(4)) < 0.5
    free.fill_diagonal_(True)
    for mask in (teacher_mask(8, 3, 2), free, torch.ones(3, 3, dtype=torch.bool)):
        lengths, groups = stretches(mask)
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        said = torch.zeros_like(mask)
        for group in groups:
            assert len({(lengths[one], sum(lengths[other] for other in seen)) for one, seen in group}) == 1
            for one, seen in group:
                for other in seen:
                    rows = slice(starts[one], starts[one] + lengths[one])
                    said[rows, starts[other] : starts[other] + lengths[other]] = True
        assert torch.equal(said, mask)
    assert len(stretches(teacher_mask(8, 3, 2))[1]) == 4, "a clean block and the noisy one of its time go together"


def test_every_regime_gives_a_finite_loss_that_repeats():
    for kind in ("tiny-df", "tiny-next-clip", "tiny-causal"):
        torch.manual_seed(0)
        model = TinyWan(TinyConfig(dim=48, ffn_dim=64, num_layers=1, num_heads=2))
        objective = Objective(kind, TinyCodec.load(), 1, torch.device("cpu"))
        with torch.no_grad():
            losses = [objective.loss(model, seed).item() for seed in (5, 5, 22)]
        assert losses[0] == losses[1] != losses[2]
        assert all(math.isfinite(loss) and 0.1 < loss < 20 for loss in losses)


def test_distillation_gives_a_finite_loss_and_a_perfect_student_has_none():
    torch.manual_seed(0)
    config = TinyConfig(dim=48, ffn_dim=64, num_layers=1, num_heads=2)
    model, teacher = TinyWan(config), TinyWan(config)
    objective = Objective("tiny-causal", TinyCodec.load(), 1, torch.device("cpu"), teacher)
    with torch.no_grad():
        assert 0.01 < objective.loss(model, 5).item() < 20
        for network in (model, teacher):
            network.head.head.weight.zero_()
            network.head.head.bias.fill_(0.25)  # heeds no prompt, so that guidance changes nothing
        assert objective.loss(model, 5).item() < 1e-8


def test_a_first_block_is_guided_more_than_those_with_history():
    objective = Objective(
        "tiny-causal", TinyCodec.load(), 1, torch.device("cpu"), TinyWan(TinyConfig(dim=48, num_heads=2))
    )
    x, context = torch.zeros(2, 16, 12, 8, 8), torch.ones(2, 64, 64)

    def answer(network, x, sigma, context):
        assert network is objective.teacher
        return 1 + context[:, :1, :1, None, None].expand_as(x)

    guided = objective.guided(x, torch.ones(2, 12), context, answer)
    first, later = TAUGHT_GUIDANCE
    assert torch.equal(guided[:, :, :4], torch.full((2, 16, 4, 8, 8), 1 + first))
    assert torch.equal(guided[:, :, 4:], torch.full((2, 16, 8, 8, 8), 1 + later)) and first > later


def test_the_mean_of_weights_is_written_and_other_models_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MODELS", tmp_path)
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        save_model(TinyWan(TinyConfig(dim=48, ffn_dim=64, num_layers=1, num_heads=2, kind="tiny-causal")), file)
    train.soup("tiny-causal", files)
    made = load_model(tmp_path / "tiny-causal.safetensors").state_dict()
    parts = [load_model(file).state_dict() for file in files]
    assert all(torch.allclose(made[name], sum(part[name] for part in parts) / 3, atol=1e-3) for name in made)
    with pytest.raises(SystemExit, match="holds a tiny-causal; give weights of tiny-df"):
        train.soup("tiny-df", files)


def test_resampled_history_is_the_models_own_after_a_given_block(monkeypatch):
    objective = Objective("tiny-causal", TinyCodec.load(), 4, torch.device("cpu"))
    torch.manual_seed(6)
    x0, history, context = torch.randn(4, 16, 12, 8, 8), torch.randn(4, 16, 12, 8, 8), torch.randn(4, 64, 64)
    calls: list[Tensor] = []

    def straight(network, own, x, sigma, context):  # leads to the clip
        calls.append(own)
        return (x - x0[:2]) / sigma[:, None, :, None, None]

    monkeypatch.setattr(objective, "after", straight)
    for seed in range(8):
        calls.clear()
        own = objective.resampled(None, x0, history, context, torch.Generator().manual_seed(seed))
        assert torch.equal(own[2:], history[2:]) and torch.equal(own[:2, :, :4], history[:2, :, :4])
        assert torch.allclose(own[:2, :, 4:], x0[:2, :, 4:], atol=1e-4)
        assert torch.equal(calls[0], history[:2]) and len(calls) in (2, 4)
        if len(calls) == 4:
            assert torch.allclose(calls[2], own[:2], atol=1e-4), "errors add up: the second time follows the first"
    calls.clear()
    one = history[:, :, :4]
    assert objective.resampled(None, x0[:, :, :4], one, context, torch.Generator()) is one and not calls


def test_what_is_written_after_distillation_lies_between_teacher_and_student():
    teacher, student = {"w": torch.zeros(3)}, {"w": torch.full((3,), 5.0)}
    for share in (0.0, 0.4, 1.0):
        assert torch.equal(between(teacher, student, share)["w"], torch.full((3,), 5.0 * share))


def test_distillation_that_is_resumed_keeps_its_first_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TinyConfig", lambda: TinyConfig(dim=48, ffn_dim=64, num_layers=1, num_heads=2))
    for name, folder in (("WEIGHTS", tmp_path), ("MODELS", tmp_path / "models"), ("STATE", tmp_path / "state")):
        monkeypatch.setattr(train, name, folder)
    monkeypatch.setattr(train, "HalfForward", lambda compiled: None)
    file = tmp_path / "models" / "tiny-causal.safetensors"
    torch.manual_seed(0)
    file.parent.mkdir()
    save_model(TinyWan(TinyConfig(dim=48, ffn_dim=64, num_layers=1, num_heads=2, kind="tiny-causal")), file)
    first = load_model(file).state_dict()
    for steps in (1, 2):
        options = argparse.Namespace(
            kind="tiny-causal", steps=steps, seed=7, clips=1, rate=1.0, start=None, distil=True, share=0.4, eager=True
        )
        train.train(0, options, Together(1, 1))
        state = torch.load(tmp_path / "state" / "tiny-causal-distilled.pt")
        assert state["step"] == steps
        assert all(torch.equal(value, first[name]) for name, value in state["teacher"].items())
        written = load_model(file).state_dict()
        wanted = between(state["teacher"], state["average"], 0.4)
        assert all(torch.allclose(value, wanted[name], atol=1e-3) for name, value in written.items())
        assert any(not torch.equal(value, first[name]) for name, value in written.items())


def test_forward_pass_in_bfloat16_gives_the_answer_and_gradients_of_the_model():
    torch.manual_seed(0)
    model = TinyWan(TinyConfig(dim=96, ffn_dim=128, num_layers=2, num_heads=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, sigma = torch.randn(2, 16, 10, 4, 4), torch.rand(2, 10)
    context, bias = pack(torch.cat([embed_text(text) for text in ("red disc, blue square, pan", "")]))
    wanted, half = torch.randn_like(x), HalfForward(compiled=False)

    def plain(x, sigma, context, positions, mask, bias):
        return model(x, sigma, context, positions, mask, bias=bias)

    for mask in (None, teacher_mask(6, 4, 2)):
        results = []
        for forward in (plain, partial(half, model)):
            model.zero_grad()
            answer = forward(x, sigma, context, torch.arange(10), mask, bias)
            (answer - wanted).square().mean().backward()
            results.append([answer.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        for own, reference in zip(*results[::-1], strict=True):
            assert (own - reference).norm() < 0.03 * reference.norm()


def test_training_starts_from_what_was_trained_further_then_from_the_released(tmp_path, monkeypatch):
    released, further = tmp_path / "released", tmp_path / "further"
    monkeypatch.setattr(train, "MODELS", released)
    monkeypatch.setattr(train, "STATE", further)
    assert newest("tiny-causal", "tiny-df") is None
    for folder, kind in ((released, "tiny-df"), (further, "tiny-df"), (released, "tiny-causal")):
        folder.mkdir(exist_ok=True)
        (folder / f"{kind}.safetensors").touch()
        assert newest("tiny-causal", "tiny-df") == folder / f"{kind}.safetensors"


def test_a_loss_curve_goes_on_where_that_of_the_weights_ended(tmp_path, monkeypatch):
    released, further = tmp_path / "weights" / "diffusion_models", tmp_path / "further"
    for name, folder in (("WEIGHTS", released.parent), ("MODELS", released), ("STATE", further)):
        monkeypatch.setattr(train, name, folder)
        folder.mkdir(parents=True, exist_ok=True)
    assert curve_until(None, "tiny-df") == curve_until(released / "tiny-df.safetensors", "tiny-df") == []
    for folder, loss in ((released.parent, 0.3), (further, 0.2)):
        (folder / "tiny-df.loss.json").write_text(json.dumps({"steps": 50, "curve": [[25, 1.0], [50, loss]]}))
    assert curve_until(released / "tiny-df.safetensors", "tiny-df") == [(25, 1.0), (50, 0.3)]
    assert curve_until(further / "tiny-df.safetensors", "tiny-df") == [(25, 1.0), (50, 0.2)]
    assert curve_until(further / "tiny-df.safetensors", "tiny-causal") == []
    assert curve_until(further / "tiny-causal.safetensors", "tiny-causal-distilled") == []


def test_packed_prompt_gives_the_same_answer():
    torch.manual_seed(0)
    model = TinyWan(TinyConfig(dim=48, ffn_dim=64, num_layers=2, num_heads=2)).double()
    x, sigma = torch.randn(1, 16, 4, 4, 4, dtype=torch.float64), torch.full((1, 4), 0.5)
    for text in ("red disc, blue square, cyan diamond, gravity, pan", "red disc", ""):
        context = embed_text(text).double()
        short, bias = pack(context)
        torch.testing.assert_close(model(x, sigma, short, bias=bias.double()), model(x, sigma, context))


def test_workers_take_the_mean_of_their_parameters():
    together = Together(2, 4)
    models = [torch.nn.Linear(3, 1) for _ in range(2)]
    mean = torch.stack([torch.nn.utils.parameters_to_vector(model.parameters()) for model in models]).mean(0)
    threads = [threading.Thread(target=together.average, args=pair) for pair in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for model in models:
        torch.testing.assert_close(torch.nn.utils.parameters_to_vector(model.parameters()), mean)


def test_coarse_channels_of_the_codec_stand_out_of_the_noise_first():
    codec = TinyCodec.load()
    deviation = codec.encode(render(simulate(3, 100, 2))).std((0, 2, 3, 4))
    assert abs(float(deviation.square().mean()) - 1) < 0.1
    assert float(deviation[0]) > 1.5 > 0.8 > float(deviation[-1])
