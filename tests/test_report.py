"""What ``make demo`` and the ablation write, on untrained models of the same layout and a short plan."""

import json
import sys

import pytest
import torch

import bench.ablation as ablation
import demo.__main__ as main
from accel.sampling import SegmentPlan
from accel.timeline import Timeline
from demo.model import TinyConfig, TinyWan

KEYS = {"model", "method", "seed", "calls", "flops", "flop_ratio", "seconds", "psnr", "ssim"}
PLAN = SegmentPlan(frames=14, segment=8, overlap=2, block=2, ar_step=2, steps=12)


@pytest.fixture
def small(monkeypatch):
    """Untrained models and a plan of two segments."""

    def load(kind: str) -> TinyWan:
        torch.manual_seed(1)
        config = TinyConfig(48, 64, 2, 2, causal_ar=kind == "tiny-causal", kind=kind, block=2)
        return TinyWan(config).eval().requires_grad_(False)

    for module in (main, ablation):
        monkeypatch.setattr(module, "load", load)
        monkeypatch.setattr(module, "PLAN", PLAN)
    monkeypatch.setattr(main, "CAUSAL_FRAMES", 6)


def test_the_demo_writes_videos_timelines_and_a_report(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(tmp_path)])
    main.main()
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert all(run.keys() >= KEYS for run in runs)
    methods = {model: [run["method"] for run in runs if run["model"] == model] for model in ("tiny-df", "tiny-causal")}
    for names in methods.values():
        assert {"full", "fewer-steps"} < set(names) and len(names) >= 3
    for run in runs:
        assert set(run["calls"]) == {"recompute", "predict", "cache", "commit"}
        assert (run["psnr"] is None) == (run["method"] == "full")
        assert (tmp_path / run["video"]).stat().st_size > 0
    full = next(run for run in runs if run["method"] == "full")
    for run in runs[1:4]:
        assert sum(run["calls"].values()) == sum(full["calls"].values())
        assert run["flop_ratio"] == pytest.approx(full["flops"] / run["flops"])
    fewer = next(run for run in runs if run["method"] == "fewer-steps")
    assert fewer["flops"] >= next(run for run in runs if run["method"] == "balanced")["flops"]
    assert Timeline.from_json((tmp_path / "timeline.json").read_text()).records
    assert (tmp_path / "timeline.svg").read_text().startswith("<svg")
    assert (tmp_path / "tiny-df.png").exists()
    assert "x fewer" in capsys.readouterr().out


def test_the_ablation_runs_every_variant_of_a_group(small, monkeypatch, tmp_path):
    groups = ["--groups", "presets", "correction", "fixed"]
    monkeypatch.setattr(sys, "argv", ["ablation", "--seeds", "1", *groups, "--output", str(tmp_path)])
    ablation.main()
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    assert [row["method"] for row in rows[:5]] == ["balanced", "fast", "none", "sigma_linear", "seg1_l1"]
    assert len(rows) == 8 and len({row["flop_ratio"] for row in rows[2:5]}) == 1
    assert all(row["flop_ratio"] > 1 and row["calls"]["predict"] > 0 for row in rows[5:])
    assert "| balanced |" in (tmp_path / "ablation.md").read_text()
