"""What combines with what: every subset of the acceleration parts keeps the rules, or is refused with a reason."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest
import torch

from accel.attention.ann import AnnConfig
from accel.call import Kind
from accel.chunks import ChunkConfig
from accel.correct import CorrectionConfig
from accel.engine import Acceleration, HistoryGuidedConfig, Run, SchedulerConfig
from accel.kv.budget import KVBudgetConfig
from accel.kv.frozen import FrozenConfig
from accel.policy import TriModalConfig
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing, next_clip
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.denoiser import TinyDenoiser
from demo.model import TinyConfig, TinyWan
from tests.fakes import SmoothDenoiser, make_run, video

PLAN = SegmentPlan(frames=10, segment=6, overlap=2, block=2, ar_step=2, steps=8)
CLIPS = SegmentPlan(frames=10, segment=6, overlap=2, block=2, ar_step=0, steps=8)
TABLE = flow_sigmas(8, 3.0)
NOISE = torch.randn(1, 2, 10, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PARTS = {
    "history_guided": HistoryGuidedConfig(0.3),
    "scheduler": SchedulerConfig(TriModalConfig(0.4, 1.5), "log-snr", reach=None),
    "chunks": ChunkConfig(TriModalConfig(0.4, 1.5), "log-snr", reach=None),
    "correction": CorrectionConfig(),
    "suffix_window": True,
    "frozen_window": FrozenConfig(1.0),
    "shared_prefix": FrozenConfig(1.0, "history"),
}
OFF = {
    "history_guided": HistoryGuidedConfig(0.0),
    "scheduler": SchedulerConfig(TriModalConfig(0.0, 0.0), "log-snr"),
    "chunks": ChunkConfig(TriModalConfig(0.0, 0.0), "log-snr"),
    "correction": CorrectionConfig(),
}
SUBSETS = [names for count in range(len(PARTS) + 1) for names in combinations(PARTS, count)]
DECIDERS = {"history_guided", "scheduler"}


class Causal(SmoothDenoiser):
    recomputes_history = False


class SharedTime(SmoothDenoiser):
    shares_time = True


LOOPS = {
    "diffusion forcing": (SmoothDenoiser, lambda run: diffusion_forcing(run, NOISE, PLAN, TABLE)),
    "diffusion forcing, UniPC": (SmoothDenoiser, lambda run: diffusion_forcing(run, NOISE, PLAN, TABLE, "unipc")),
    "next clip": (SharedTime, lambda run: next_clip(run, NOISE, CLIPS, TABLE)),
    "causal blocks": (Causal, lambda run: causal_blocks(run, NOISE, 2, TABLE)),
    "causal blocks, re-noised": (Causal, lambda run: causal_blocks(run, NOISE, 2, TABLE, renoise_seed=1)),
}


def legal(names: tuple[str, ...]) -> bool:
    return "chunks" not in names or not DECIDERS & set(names)


def sample(loop: str, acceleration: Acceleration):
    denoiser, segments = LOOPS[loop]
    run = make_run(acceleration, denoiser())
    return video(segments(run)), run


def units(loop: str, chunked: bool) -> int:
    """Decisions a run has to take: one a call, or one for every active chunk of it."""
    if loop.startswith("causal"):
        return 5 * 8
    matrices = (CLIPS if loop == "next clip" else PLAN).matrices()
    return sum(int(matrix.active.sum()) // 2 if chunked else matrix.rows for matrix in matrices)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("names", [n for n in SUBSETS if legal(n)], ids="+".join)
def test_a_legal_subset_runs_and_every_decision_is_accounted_for(names, loop):
    out, run = sample(loop, Acceleration(**{name: PARTS[name] for name in names}))
    assert bool(out.isfinite().all())
    calls = run.timeline.totals()["calls"]
    commits = 5 if loop.startswith("causal") else 0
    assert calls.pop("commit") == 2 * commits == 2 * sum(c.kind is Kind.COMMIT for c in run.denoiser.calls)
    assert sum(calls.values()) == 2 * units(loop, "chunks" in names)
    if not {"history_guided", "scheduler", "chunks"} & set(names):
        assert calls["recompute"] == sum(calls.values())
    assert run.timeline.totals()["flops"] > 0


@pytest.mark.parametrize("names", [n for n in SUBSETS if not legal(n)], ids="+".join)
def test_an_illegal_subset_is_refused_with_the_reason(names):
    with pytest.raises(ValueError, match=r"^Chunk Cache: decides chunk by chunk, .* use one of the two"):
        Acceleration(**{name: PARTS[name] for name in names})


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "names", [n for n in SUBSETS if legal(n) and set(n) <= set(OFF)], ids=lambda n: "+".join(n) or "nothing"
)
def test_off_is_off_in_every_combination(names, loop):
    plain, _ = sample(loop, Acceleration())
    assert torch.equal(plain, sample(loop, Acceleration(**{name: OFF[name] for name in names}))[0])


# Causal blocks with a K/V store: what is kept and read of it goes with everything above.
KEPT = {
    "kv_budget": KVBudgetConfig(frames=8, keep="temporal-merge", recent=1),
    "ann": AnnConfig(0.5, shortest=1, tile=16),
}
WHOLE = {"kv_budget": KVBudgetConfig(frames=16), "ann": AnnConfig(1.0)}
PAIRS = [names for names in SUBSETS if len(names) <= 2 and legal(names)]
LATENTS = torch.randn(1, 16, 16, 8, 8, generator=torch.Generator().manual_seed(1))


@cache
def causal_model() -> TinyWan:
    torch.manual_seed(0)
    return TinyWan(TinyConfig(dim=24, ffn_dim=24, num_layers=2, num_heads=2, causal_ar=True, block=2)).eval()


def roll(acceleration: Acceleration, seed: int | None):
    denoiser = TinyDenoiser(
        causal_model(), torch.ones(1, 4, 64), 1.0, rollout=16, budget=acceleration.kv_budget, ann=acceleration.ann
    ).sized(LATENTS)
    run = Run(acceleration, denoiser, Timeline(row_unit="chunk", frames_per_row=2))
    with torch.inference_mode():
        return video(causal_blocks(run, LATENTS, 2, TABLE, seed)), run


@pytest.mark.parametrize(
    ("names", "kept", "seed"),
    [(names, tuple(KEPT), None) for names in PAIRS]
    + [(names, (part,), 1) for names in PAIRS if len(names) < 2 for part in KEPT],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "re-noised" if value else "euler",
)
def test_every_pair_runs_on_a_bounded_store_and_commits_every_block(names, kept, seed):
    acceleration = Acceleration(**{name: PARTS[name] for name in names}, **{name: KEPT[name] for name in kept})
    out, run = roll(acceleration, seed)
    calls = run.timeline.totals()["calls"]
    assert bool(out.isfinite().all())
    assert calls.pop("commit") == 8 and sum(calls.values()) == 8 * 8
    store = run.denoiser._store
    assert store.stores[0].frames == 16 and store.nbytes <= store.planned_bytes + sum(x.nbytes for x in store._sparse)
    assert run.timeline.totals()["flop_ratio"] > 1.0


@pytest.mark.parametrize("kept", [("kv_budget",), ("ann",), ("kv_budget", "ann")], ids="+".join)
def test_keeping_and_reading_everything_changes_nothing(kept):
    plain, _ = roll(Acceleration(), 1)
    whole, run = roll(Acceleration(**{name: WHOLE[name] for name in kept}), 1)
    assert torch.allclose(plain, whole, atol=1e-5) and run.timeline.totals()["flop_ratio"] == 1.0
