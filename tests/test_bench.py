"""The bench on untrained models and short plans: every method has its row, what is finished is not measured again."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, make_dataclass, replace
from datetime import date

import pytest
import torch

import bench.__main__ as command
import bench.measure as measure
import bench.methods as methods
import bench.presets as presets
import bench.scenes as scenes
from accel.sampling import SegmentPlan
from bench.grid import Grid, Task
from bench.knobs import probe, turn
from bench.measure import Bench, Extent
from bench.methods import CEILING, FEWER_STEPS, FLOOR, FULL, METHODS, Method
from bench.pareto import Curve, draw, spread
from bench.rehearsal import rehearse
from bench.report import curves, write
from bench.scenes import Scene
from bench.store import Store
from bench.table import groups, interval, unreached
from bench.versus import OURS, against, quotient, read, versus
from demo.generate import lasting
from demo.model import TinyConfig, TinyWan, save_model

DESIGN = {
    "model", "method", "seed", "calls", "flops", "flop_ratio", "seconds", "psnr", "ssim", "ours", "budget",
    "latent_rel_l2", "drift_db_per_segment", "state_bytes", "realised",
}  # fmt: skip
PLANS = {
    "tiny-df": SegmentPlan(frames=6, segment=4, overlap=2, block=2, ar_step=1, steps=10),
    "tiny-next-clip": SegmentPlan(frames=6, segment=4, overlap=2, block=2, steps=10),
    "tiny-causal": SegmentPlan(frames=4, segment=2, block=2, steps=10),
}
SMALL = Extent(PLANS, (2.0,), (2.0,), clips=1, pairs=1)
FEW = (FEWER_STEPS, "tri-modal", "balanced")


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Untrained models with weights on disk."""

    def load(kind: str) -> TinyWan:
        torch.manual_seed(1)
        config = TinyConfig(48, 64, 2, 2, causal_ar=kind == "tiny-causal", kind=kind, block=2)
        return TinyWan(config).eval().requires_grad_(False)

    (tmp_path / "models").mkdir()
    for kind in PLANS:
        save_model(load(kind), tmp_path / "models" / f"{kind}.safetensors")
    for module in (scenes, presets):
        monkeypatch.setattr(module, "MODELS", tmp_path / "models")
    monkeypatch.setattr(scenes, "load", load)
    monkeypatch.setattr("bench.peers.calibration.FOLDER", tmp_path / "calibration")
    scenes.loaded.cache_clear()
    yield
    scenes.loaded.cache_clear()


def bench(folder, *names: str, models: tuple[str, ...] = ("tiny-df",)) -> Bench:
    return Bench(SMALL, list(models), list(names), folder, 1)


def test_every_method_has_a_row_in_json_table_and_picture(tmp_path):
    rows, missing = bench(tmp_path / "rows", *METHODS).run(lambda line: None)
    others = bench(tmp_path / "rows", *FEW, models=("tiny-next-clip", "tiny-causal")).run(lambda line: None)
    rows, missing = rows + others[0], missing | others[1]
    text = write(tmp_path, rows, missing, SMALL)
    told = json.loads((tmp_path / "quality.json").read_text())
    assert all(row.keys() >= DESIGN for row in told["rows"])
    for kind in PLANS:
        chosen = METHODS if kind == "tiny-df" else FEW
        expected = {FULL} | {name for name in chosen if kind in METHODS[name].models}
        found = {row["method"] for row in rows if row["model"] == kind}
        assert found | set(missing[kind]) == expected
        picture = (tmp_path / f"pareto-{kind}.svg").read_text()
        for row in rows:
            if row["model"] == kind:
                assert f"| {row['method']}" in text
                assert (f">{row['method']}</text>" in picture) == (row["psnr"] is not None)
    for row in rows:
        assert sum(row["calls"].values()) > 0 and 0 <= row["attribute_accuracy"] <= 1
        if row["budget"] is not None and row["method"] != FEWER_STEPS:
            assert FLOOR * row["budget"] <= row["flop_ratio"] <= CEILING * row["budget"]


def test_fewer_steps_get_no_fewer_flops_than_any_run_of_their_budget(tmp_path):
    for kind, plan in scenes.PLANS.items():
        scene = Scene(kind, plan)
        full = rehearse(scene).totals()["flops"]
        for budget in measure.WHOLE.main:
            shorter = METHODS[FEWER_STEPS].build(budget, scene)["plan"]
            assert full / rehearse(scene, plan=shorter).totals()["flops"] <= FLOOR * budget
            one_less = replace(shorter, steps=shorter.steps - 1)
            assert full / rehearse(scene, plan=one_less).totals()["flops"] > 0.85 * FLOOR * budget


def test_finished_rows_are_not_measured_again(tmp_path, monkeypatch):
    first = bench(tmp_path, *FEW).run(lambda line: None)
    monkeypatch.setattr(Scene, "run", lambda *_, **__: pytest.fail("measured again"))
    assert bench(tmp_path, *FEW).run(lambda line: None) == first


def test_a_closed_bench_shows_what_is_stored_and_measures_nothing(tmp_path, monkeypatch):
    first = bench(tmp_path, *FEW).run(lambda line: None)
    monkeypatch.setattr(Scene, "run", lambda *_, **__: pytest.fail("measured"))
    said: list[str] = []
    names, models = (*FEW, "fast", "TeaCache"), ["tiny-df", "tiny-causal"]
    assert Bench(SMALL, models, list(names), tmp_path, 1, closed=True).run(said.append) == first
    assert [line for line in said if not line.endswith("done")] == [
        "tiny-df TeaCache not measured", "tiny-df fast not measured", "tiny-causal not measured",
    ]  # fmt: skip


def test_a_plan_lasts_as_many_segments_as_it_is_asked_to():
    for plan in (*scenes.PLANS.values(), PLANS["tiny-df"]):
        assert len(lasting(plan, 4).intervals()) == 4 and lasting(plan, 1).frames == plan.segment


def test_a_row_is_keyed_by_all_it_depends_on(tmp_path, monkeypatch):
    grid, task = Grid(Scene("tiny-df", PLANS["tiny-df"]), tmp_path), Task("tri-modal", 2.0, (2, 2.0, 1.5), 1)
    others = [
        replace(task, setting=(3, 2.0, 1.5)), replace(task, seed=2), replace(task, method="tri-modal-order-1"),
    ]  # fmt: skip
    longer = Grid(Scene("tiny-df", replace(PLANS["tiny-df"], steps=11)), tmp_path)
    paths = [grid.row_path(task), longer.row_path(task), *(grid.row_path(other) for other in others)]
    assert len(set(paths)) == len(paths) and grid.row_path(task) == paths[0]
    changed = replace(METHODS["tri-modal"], build=methods.tri_modal("auto"))
    monkeypatch.setitem(METHODS, "tri-modal", changed)
    assert grid.row_path(task) not in paths
    monkeypatch.setattr("bench.store.ROWS_VERSION", 0)
    assert longer.row_path(task) not in paths


@dataclass(frozen=True)
class Measured:
    width: int = 3
    parts: tuple[int, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class MeasuredLater(Measured):
    depth: int | None = None


MeasuredLater.__name__ = "Measured"


@pytest.mark.parametrize(("later", "same"), [({}, True), ({"depth": 2}, False)])
def test_a_part_added_and_not_used_leaves_stored_rows_valid(tmp_path, later, same):
    store = Store(tmp_path)
    before = store.path("row", {"options": {"rule": Measured(3, (1,))}})
    assert (store.path("row", {"options": {"rule": MeasuredLater(3, (1,), **later)}}) == before) is same
    assert store.path("row", {"options": {"rule": Measured(3, (2,))}}) != before


def test_packed_measurements_go_on_elsewhere_and_do_not_replace_newer_ones(tmp_path):
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    there.unpack(tmp_path / "none")
    assert not there.folder.exists()
    for number in (1, 2):
        here.write(here.path("row", {"seed": number}), {"psnr": 30.5 + number})
    here.write_latents(here.path("row", {"seed": 1}), torch.ones(2))
    there.write(there.path("row", {"seed": 2}), {"psnr": 40.0})
    here.pack(tmp_path / "rows.json.xz")
    there.unpack(tmp_path / "rows.json.xz")
    first, second = (there.path("row", {"seed": number}) for number in (1, 2))
    assert there.get(first, lambda: None) == {"psnr": 31.5}
    assert there.get(second, lambda: None) == {"psnr": 40.0}
    assert torch.equal(there.latents(first, lambda: torch.zeros(2)), torch.zeros(2)), "latents are not packed"
    assert torch.equal(there.latents(first, lambda: torch.ones(2)), torch.zeros(2)), "latents were made again"


def test_a_default_that_changes_makes_stored_rows_void(tmp_path):
    """A hash that left defaults out took rows of the former default for those of the new one."""
    before, after = (make_dataclass("Rule", [("order", int, field(default=order))])() for order in (1, 2))
    assert Store(tmp_path).path("row", {"rule": before}) != Store(tmp_path).path("row", {"rule": after})


@pytest.mark.parametrize(("kind", "name"), [("tiny-df", "tri-modal"), ("tiny-causal", "random schedule")])
def test_knobs_hit_their_budgets_in_the_real_plan(kind, name):
    scene, method = Scene(kind, scenes.PLANS[kind]), METHODS[name]
    for budget in measure.WHOLE.rest:
        setting = turn(method, budget, lambda setting: probe(method, scene, setting))
        assert FLOOR * budget <= probe(method, scene, setting) <= CEILING * budget


def test_a_budget_out_of_reach_has_no_setting():
    method = Method("coarse", lambda setting, scene: {}, settings=(1, 2, 3))
    assert [turn(method, budget, float) for budget in (2.0, 2.9, 4.0)] == [2, 3, None]
    assert turn(replace(method, settings=(1.0, 5.0)), 2.0, float) is None
    assert "coarse (4x, 5x)" in unreached({"coarse": [4.0, 5.0], "fine": []}) and unreached({}) == ""


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.rehearsed])
def test_a_rehearsal_decides_as_the_run_does(name):
    method = METHODS[name]
    scene = Scene(method.models[0], PLANS[method.models[0]])
    options = method.build(method.settings[len(method.settings) // 2], scene)
    planned, run = rehearse(scene, **options), scene.run(1, **options).timeline
    assert [record.decision for record in planned.records] == [record.decision for record in run.records]
    assert planned.totals()["flops"] == run.totals()["flops"]


def test_a_rehearsal_refuses_what_looks_at_the_video():
    scene = Scene("tiny-df", PLANS["tiny-df"])
    with pytest.raises(ValueError, match="depends on the video"):
        rehearse(scene, **METHODS["history-guided-cache"].build(0.1, scene))


def test_the_command_fills_the_presets_and_only_from_a_whole_table(tmp_path, monkeypatch, capsys):
    table = tmp_path / "presets.json"
    table.write_text(command.TABLE.read_text())
    before = table.read_text()
    names = dict.fromkeys((FEWER_STEPS, *(preset.name for preset in methods.PRESETS)))
    monkeypatch.setattr(command, "METHODS", {name: METHODS[name] for name in names})
    for name, value in (("TABLE", table), ("RESULTS", tmp_path / "results"), ("WHOLE", SMALL)):
        monkeypatch.setattr(command, name, value)
    monkeypatch.setattr(sys, "argv", ["bench", "--models", "tiny-df", "--clips", "1"])
    command.main()
    assert table.read_text() == before and (tmp_path / "results" / "selected" / "quality.json").exists()
    monkeypatch.setattr(sys, "argv", ["bench"])
    command.main()
    assert capsys.readouterr().out.startswith("about ")
    entry = json.loads(table.read_text())["models"]["tiny-df"]
    assert entry["schedule"] == presets.schedule("tiny-df", PLANS["tiny-df"])
    measured = entry["presets"]["balanced"]["measured"]
    assert measured["seeds"] == 1 and measured["command"] == "make bench"
    monkeypatch.setattr(presets, "date", type("Later", (), {"today": lambda: date(2099, 1, 1)}))
    command.main()
    again = json.loads(table.read_text())["models"]["tiny-df"]["presets"]["balanced"]["measured"]
    assert again == measured, "what is as it was keeps its date"
    monkeypatch.setattr(command, "WHOLE", replace(SMALL, clips=2))
    monkeypatch.setattr(sys, "argv", ["bench", "--clips", "1", "--stored"])
    command.main()
    filled = table.read_text()
    measured = json.loads(filled)["models"]["tiny-df"]["presets"]["balanced"]["measured"]
    assert measured["command"] == "python -m bench --clips 1", "fewer clips than make bench takes"
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["bench", "--models", "tiny-df", "--segments", "1", "--stored"])
    command.main()
    assert capsys.readouterr().out.startswith("tiny-df not measured"), "one segment is another measurement"
    assert (tmp_path / "results" / "segments-1" / "quality.json").exists() and table.read_text() == filled


def test_the_estimate_grows_with_clips(tmp_path):
    few, many = (Bench(replace(SMALL, clips=clips), ["tiny-df"], list(FEW), tmp_path, 1) for clips in (1, 64))
    minutes = [few.work("tiny-df"), many.work("tiny-df")]
    assert 10 * minutes[0] < minutes[1] < 64 * minutes[0]


def test_curves_begin_with_fewer_steps_and_leave_out_the_full_run():
    rows = [
        {"model": "m", "method": name, "budget": None, "flop_ratio": ratio, "psnr": psnr}
        for name, ratio, psnr in ((FULL, 1.0, None), ("ours", 3.0, 40.0), ("ours", 3.2, 42.0), (FEWER_STEPS, 2.0, 30.0))
    ]
    assert curves(rows, "m") == [Curve(FEWER_STEPS, ((2.0, 30.0),), True), Curve("ours", ((3.1, 41.0),))]
    assert [len(group) for group in groups(rows, "m")] == [1, 1, 2]


def test_labels_keep_apart_and_inside():
    heights = spread([10.0, 11.0, 12.0, 200.0, 200.0], 0.0, 205.0, gap=17)
    gaps = [later - earlier for earlier, later in zip(heights, heights[1:], strict=False)]
    assert min(gaps) >= 17 and min(heights) >= 0 and max(heights) <= 205
    assert draw([], "nothing").startswith("<svg")


def test_intervals_hold_the_mean():
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert low < 2.5 < high and low >= 1.0 and high <= 4.0


def entry(method, seed, ratio, error, ours=False):
    return {"model": "tiny-df", "method": method, "budget": 3.0, "seed": seed, "ours": ours, "flop_ratio": ratio,
            "latent_rel_l2": error}  # fmt: skip


def test_errors_are_read_off_between_two_points_and_not_beyond_them():
    points = [(2.0, 0.1), (4.0, 0.3), (8.0, 0.4)]
    assert read(points, 2.0) == 0.1 and read(points, 8.0) == 0.4
    assert read(points, 8.0**0.5) == pytest.approx(0.2)
    assert read(points, 1.9) is None and read(points, 8.1) is None and read([], 3.0) is None


def test_a_rival_is_compared_at_its_own_flops_clip_by_clip():
    ours = [entry(OURS[0], seed, ratio, error * seed, True) for seed in (1, 2) for ratio, error in ((2, 0.1), (4, 0.3))]
    rival = [entry("TeaCache", seed, 8.0**0.5, 0.4 * seed) for seed in (1, 2)]
    error, (value, low, high) = against([*ours, *rival], "tiny-df", rival, OURS[0])
    assert error == pytest.approx(0.3) and value == low == high == pytest.approx(0.5)
    assert against(rival, "tiny-df", rival, OURS[0]) is None, "a method without rows was compared"
    far = [entry("TeaCache", seed, 5.0, 0.4) for seed in (1, 2)]
    assert against([*ours, *far], "tiny-df", far, OURS[0]) is None, "a curve was read beyond its end"


def test_a_rival_equal_to_its_full_run_has_no_quotient():
    assert quotient([(0.1, 0.0), (0.1, 0.2)]) is None
    assert quotient([(0.1, 0.2), (0.3, 0.2)])[0] == pytest.approx(1.0)


def test_the_table_lists_the_rivals_of_the_dearer_budgets_alone():
    ours = [entry(OURS[0], seed, ratio, 0.2, True) for seed in (1, 2) for ratio in (2.0, 4.0)]
    rivals = [entry("TeaCache", seed, 3.0, 0.4) for seed in (1, 2)]
    cheap = [entry("MagCache", seed, 2.1, 0.4) for seed in (1, 2)]
    text = versus([*ours, *rivals, *cheap], "tiny-df")
    assert "| TeaCache, 3x | 3.00x | 0.400 | 0.200 | 0.50 (0.50 to 0.50) |" in text
    assert "MagCache" not in text and f"| {OURS[0]}," not in text
    assert versus(rivals, "tiny-df") == ""
