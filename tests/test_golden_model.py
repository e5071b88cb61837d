"""The Wan layout and the whole diffusion-forcing loop against the reference implementation of SkyReels-V2."""

import math

import pytest
import torch

from accel.sampling import SegmentPlan, diffusion_forcing
from accel.schedule import skyreels_sigmas, timesteps
from accel.solver import UniPCSolver
from accel.wan_keys import fold_frame_rate
from demo.model import TinyWan, block_causal_mask
from tests.fakes import make_run, video
from tests.miniatures import GOLDEN, wan_weights

SHAPE = (1, 4, 6, 4, 6)


def wave(step: float, start: float, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.sin(step * torch.arange(math.prod(shape), dtype=torch.float64) + start).reshape(shape).float()


@pytest.fixture(scope="module")
def model() -> TinyWan:
    """The reference model with its frame rate (24: class 1) folded into the bias of the time projection."""
    made = TinyWan(GOLDEN)
    made.load_state_dict(fold_frame_rate(wan_weights(GOLDEN, frame_rate=True), 24))
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return wave(0.21, math.pi / 2, (1, 8, 32))


X = wave(0.37, 0.1, SHAPE)
LEVELS = torch.tensor([[0.1, 0.1, 0.5, 0.5, 0.9, 0.9]])


def check(found: torch.Tensor, golden, name: str, tolerance: float) -> None:
    expected = torch.tensor(golden("tiny_df_model")["outputs"][name]).reshape(found.shape)
    assert float((found - expected).abs().max()) < tolerance


def test_one_noise_level_per_latent_frame(model, text, golden):
    check(model(X, LEVELS, text), golden, "df_fps24", 1e-4)


def test_one_noise_level_for_all(model, text, golden):
    check(model(X, torch.full((1, 6), 0.5), text), golden, "sync_t500_1d", 1e-4)


@pytest.mark.parametrize("name", ["df_fps24_causal_block2", "df_fps24_flowcache_port_allactive"])
def test_block_causal_attention(model, text, golden, name):
    check(model(X, LEVELS, text, mask=block_causal_mask(6, 6, 2)), golden, name, 1e-4)


class AliasedUniPC(UniPCSolver):
    """The reference keeps a view of the latents as the start of each frame's first step and then writes the result into
    them, so its first correction starts from the latents it is to correct. Ours keeps the start, as the method says."""

    def _advance(self, x, velocity, steps, active, moving, window, computed):
        start = self._history(x)[2, :, :, window]
        start.copy_(torch.where((torch.tensor(steps).view_as(moving) == 2) & moving, x, start))
        return super()._advance(x, velocity, steps, active, moving, window, computed)


def generate(model, text) -> torch.Tensor:
    run = make_run()

    def velocity(call, x):
        told = timesteps(torch.tensor([call.sigmas], dtype=torch.float64)).float() / 1000
        conditional, unconditional = (model(x, told, prompt) for prompt in (text, -0.5 * text))
        return unconditional + 1.5 * (conditional - unconditional)

    run.denoiser.velocity = velocity
    plan = SegmentPlan(frames=6, segment=6, overlap=0, block=2, ar_step=1, steps=4)
    return video(diffusion_forcing(run, X, plan, skyreels_sigmas(4, 8.0), "unipc"))[0]


def test_a_whole_staircase_generation_with_guidance_and_unipc(model, text, golden, monkeypatch):
    ours = generate(model, text)
    monkeypatch.setattr("accel.sampling.UniPCSolver", AliasedUniPC)
    aliased = generate(model, text)
    check(aliased, golden, "gen_async_N4_ar1_blk2", 1e-3)
    assert 0.01 < float((ours - aliased).abs().max()) < 0.2
