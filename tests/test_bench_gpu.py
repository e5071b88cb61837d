"""The GPU measurement at toy size, with a clock that counts FLOPs in place of seconds, and counted at full size."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import bench.gpu as command
from accel.call import Decision
from accel.sampling import SegmentPlan
from bench.fullsize import ACTIVE, FULL
from bench.gpu_attention import block_sparse, mass
from bench.gpu_causal import Rolling, causal, realised
from bench.gpu_clock import EventClock, Pace, ProcessClock, Times, in_turn, peak_bytes, syncs
from bench.gpu_extent import TOY, WHOLE, Bench
from bench.gpu_forwards import composed, distinct, forced_list, summed, timed_forwards
from bench.gpu_kernels import TABLE, figures, measured
from bench.gpu_loops import EVERY, LISTED, compared, loops, memory
from bench.gpu_report import FIGURES, markdown
from bench.gpu_report import figures as reported
from tests.triton_interpreter import interpreted, needs_triton

CPU = torch.device("cpu")
KERNEL_FIGURES = {"relative_l1_share", "relative_l1_over_compiled"}


class FlopClock:
    """A device that does one FLOP a second, and anything else in next to no time."""

    CPU_ATTENTION = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **options: sdpa_flop_count(
            q, k, v
        )
    }

    def device(self, work):
        with FlopCounterMode(display=False, custom_mapping=self.CPU_ATTENTION) as counted:
            work()
        return counted.get_total_flops() + 1e-9

    queued = wall = device


def bench_of(extent, clock=None, device=CPU, seconds=1e18, dtype=torch.float32):
    return Bench(extent, device, dtype, clock or ProcessClock(), Pace(seconds), lambda line: None)


@pytest.fixture
def counting(monkeypatch):
    """Benches on tensors without data, where FLOPs are counted exactly; what only data can answer is left out."""
    monkeypatch.setattr("accel.readback.Readback.send", lambda self, values, label: None)
    with torch.inference_mode():
        yield lambda extent: bench_of(extent, FlopClock(), torch.device("meta"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the toy size has written what it found."""
    target = tmp_path_factory.mktemp("gpu")
    command.run(TOY, list(command.PARTS), target, CPU, lambda line: None)
    return target


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "gpu.json").read_text())


def test_every_part_goes_through_at_toy_size(found):
    assert list(found["parts"]) == list(command.PARTS)
    assert not any("error" in part for part in found["parts"].values())
    assert not any("error" in row for row in found["parts"]["kernels"]["kernels"])
    assert all(part["conditions"]["torch"] == torch.__version__ for part in found["parts"].values())


def test_every_figure_is_a_row_and_a_key(folder, found):
    lines = (folder / "gpu.md").read_text().splitlines()
    assert list(found["figures"]) == [figure.key for figure in FIGURES]
    for figure in FIGURES:
        row = found["figures"][figure.key]
        assert any(line.startswith(f"| {figure.words} | {figure.goal} |") for line in lines)
        assert row["reached"] is None
        assert (row["measured"] is None) == (figure.key in KERNEL_FIGURES)


def test_every_measured_row_stands_in_the_tables(folder, found):
    text = (folder / "gpu.md").read_text()
    for row in found["parts"]["kernels"]["kernels"]:
        assert text.count(f"| {row['kernel']} |") == 1
    for row in found["parts"]["causal"]["rollouts"]:
        assert f"| {row['block']} | {row['store']} |" in text
    assert "column mass torch (no CUDA device)" in text


def test_a_figure_that_is_missing_says_why(found):
    assert all("no CUDA device" in found["figures"][key]["why"] for key in KERNEL_FIGURES)
    parts = {"memory": {"error": "OutOfMemoryError: too much"}}
    told = reported(parts, toy=False)
    assert told["extra_peak_mb"]["why"] == "OutOfMemoryError: too much"
    assert told["column_mass"]["why"] == "part attention has not run"


def test_a_goal_is_reached_from_its_own_side():
    parts = {
        "memory": {"figures": {"extra_peak_mb": 45.7}},
        "causal": {"figures": {"over_rolling": 1.4, "floor_share": 2.0, "realised_causal": 0.9}},
    }
    told = reported(parts, toy=False)
    reached = {key: told[key]["reached"] for key in ("extra_peak_mb", "over_rolling", "floor_share", "realised_causal")}
    assert reached == {"extra_peak_mb": True, "over_rolling": False, "floor_share": True, "realised_causal": True}
    assert "| no |" in markdown({"toy": False, "parts": {}, "figures": told})


def test_parts_are_kept_and_one_that_fails_stops_no_other(tmp_path, monkeypatch):
    def breaks(bench, told):
        told["rows"] = [{"before": 1}]
        raise RuntimeError("out of luck")

    monkeypatch.setitem(command.PARTS, "memory", command.Part(breaks, 1.0, 1.0))
    command.run(TOY, ["attention"], tmp_path, CPU, lambda line: None)
    told = command.run(TOY, ["kernels", "memory"], tmp_path, CPU, lambda line: None)
    assert set(told["parts"]) == {"attention", "kernels", "memory"}
    assert told["parts"]["memory"]["error"] == "RuntimeError: out of luck"
    assert told["parts"]["memory"]["rows"] == [{"before": 1}]
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(told))


@pytest.mark.parametrize("stale", [{"version": command.VERSION, "toy": False}, {"version": 0, "toy": True}])
def test_figures_of_another_size_or_make_are_not_kept(tmp_path, stale):
    (tmp_path / "gpu.json").write_text(json.dumps(stale | {"parts": {"loops": {}}, "figures": {}}))
    assert set(command.run(TOY, ["attention"], tmp_path, CPU, lambda line: None)["parts"]) == {"attention"}
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}


def test_a_part_whose_time_is_over_says_so(tmp_path):
    told = command.run(TOY, ["attention", "kernels"], tmp_path, CPU, lambda line: None, seconds=0.0)
    assert all(part["error"].startswith("TimeoutError") for part in told["parts"].values())


def test_all_parts_together_take_less_than_nine_minutes():
    assert sum(part.estimate for part in command.PARTS.values()) < command.LIMIT < 540
    assert all(part.estimate < part.budget for part in command.PARTS.values())


def test_works_take_turns_and_warm_up_uncounted():
    order, now = [], iter(range(100))
    works = {name: lambda number, name=name: order.append((name, number)) for name in "ab"}

    def measure(work):
        work()
        return float(next(now))

    times = in_turn(measure, works, 2, 1, Pace(1e9), repeats=2)
    assert order[:6] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3)]
    assert times.seconds == {"a": [1.0, 2.0], "b": [1.5, 2.5]}


def test_rounds_stop_when_the_next_one_would_not_fit():
    now = [0.0]

    def measure(work):
        now[0] += 4.0
        return 4.0

    assert in_turn(measure, {"a": None}, 10, 0, Pace(11.0, lambda: now[0])).rounds == 2
    with pytest.raises(TimeoutError, match="for: a"):
        in_turn(measure, {"a": None}, 10, 0, Pace(0.0, lambda: now[0]))


def test_a_ratio_is_the_median_of_those_within_rounds():
    assert Times({"a": [1.0, 10.0, 6.0], "b": [1.0, 5.0, 2.0]}).ratio("a", "b") == 2.0


def test_peaks_and_reads_are_counted_on_a_cpu():
    def work():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second * 2

    assert peak_bytes(CPU, work) == 8000
    with torch.inference_mode():
        assert syncs(CPU, lambda: torch.ones(3).sum().item()) == 1


def test_rolled_keys_are_the_latest_in_order():
    store, written = Rolling(1, 3, 2), []
    for first in range(5):
        store.begin(first, 1)
        for step in range(2):
            key = torch.full((1, 2, 1, 1), 10.0 * first + step)
            keys, values = store.append(0, key, -key)
        written += [10.0 * first + 1] * 2
        store.commit()
        assert keys.flatten().tolist() == written[-6:]
        assert torch.equal(values, -keys)
        assert store.keys == len(written[-6:])


def test_full_size_forwards_cost_what_is_counted(counting):
    bench = counting(replace(WHOLE, shape=replace(WHOLE.shape, layers=1), rounds=1, warmup=0))
    tokens = WHOLE.grid[0] * WHOLE.grid[1]
    pairs = sorted(distinct([WHOLE.long, WHOLE.plan]))
    assert {(25, 25), (20, 25), (5, 10)} <= set(pairs) and len(pairs) == 12
    for (frames, keys), (taken, rounds) in timed_forwards(bench, tokens, pairs).items():
        assert rounds == 1
        assert taken == pytest.approx(bench.extent.shape.forward_flops(frames, tokens, keys * tokens), rel=1e-12)


def test_caching_and_prediction_take_less_than_80_mb_at_full_size(counting):
    bench = counting(replace(WHOLE, shape=replace(WHOLE.shape, layers=1)))
    told = {}
    memory(bench, told)
    window = 25 * 16 * 68 * 120
    stored, wider = 3 * window * 4, window * (4 - 2)  # velocities; the last answer, predicted instead of computed
    assert told["figures"]["extra_peak_mb"] == (stored + wider) / 1e6 < 80


@torch.inference_mode()
def test_what_is_counted_arrives_whole_where_time_is_flops():
    bench, told = bench_of(replace(TOY, rounds=1, warmup=0), FlopClock()), {}
    loops(bench, told)
    assert told["loops"][0]["loop"] == EVERY and told["loops"][1]["flop_ratio"] > 1.2
    for row in told["loops"]:
        assert row["realised"] == pytest.approx(1.0, rel=1e-9)
    told = {}
    causal(bench, told)
    flops = {(row["block"], row["store"]): row["flops"] for row in told["rollouts"]}
    assert told["figures"]["realised_causal"] == pytest.approx(1.0, rel=1e-9)
    few, many = f"ring, {TOY.few}", f"clone and roll, {TOY.many}"
    assert told["figures"]["over_rolling"] == pytest.approx(flops[3, many] / flops[3, few])
    assert 0.5 < told["figures"]["floor_share"] < 1.0  # attention is given more time than its FLOPs
    assert flops[1, many] > flops[1, few]


def test_realised_is_the_time_ratio_over_the_flop_ratio():
    assert realised({"seconds": 3.0, "flops": 6}, {"seconds": 2.0, "flops": 3}) == 0.75


@torch.inference_mode()
def test_no_loop_begins_that_would_not_end_in_time():
    class Slow(ProcessClock):
        def wall(self, work):
            work()
            now[0] += 40.0
            return 40.0

    now, short = [0.0], replace(TOY, plan=SegmentPlan(frames=4, segment=4, block=2, ar_step=1, steps=3), loop_rounds=2)
    for seconds, runs in ((350.0, [2, 2, 2, 2]), (200.0, [1, 1, 1, 1])):
        now[0] = 0.0
        pace = Pace(seconds, lambda: now[0])
        bench, told = Bench(short, CPU, torch.float32, Slow(), pace, lambda line: None), {}
        loops(bench, told)
        assert [len(row["runs"]) for row in told["loops"]] == runs
    now[0] = 0.0
    with pytest.raises(TimeoutError, match="frozen K/V"):
        loops(replace(bench, pace=Pace(150.0, lambda: now[0])), told)
    assert len(told["loops"]) == 3 and set(told["figures"]) == {"realised_listed", "realised_suffix"}


def test_loops_are_compared_over_the_rounds_that_all_went_through():
    class Told:
        def totals(self):
            return {"calls": {}, "flops": 1, "flop_ratio": 2.0}

    rows = compared({EVERY: [8.0, 80.0], LISTED: [5.0]}, {EVERY: Told(), LISTED: Told()})
    assert rows[1]["time_ratio"] == 1.6 and rows[1]["realised"] == 0.8


def test_a_schedule_is_composed_of_its_forwards_and_skips():
    calls = [[(2, 2)], [(1, 2), (1, 1)], [(2, 2)]]
    seconds, flops = {(2, 2): 4.0, (1, 2): 3.0, (1, 1): 1.0}, {(2, 2): 40, (1, 2): 30, (1, 1): 10}
    assert summed(calls, None, seconds, flops, 0.5) == (12.0, 120, {True: 3})
    skipping = [Decision.RECOMPUTE, Decision.PREDICT, Decision.RECOMPUTE]
    assert summed(calls, skipping, seconds, flops, 0.5) == (8.5, 80, {True: 2, False: 1})


def test_composed_schedules_realise_all_where_time_is_flops():
    tokens = TOY.grid[0] * TOY.grid[1]
    flops = {
        pair: TOY.shape.forward_flops(pair[0], tokens, pair[1] * tokens) for pair in distinct([TOY.long, TOY.plan])
    }
    with torch.inference_mode():
        rows = composed(TOY, flops, flops, 0.0)
    assert all(row["realised"] == pytest.approx(1.0) for row in rows)
    by_name = {(row["plan"], row["scheme"], row["list"]): row for row in rows}
    assert by_name["long", FULL, "every call"]["flop_ratio"] == 1.0
    assert by_name["long", ACTIVE, "every call"]["flop_ratio"] > 1.2
    assert by_name["loop", FULL, "forced list"]["skipped"] > 0


def test_the_forced_list_covers_the_plan_and_skips_in_it():
    with torch.inference_mode():
        decisions = forced_list(TOY.plan, bench_of(TOY))
    assert len(decisions) == TOY.plan.calls()
    assert decisions[0] is Decision.RECOMPUTE and Decision.PREDICT in decisions


@pytest.mark.parametrize("line", TABLE, ids=lambda line: line.operation.name)
def test_a_kernel_takes_what_its_line_makes_and_a_compiler_gets_the_same_task(line):
    arguments = line.inputs(bench_of(TOY))
    assert line.operation.supports(*arguments) == (True, "")
    if line.compiled is not None:
        found = line.compiled(*copy.deepcopy(arguments))
        torch.testing.assert_close(found.flatten(), line.operation.torch_form(*arguments).flatten())


@needs_triton
@pytest.mark.parametrize("line", TABLE, ids=lambda line: line.operation.name)
def test_kernels_do_on_their_lines_what_is_measured_beside_them(line):
    arguments = line.inputs(bench_of(TOY))
    with interpreted() as launches:
        found = line.operation.triton_form(*copy.deepcopy(arguments))
    assert launches.names
    torch.testing.assert_close(found, line.operation.torch_form(*arguments), rtol=1e-5, atol=1e-5)


@needs_triton
def test_kernels_of_attention_take_what_is_measured_and_what_fails_says_why(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("bench.gpu_attention.flex_tiles", broken)
    bench = bench_of(replace(TOY, compiled=True, rounds=1, warmup=0))
    sides = [tuple(bench.random(1, tokens, 2, 24) for tokens in (40, 72, 72))]
    with interpreted() as launches, torch.inference_mode():
        rows = [*block_sparse(bench, sides, 0.25, True), *mass(bench, sides)]
    assert {"attend", "row_totals", "column_sums"} <= set(launches.names)
    assert {row["form"]: row["error"] for row in rows if "error" in row} == {"flex": "RuntimeError: no compiler"}
    assert {row["form"] for row in rows if "over_share" in row} == {"auto", "gather", "triton"}
    assert {row["form"] for row in rows if "over_dense" in row} == {"auto", "torch", "triton"}


def test_half_the_tokens_of_the_merged_frame_join():
    line = next(line for line in TABLE if line.operation.name == "temporal merge")
    places, live, *rest = line.inputs(bench_of(TOY))
    into, grown = line.operation.torch_form(places, live, *rest)
    assert torch.equal(into[:12], places[:12]) and int(grown) == len(places) + 12


def test_relative_l1_reads_as_much_as_the_goal_speaks_of():
    length = WHOLE.kernel_bytes // 2 // WHOLE.plan.segment
    assert 0.99 * 256e6 <= 2 * length * WHOLE.plan.segment <= WHOLE.kernel_bytes


def test_kernel_figures_come_from_the_kernel():
    row = {"of_copy": {"plain": 0.1, "kernel": 0.85}, "kernel_over_compiled": None, "reasons": {"compiled": "broken"}}
    assert figures(row) == ({"relative_l1_share": 0.85}, {"relative_l1_over_compiled": "compiled: broken"})


def test_a_form_that_fails_leaves_its_reason(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such shape")

    monkeypatch.setattr(TABLE[1].operation, "torch_form", broken)
    row = measured(TABLE[1], bench_of(TOY))
    assert row["reasons"]["plain"] == "RuntimeError: no such shape"
    assert set(row["seconds"]) == {"copy"}


def test_without_a_gpu_the_command_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main()
    assert "--toy" in capsys.readouterr().err


class FakeCuda:
    """What ``EventClock`` and the counters ask of ``torch.cuda``; time passes with every event and product."""

    def __init__(self, monkeypatch):
        self.told, self.now = [], 0.0
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                outer.told.append("event")
                self.at = outer.now

            def synchronize(self):
                outer.told.append("wait")

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr("torch.cuda.Event", Event)
        monkeypatch.setattr("torch.cuda.synchronize", lambda device=None: self.told.append("still"))
        monkeypatch.setattr("torch.mm", lambda *args, **options: self.told.append("product"))
        monkeypatch.setattr("bench.gpu_clock.LOAD", (4, 2))
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def work(self):
        self.told.append("work")
        self.now += 0.25


def test_events_stand_around_the_work_and_behind_the_load(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    clock = EventClock(CPU)
    assert clock.device(cuda.work) == clock.queued(cuda.work) == clock.wall(cuda.work) == 0.25
    around = ["event", "work", "event", "wait"]
    assert cuda.told == ["still", *around, "still", "product", "product", *around, "still", "work", "still"]


def test_waits_for_the_device_are_counted_from_its_warnings(monkeypatch):
    modes = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)

    def work():
        for text in (
            "called a synchronizing CUDA operation",
            "something else",
            "called a synchronizing CUDA operation",
        ):
            warnings.warn(text, stacklevel=1)

    assert syncs(torch.device("cuda"), work) == 2
    assert modes == ["warn", "default"]


def test_a_peak_on_a_device_is_what_comes_on_top(monkeypatch):
    told = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device=None, name=name: told.append(name))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 100)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 350)
    assert peak_bytes(torch.device("cuda"), lambda: told.append("work")) == 250
    assert told == ["synchronize", "empty_cache", "reset_peak_memory_stats", "work", "synchronize"]
