"""The relative L1 kernel against float64, and what it moves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.call import Call, Kind
from accel.kernels import choose, relative_l1
from accel.kernels.choose import Usage
from accel.kernels.relative_l1 import Look, group_relative_l1, supports, traffic
from accel.schedule import step_matrix
from accel.signals import SignalMeter
from tests.kernel_counts import counted
from tests.triton_interpreter import interpreted, needs_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def look(
    batch: int, counts: tuple[int, ...], gap: int, length: int, dtype=torch.float32, stride: int = 1, seed: int = 0
) -> Look:
    """Rows of one or two intervals ``gap`` rows apart, the first one starting at row 0."""
    generator = torch.Generator().manual_seed(seed)
    rows, spans, start = sum(counts) + gap * len(counts), [], 0
    for count in counts:
        spans.append((start, start + count))
        start += count + gap
    now, before = (
        torch.randn(batch, n, length * stride, generator=generator).to(dtype)[:, :, ::stride]
        for n in (sum(counts), rows)
    )
    return Look(now, before.contiguous(), tuple(spans))


def copied(looks: list[Look]) -> list[Look]:
    return [Look(now, rows.clone(), spans) for now, rows, spans in looks]


def in_float64(looks: list[Look], table: list[list[float]]) -> list[float]:
    sums = []
    for now, rows, spans in looks:
        before = torch.cat([rows[:, first:last] for first, last in spans], 1).double()
        sums += [((now.double() - before).abs()[:, t].sum(), before.abs()[:, t].sum()) for t in range(now.shape[1])]
    found = []
    for *weights, extra in table:
        change, size = (sum(float(pair[k]) for pair, w in zip(sums, weights, strict=True) if w > 0) for k in (0, 1))
        found.append(change / (size + extra) if size + extra else math.nan)
    return found


def check(looks: list[Look], table: list[list[float]]) -> None:
    """The kernel gives what float64 gives, remembers what it saw, and moves what ``traffic`` says."""
    expected, plain, shown = in_float64(looks, table), copied(looks), copied(looks)
    with interpreted() as launches:
        found = group_relative_l1(shown, table, backend="triton")
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=2e-6, atol=0.0, equal_nan=True)
    torch.testing.assert_close(group_relative_l1(plain, table), found, rtol=2e-6, atol=0.0, equal_nan=True)
    for one, other in zip(shown, plain, strict=True):
        torch.testing.assert_close(one.rows, other.rows, rtol=0.0, atol=0.0, equal_nan=True)
    assert launches.traffic == traffic(looks, table)
    assert launches.names == ["partial_sums"] * len(looks) + ["pooled"]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_several_features_in_float64(dtype) -> None:
    looks = [look(2, (1, 2), 2, 2500, dtype), look(1, (2,), 0, 37, dtype, seed=1)]
    check(looks, [[1, 1, 1, 0, 0, 1e-3], [0, 0, 0, 0, 1, 0.0], [0, 1, 0, 0, 0, 0.0], [0, 0, 0, 0, 0, 0.0]])


@needs_triton
@pytest.mark.parametrize("length", [1, 15, 2048, 2049, 16384, 16385, 20000])
def test_rows_of_any_length(length: int) -> None:
    check([look(1, (1,), 1, length)], [[1, 0.0]])


@needs_triton
def test_sketches_take_every_third_scalar() -> None:
    check([look(2, (2, 1), 1, 301, stride=3)], [[1, 0, 1, 1e-8], [1, 1, 1, 0.0]])


@needs_triton
@settings(max_examples=12)
@given(
    batch=st.integers(1, 2),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    gap=st.integers(0, 2),
    length=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    groups=st.lists(st.integers(0, 63), max_size=3, min_size=1),
)
def test_any_rows_in_any_groups(batch, counts, gap, length, dtype, groups) -> None:
    table = [[float(bits >> row & 1) for row in range(sum(counts))] + [1e-6] for bits in groups]
    check([look(batch, tuple(counts), gap, length, dtype)], table)


@needs_triton
def test_a_row_outside_a_group_may_hold_anything() -> None:
    broken = look(1, (2,), 0, 40)
    broken.now[0, 1] = math.nan
    check([broken], [[1, 0, 0.0], [1, 1, 0.0]])


@needs_triton
def test_a_meter_measures_the_same_with_it(monkeypatch) -> None:
    names, generator = ["input", "current", "history-block0"], torch.Generator().manual_seed(0)
    plain, fast = SignalMeter(names, 6), SignalMeter(names, 6)
    for frames, active in (((0, 4), (0, 0, 1, 1)), ((0, 6), (0, 0, 1, 1, 1, 1)), ((2, 6), (0, 0, 1, 1))):
        width = frames[1] - frames[0]
        call = Call(Kind.DENOISE, 0, 0, frames, (0.5,) * width, (1,) * width, tuple(map(bool, active)), total_steps=4)
        features = {kind: torch.randn(2, width, 70, 70, generator=generator) for kind in plain.kinds}
        expected, usage = plain.measure(features, call, [(2, 4), (4, 6)]), Usage()
        with interpreted() as launches, monkeypatch.context() as patch:
            patch.setattr(choose, "available", lambda device: (True, ""))
            found = fast.measure(features, call, [(2, 4), (4, 6)])
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=0.0, equal_nan=True)
        assert (len(launches.names), usage.line()) == (3, "relative L1 Triton")


def test_a_full_size_feature_is_read_and_written_once() -> None:
    """25 latent frames of 2040 tokens of 1536 channels in bfloat16, as shapes: three passes, and a per mille."""
    now, rows = (torch.empty(1, 25, 2040 * 1536, dtype=torch.bfloat16, device="meta") for _ in range(2))
    table = [[1.0] * 25 + [1e-8]]
    moved = traffic([Look(now, rows, ((0, 25),))], table)
    assert moved.launches == 2
    assert moved.read + moved.written == pytest.approx(3 * now.nbytes, rel=1e-3)
    partial = 2 * 4 * 25 * -(-2040 * 1536 // relative_l1.CHUNK)
    assert moved == (2, 2 * now.nbytes + partial + 4 * 26, now.nbytes + partial + 4)


def test_a_full_size_schedule_takes_two_launches_a_step() -> None:
    """25 latent frames at 540p in bfloat16, 50 steps, blocks of 5 that start 5 rows apart: 70 steps with 1500 latent
    frames in their windows and 1250 active ones, of which 25 were not seen before. Every 37th scalar of a latent frame
    is compared, 3529 in all."""
    matrix, meter, sketch = step_matrix(25, 50, 5, 5), SignalMeter(["latent"], 25), 3529
    with counted(group_relative_l1, traffic) as counts:
        for (first, last), active in zip(matrix.suffix_windows(), matrix.active.tolist(), strict=True):
            width, flags = last - first, tuple(active[first:last])
            call = Call(Kind.DENOISE, 0, 0, (first, last), (0.5,) * width, (1,) * width, flags, total_steps=50)
            meter.measure({"latent": torch.empty(1, width, 16, 68, 120, dtype=torch.bfloat16, device="meta")}, call)
    read = 2 * 1500 * sketch * 2 + 2 * 4 * 1225 + 4 * (1500 + 70)
    written = 1500 * sketch * 2 + 2 * 4 * 1500 + 4 * 70
    assert (counts.calls, counts.sums) == (70, (2 * 70, read, written))


def test_on_a_gpu_the_second_kernel_is_tried_once_before_the_first_one_ever_writes(monkeypatch) -> None:
    monkeypatch.setattr(relative_l1, "_rehearsed", set())
    device, tried = torch.device("cuda", 0), []

    def failing(*tensors):
        raise RuntimeError("cannot be compiled")

    with pytest.raises(RuntimeError):
        relative_l1._rehearse(failing, device)
    for _ in range(2):
        relative_l1._rehearse(lambda *tensors: tried.append(tensors), device, torch.ones(1))
    assert len(tried) == 1


def test_what_the_kernel_does_not_take_has_a_reason() -> None:
    fine = look(1, (1,), 0, 8)
    assert supports([fine], [[1, 0.0]]) == (True, "")
    for refused, reason in (
        (Look(fine.now.double(), fine.rows.double(), fine.spans), "no kernel for torch.float64"),
        (Look(fine.now.half(), fine.rows, fine.spans), "against torch.float32"),
        (Look(fine.now, fine.rows.expand(2, -1, -1), fine.spans), "contiguous"),
        (Look(fine.now[..., :0], fine.rows[..., :0], fine.spans), "rows of 0 scalars"),
    ):
        ok, why = supports([refused], [[1, 0.0]])
        assert not ok and reason in why
