"""History guidance: the branch that is subtracted sees noise where the history is, and nothing else differs."""

from __future__ import annotations

import pytest
import torch

from accel.call import Call, Kind
from accel.engine import Acceleration
from accel.history_guidance import history_noise, without_history
from accel.kv.budget import KVBudgetConfig
from accel.kv.frozen import FrozenConfig
from accel.sampling import SegmentPlan
from demo.codec import TinyCodec
from demo.data import render, simulate
from demo.denoiser import TinyDenoiser
from demo.generate import load, sample, start_noise
from demo.model import TinyConfig, TinyWan
from demo.prompt import embed_scenes, embed_text

TEXT = embed_text("red disc, blue square")
X = torch.randn(2, 16, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def tiny(kind: str = "tiny-df") -> TinyWan:
    torch.manual_seed(0)
    model = TinyWan(TinyConfig(num_layers=2, kind=kind, causal_ar=kind == "tiny-causal")).eval()
    torch.nn.init.normal_(model.head.head.weight, std=0.02)
    return model


def call(offset: int = 8, first: int = 0, history: int = 2) -> Call:
    sigmas = (0.0,) * history + (0.7, 0.9, 1.0, 1.0)[: 4 - history]
    steps = (11,) * history + (3, 2, 1, 1)[: 4 - history]
    active = tuple(step <= 10 for step in steps)
    return Call(
        Kind.DENOISE, 1, 0, (first, first + 4), sigmas, steps, active, offset, total_steps=10, given=first + history
    )


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize("kind", ["tiny-df", "tiny-next-clip"])
def test_guidance_draws_away_from_the_model_without_history(kind: str, strength: float) -> None:
    model, told = tiny(kind), torch.tensor([[0.0, 0.0, 0.7, 0.9]]).expand(2, -1)
    text = TEXT.expand(2, -1, -1)
    noise, hidden, level = history_noise(call(), X.shape, X.device), X.clone(), told.clone()
    shown = strength if kind == "tiny-df" else strength * 0.9
    hidden[:, :, :2] = (1 - shown) * X[:, :, :2] + shown * noise[:, :, :2]
    if kind == "tiny-df":
        level[:, :2] = strength
    else:
        told = level = torch.full_like(told, 0.9)
    with torch.inference_mode():
        seeing, blind = model(X, told, text), model(hidden, level, torch.zeros_like(text))
        made = TinyDenoiser(model, text, 3.0, history_guidance=strength).sized(X).velocity(call(), X)
    torch.testing.assert_close(made, blind + 3 * (seeing - blind), rtol=1e-4, atol=1e-5)
    plain = TinyDenoiser(model, text, 3.0).sized(X).velocity(call(), X)
    assert not torch.allclose(made, plain, atol=1e-4)


def test_without_history_in_the_window_it_changes_nothing() -> None:
    told = torch.tensor([[0.7, 0.9, 1.0, 1.0]]).expand(2, -1)
    x, level = without_history(call(history=0), X, told, 1.0, False, history_noise(call(), X.shape, X.device))
    assert torch.equal(x, X) and torch.equal(level, told)


def test_a_latent_frame_has_the_same_noise_wherever_the_window_lies() -> None:
    one = history_noise(call(offset=8, first=0), X.shape, X.device)
    two = history_noise(call(offset=6, first=1), X.shape, X.device)
    assert torch.equal(one[:, :, :3], two[:, :, 1:]) and not torch.equal(one, two)
    assert one.std() == pytest.approx(1, abs=0.1)


def test_keys_and_values_that_are_kept_of_the_history_are_of_each_branch_own() -> None:
    """Renewed before every call, kept K/V change nothing; the history's are noise in one branch."""
    plan, noise = SegmentPlan(12, 8, 4, 4, 0, 4), start_noise(3, 12, 4)
    kept = Acceleration(frozen_window=FrozenConfig(1e-9))
    plain, renewed = (sample(tiny(), TEXT, noise, given, plan, history_guidance=1.0).latents for given in (None, kept))
    torch.testing.assert_close(plain, renewed, rtol=1e-4, atol=1e-5)


def test_a_trained_model_keeps_closer_to_the_motion_of_its_history() -> None:
    """Its continuations of real clips come closer to what the simulation does, from the same start noise."""
    scenes = simulate(31, 8, 16, cuts=0.0)
    latents = TinyCodec.load().encode(render(scenes))
    plan, noise = SegmentPlan(16, 16, 4, 4, 0, 8), start_noise(list(range(8)), 16)
    error = []
    for history_guidance in (0.0, 1.0):
        made = sample(
            load("tiny-df"), embed_scenes(scenes), noise, None, plan, prefix=latents[:, :, :4],
            history_guidance=history_guidance,
        ).latents  # fmt: skip
        error.append(float((made - latents)[:, :, 4:].square().mean()))
    assert error[1] < 0.9 * error[0], error


@pytest.mark.parametrize("budget", [None, KVBudgetConfig(frames=8, sink=1)])
def test_a_causal_models_branch_reads_its_own_block_alone(budget: KVBudgetConfig | None) -> None:
    """By hand: the branch that sees, with a store; the other one without, at the same places in time."""
    model, noise = tiny("tiny-causal"), start_noise([3, 4], 12)
    text, other = TEXT.expand(2, -1, -1), embed_text("green diamond").expand(2, -1, -1)
    made = TinyDenoiser(model, text, 3.0, 12, budget=budget, history_guidance=1.0, negative=other).sized(noise)
    seeing = TinyDenoiser(model, text, 1.0, 12, budget=budget).sized(noise)
    for start in range(0, 12, 4):
        for kind, level in ((Kind.DENOISE, 0.8), (Kind.COMMIT, 0.0)):
            one = Call(kind, 0, 0, (0, 4), (level,) * 4, (1,) * 4, (True,) * 4, start, total_steps=1)
            x = noise[:, :, start : start + 4]
            with torch.inference_mode():
                told, places = torch.full((2, 4), level), torch.arange(start, start + 4)
                seen, blind = seeing.velocity(one, x), model(x, told, other, places)
            torch.testing.assert_close(made.velocity(one, x), blind + 3 * (seen - blind), rtol=1e-4, atol=1e-5)
            kept, room = seeing.flops(one, 4), made.flops(one, 4)
            alone = 2 * made.shape.forward_flops(4, 16, 4 * 16)
            assert room == pytest.approx(kept + alone, rel=1e-6), start
            assert made.full_flops(one, 4) == pytest.approx(seeing.full_flops(one, 4) + alone, rel=1e-6)


def test_a_causal_models_branch_keeps_nothing() -> None:
    plain, forgetful = (
        TinyDenoiser(tiny("tiny-causal"), TEXT, 2.0, 12, budget=KVBudgetConfig(frames=12, sink=0), history_guidance=on)
        for on in (0.0, 1.0)
    )
    for denoiser in (plain, forgetful):
        denoiser.sized(X[:1]).velocity(Call(Kind.COMMIT, 0, 0, (0, 4), (0.0,) * 4, (1,) * 4, (True,) * 4), X[:1])
    assert forgetful.kept_bytes == plain.kept_bytes / 2 > 0


def test_by_the_prompt_in_both_branches_only_the_history_guides() -> None:
    model, told = tiny(), torch.tensor([[0.7, 0.9, 1.0, 1.0]]).expand(2, -1)
    text = TEXT.expand(2, -1, -1)
    guided = TinyDenoiser(model, text, 3.0, history_guidance=1.0, negative=text).sized(X)
    with torch.inference_mode():
        torch.testing.assert_close(guided.velocity(call(history=0), X), model(X, told, text), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "guidance", "strength", "why"),
    [("tiny-df", 1.0, 1.0, "cfg is 1"), ("tiny-causal", 2.0, 0.5, "nothing between"), ("tiny-df", 2.0, 1.5, "is 1.5"),
     ("tiny-df", 2.0, float("nan"), "is nan")],
)  # fmt: skip
def test_what_cannot_be_is_refused(kind: str, guidance: float, strength: float, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TinyDenoiser(tiny(kind), TEXT, guidance, history_guidance=strength)
