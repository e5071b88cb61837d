"""The README's adapter drives foreign models through the library's loops, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from accel.call import Kind
from accel.engine import Acceleration, HistoryGuidedConfig, Run, SchedulerConfig
from accel.kv.frozen import FrozenConfig
from accel.policy import TriModalConfig
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing, next_clip
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from tests.fakes import video

README = Path(__file__).parents[1] / "README.md"
NOISE = torch.randn((1, 4, 12, 4, 4), generator=torch.Generator().manual_seed(1))
PROMPT, NEGATIVE = 0.4, 0.0
LEVELS = flow_sigmas(8, 3.0)


@pytest.fixture(scope="module")
def classes() -> dict[str, type]:
    """What the README's section defines."""
    section = README.read_text(encoding="utf-8").partition("## Write an adapter\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    found: dict[str, type] = {}
    exec(code, found)
    return found


def way(x, t, prompt):
    """A foreign model, all frames at once: to the data, time from noise (0) to clean (1)."""
    times = t[:, None, :, None, None]
    return torch.tanh(prompt + 0.5 * x.mean(2, keepdim=True)) - x * (1.5 - times)


def run(classes, shares_time=False, **acceleration) -> Run:
    denoiser = classes["Adapter"](way, PROMPT, NEGATIVE, 2.0, 1000)
    denoiser.shares_time = shares_time
    return Run(Acceleration(**acceleration), denoiser, Timeline())


def by_hand(x):
    """The foreign model's own Euler loop, in its own time."""
    for start, end in zip(LEVELS[:-1].tolist(), LEVELS[1:].tolist(), strict=True):
        t = torch.full((1, x.shape[2]), 1.0 - start)
        ways = way(x, t, PROMPT), way(x, t, NEGATIVE)
        x = x + (start - end) * (ways[1] + 2.0 * (ways[0] - ways[1]))
    return x


def test_it_makes_what_the_models_own_loop_makes(classes) -> None:
    made = run(classes)
    plan = SegmentPlan(12, 12, 0, 3, 0, 8)
    assert torch.allclose(video(diffusion_forcing(made, NOISE, plan, LEVELS)), by_hand(NOISE), atol=1e-5)
    totals = made.timeline.totals()
    assert totals["calls"]["recompute"] == 2 * 8 and totals["flops"] == 8 * 2 * 12 * 1000


def test_a_chunk_pipeline_and_clip_after_clip_are_accelerated(classes) -> None:
    scheduler = SchedulerConfig(TriModalConfig(0.4, 1.3), "log-snr", reach=None)
    plans = {diffusion_forcing: SegmentPlan(12, 12, 0, 3, 2, 8), next_clip: SegmentPlan(12, 6, 3, 3, 0, 8)}
    for loop, plan in plans.items():
        shared = loop is next_clip
        full, fast = run(classes, shared), run(classes, shared, scheduler=scheduler)
        expected, found = (video(loop(one, NOISE, plan, LEVELS)) for one in (full, fast))
        calls = fast.timeline.totals()["calls"]
        assert calls["predict"] + calls["cache"] > 0 and fast.timeline.totals()["flop_ratio"] > 1.1
        assert sum(calls.values()) == full.timeline.totals()["calls"]["recompute"]
        assert 0.0 < float((found - expected).norm() / expected.norm()) < 0.2


def test_a_signal_of_the_latents_works_and_another_is_refused(classes) -> None:
    plan = SegmentPlan(12, 12, 0, 3, 2, 8)
    fast = run(classes, scheduler=SchedulerConfig(TriModalConfig(0.3, 1.0), "latent", reach=None))
    assert bool(video(diffusion_forcing(fast, NOISE, plan, LEVELS)).isfinite().all())
    assert fast.timeline.totals()["flop_ratio"] > 1.0
    with pytest.raises(ValueError, match="no signal modulated; use latent"):
        guided = run(classes, history_guided=HistoryGuidedConfig(0.1, "mod"))
        list(diffusion_forcing(guided, NOISE, SegmentPlan(12, 6, 3, 3, 0, 8), LEVELS))


def test_what_it_cannot_keep_is_off_and_changes_nothing(classes) -> None:
    plan = SegmentPlan(12, 6, 3, 3, 1, 8)
    kept, full = run(classes, frozen_window=FrozenConfig(3)), run(classes)
    assert torch.equal(*(video(diffusion_forcing(one, NOISE, plan, LEVELS)) for one in (kept, full)))
    assert kept.timeline.totals()["flop_ratio"] == 1.0


class Store:
    """A K/V store of a foreign causal model: the clean mean of every frame before, and what the last forward wrote."""

    def __init__(self) -> None:
        self.start = self.end = 0
        self.frames = torch.zeros(64)

    def forward(self, x, t, prompt):
        assert self.start == self.end
        self.frames[self.end : self.end + x.shape[2]] = x.mean((0, 1, 3, 4))
        seen = self.frames[: self.end + x.shape[2]].mean()
        return torch.tanh(prompt + seen) - x * (1.5 - t[:, None, :, None, None])


def test_a_model_with_its_own_store_runs_block_by_block(classes) -> None:
    store = Store()
    denoiser = classes["CausalAdapter"](store.forward, PROMPT, NEGATIVE, 2.0, 1000, store=store)
    made = Run(Acceleration(), denoiser, Timeline())
    latents = video(causal_blocks(made, NOISE, 3, LEVELS))
    assert store.end == 12 and torch.allclose(store.frames[:12], latents.mean((0, 1, 3, 4)), atol=1e-5)
    assert made.timeline.totals()["calls"] == {"recompute": 64, "predict": 0, "cache": 0, "commit": 8}
    scheduler = SchedulerConfig(TriModalConfig(0.4, 1.3), "log-snr", reach=None)
    again = Store()
    denoiser = classes["CausalAdapter"](again.forward, PROMPT, NEGATIVE, 2.0, 1000, store=again)
    fast = Run(Acceleration(scheduler=scheduler), denoiser, Timeline())
    close = video(causal_blocks(fast, NOISE, 3, LEVELS))
    assert again.end == 12 and fast.timeline.totals()["calls"]["commit"] == 8
    assert fast.timeline.totals()["flop_ratio"] > 1.1
    assert float((close - latents).norm() / latents.norm()) < 0.2


def test_only_clean_passes_move_the_store(classes) -> None:
    moved, store = [], Store()
    adapter = classes["CausalAdapter"](store.forward, PROMPT, NEGATIVE, 2.0, 1000, store=store)
    for kind in Kind:
        call = SimpleNamespace(kind=kind, offset=store.end, frames=(0, 2), sigmas=(0.5, 0.5))
        before = store.end
        adapter.velocity(call, NOISE[:, :, :2])
        moved.append((kind, store.end - before))
    assert moved == [(Kind.DENOISE, 0), (Kind.COMMIT, 2), (Kind.PREFILL, 2)]
