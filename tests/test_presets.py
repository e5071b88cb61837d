"""The table of presets: what it holds is what the nodes set, the report says, and bench.presets rewrites."""

from __future__ import annotations

import json
import sys
from itertools import product

import pytest
import torch

import bench.presets as bench
import bench.scenes as scenes
from accel import presets
from accel.engine import Acceleration, Run, SchedulerConfig
from accel.presets import BALANCED, FAST, HISTORY_GUIDED, PRESETS, QUALITIES, TABLE, Presets, digest, words
from accel.sampling import SegmentPlan, causal_blocks, diffusion_forcing
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.model import MODELS, TinyConfig, TinyWan, save_model
from tests.fakes import SmoothDenoiser, video

MODEL_REGIMES = {"tiny-df": "frames", "tiny-next-clip": "frames", "tiny-causal": "causal"}
PLAN = SegmentPlan(frames=14, segment=8, overlap=2, block=2, ar_step=2, steps=12)


def table() -> dict:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def ratio(acceleration: Acceleration, shift: float = 3.0) -> tuple[float, torch.Tensor]:
    """FLOP ratio and video of a 50-step staircase of a model known in closed form."""
    run = Run(acceleration, SmoothDenoiser(), Timeline())
    noise = torch.randn(1, 1, 28, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = video(diffusion_forcing(run, noise, SegmentPlan(28, 16, 4, 4, 5, 50), flow_sigmas(50, shift)))
    return run.timeline.totals()["flop_ratio"], made


def test_every_model_has_every_quality_but_exact():
    named = {(preset.model, preset.name) for preset in PRESETS}
    assert named >= set(product(MODEL_REGIMES, QUALITIES[1:]))
    assert set(table()["fallback"]) == set(MODEL_REGIMES.values())


def test_the_names_that_bench_and_demo_use_come_from_the_table():
    rows = table()["models"]["tiny-df"]["presets"]
    for acceleration, name in ((BALANCED, "balanced"), (FAST, "fast"), (HISTORY_GUIDED, "history-guided")):
        assert acceleration == presets.acceleration_of(rows[name]["settings"])
    assert Acceleration(scheduler=SchedulerConfig()) == BALANCED, "Tri-Modal Scheduler's defaults are not balanced"


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_higher_quality_skips_less_and_every_quality_skips(shift):
    ratios = [ratio(PRESETS.find(name, "tiny-df", "frames").acceleration, shift)[0] for name in QUALITIES[1:]]
    assert 1.3 < ratios[0] < ratios[1] < ratios[2]


def test_higher_quality_is_closer():
    exact = ratio(Acceleration())[1]
    errors = [
        float((ratio(PRESETS.find(name, "tiny-df", "frames").acceleration)[1] - exact).abs().max())
        for name in QUALITIES[1:]
    ]
    assert errors == sorted(errors) and errors[0] > 0


@pytest.mark.parametrize("name", QUALITIES[1:])
def test_with_re_noising_no_preset_drops_a_step(name):
    """Holding x0 there would equal leaving the step out, which fewer steps do more honestly."""
    preset = PRESETS.find(name, "tiny-causal", "causal")
    videos = []
    for acceleration in (Acceleration(), preset.acceleration):
        run = Run(acceleration, SmoothDenoiser(), Timeline())
        noise = torch.randn(1, 1, 8, 2, 2, generator=torch.Generator().manual_seed(0))
        videos.append(video(causal_blocks(run, noise, 4, flow_sigmas(4, 5.0), renoise_seed=3)))
        assert run.timeline.totals()["calls"]["recompute"] == 2 * 4 * run.timeline.branches
    assert torch.equal(*videos)
    assert "every call is computed" in PRESETS.report(name, "tiny-causal", "causal")


def test_a_report_names_settings_and_the_measurement_they_rest_on():
    rows = table()
    row = rows["models"]["tiny-df"]["presets"]["balanced"]
    row["measured"] = dict(
        flop_ratio=3.5, psnr=45.26, ssim=0.998, seeds=8, date="2026-11-21", command="make bench", weights="abc"
    )
    known = Presets(rows)
    report = known.report("balanced", "tiny-df", "frames", "abc")
    for word in ("Tri-Modal Scheduler", "predict_below 3", "3.50x", "45.3 dB", "8 seeds", "2026-11-21", "make bench"):
        assert word in report
    assert "other weights" not in report
    assert "other weights" in known.report("balanced", "tiny-df", "frames", "def")
    row["measured"] |= {"psnr": None, "seeds": 1}
    assert "the same video as the full run (mean of 1 seed," in Presets(rows).report("balanced", "tiny-df", "frames")
    row["measured"] = None
    assert "Not measured yet" in Presets(rows).report("balanced", "tiny-df", "frames")


@pytest.mark.parametrize(("regime", "stands_in"), [("frames", "tiny-df"), ("causal", "tiny-causal")])
def test_a_model_outside_the_table_gets_its_regimes_values_and_is_told_so(regime, stands_in):
    preset = PRESETS.find("fast", None, regime)
    assert preset == PRESETS.find("fast", stands_in, regime) == PRESETS.find("fast", "some-other-model", regime)
    report = PRESETS.report("fast", None, regime)
    assert "not measured here" in report and stands_in in report


def test_exact_says_that_nothing_is_set():
    assert PRESETS.report("exact", "tiny-df", "frames").startswith("exact: no acceleration")


def test_words_are_the_nodes_inputs():
    assert words(HISTORY_GUIDED) == [
        "History-Guided Cache: threshold 0.1, signal auto, max_skip 5, warmup 2, decision exact",
        "Residual Correction: source sigma_linear",
    ]
    assert words(Acceleration(scheduler=SchedulerConfig(reach=None)))[0].endswith("reach no limit, decision exact")
    assert words(Acceleration()) == []


def test_measured_figures_name_the_weights_they_were_measured_on():
    for preset in PRESETS:
        if preset.measured is not None:
            assert len(preset.measured.weights) == presets.DIGEST_LETTERS
            assert preset.measured.seeds >= 1 and preset.measured.flop_ratio > 0
    assert digest(MODELS / "tiny-df.safetensors") != digest(MODELS / "tiny-causal.safetensors")


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="no_such_setting"):
        presets.acceleration_of({"scheduler": {"tau_cache": 0.0, "tau_predict": 1.0, "no_such_setting": 1}})


def test_the_bench_rewrites_figures_and_leaves_settings(monkeypatch, tmp_path, capsys):
    def load(kind: str) -> TinyWan:
        torch.manual_seed(1)
        config = TinyConfig(48, 64, 2, 2, causal_ar=kind == "tiny-causal", kind=kind, block=2)
        return TinyWan(config).eval().requires_grad_(False)

    for kind in MODEL_REGIMES:
        save_model(load(kind), tmp_path / f"{kind}.safetensors")
    plans = {"tiny-df": PLAN, "tiny-next-clip": SegmentPlan(14, 8, 2, 2, 0, 12)}
    for name, value in {
        "load": load,
        "PLANS": plans,
        "CAUSAL_FRAMES": 6,
        "CAUSAL_STEPS": 10,
        "MODELS": tmp_path,
    }.items():
        monkeypatch.setattr(bench, name, value)
    target = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["presets", "--seeds", "2", "--output", str(target)])
    before = TABLE.read_bytes()
    bench.main()
    assert TABLE.read_bytes() == before
    rewritten, old = json.loads(target.read_text()), table()
    for model, entry in rewritten["models"].items():
        for name, row in entry["presets"].items():
            assert row["settings"] == old["models"][model]["presets"][name]["settings"]
            measured = presets.Measured(**row["measured"])
            assert measured.flop_ratio >= 1 and measured.seeds == 2
            assert measured.weights == digest(tmp_path / f"{model}.safetensors")
            assert "--seeds 2" in measured.command
    assert "10 Euler steps" in rewritten["models"]["tiny-causal"]["schedule"]
    assert {preset.model for preset in Presets(rewritten)} == set(MODEL_REGIMES)


def test_the_schedules_in_the_table_are_those_that_the_bench_runs():
    for model, entry in table()["models"].items():
        plans = (bench.plan_of(model, 4), scenes.PLANS[model])
        assert entry["schedule"] in {bench.schedule(model, plan) for plan in plans}
