"""A signal compares each latent frame with its own last look, wherever the window stands."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from accel.call import Call, Kind
from accel.signals import (
    SIGNALS,
    SignalMeter,
    level_step,
    relative_l1,
    remember_levels,
    resolve_history_signal,
    timestep_discrepancy,
)


def call(frames: tuple[int, int], active: list[bool] | None = None, sigmas: list[float] | None = None) -> Call:
    width = frames[1] - frames[0]
    active = [True] * width if active is None else active
    return Call(Kind.DENOISE, 0, 0, frames, tuple(sigmas or [0.5] * width), (1,) * width, tuple(active), total_steps=4)


def feature(rows: int, seed: int, batch: int = 2) -> Tensor:
    """``[B, T, 3, 4]``."""
    return torch.randn(batch, rows, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_relative_l1_on_hand_worked_numbers() -> None:
    assert relative_l1(torch.tensor([1.0, 2.0]), torch.tensor([2.0, -2.0])).item() == pytest.approx(5.0 / 4.0)
    assert relative_l1(torch.ones(3), torch.ones(3)).item() == 0.0
    assert relative_l1(torch.ones(3), torch.zeros(3)).item() == pytest.approx(1e8)
    assert relative_l1(torch.ones(3).bfloat16(), torch.ones(3).bfloat16()).dtype == torch.float32


def test_flowcache_on_magi_measures_what_the_reference_measures() -> None:
    """Features 1 + sin(j + 0.35 n^1.2) / 2 for j in 0..11, from n = 4 to 5 and from n = 6 to 7."""
    looks = [torch.tensor([1 + 0.5 * math.sin(j + 0.35 * n**1.2) for j in range(12)]) for n in range(8)]
    assert relative_l1(looks[5], looks[4]).item() == pytest.approx(0.19094878, abs=1e-6)
    assert relative_l1(looks[7], looks[6]).item() == pytest.approx(0.1969041, abs=1e-6)
    assert timestep_discrepancy(looks[5], looks[4]) == pytest.approx(0.19094878, abs=1e-6)


def test_the_first_look_has_nothing_to_compare_with() -> None:
    meter = SignalMeter(["input", "latent"], 4)
    features = {"modulated": feature(4, 0), "latent": feature(4, 1)}
    assert all(math.isnan(value) for value in meter.measure(features, call((0, 4))).tolist())
    assert meter.measure(features, call((0, 4))).tolist() == [0.0, 0.0]
    meter.reset()
    assert all(math.isnan(value) for value in meter.measure(features, call((0, 4))).tolist())


def test_each_signal_pools_its_own_frames() -> None:
    names = ["history-mod", "input", "current", "history-block0", "latent", "timestep"]
    meter = SignalMeter(names, 4)
    kinds = ["modulated", "block0", "latent", "timestep"]
    assert sorted(meter.kinds) == sorted(kinds)
    before = {kind: feature(4, seed) for seed, kind in enumerate(kinds)}
    now = {kind: feature(4, seed + 10) for seed, kind in enumerate(kinds)}
    look = call((0, 4), [False, True, False, True])
    meter.measure(before, look)
    groups = {"window": [0, 1, 2, 3], "active": [1, 3], "history": [0]}
    expected = []
    for name in names:
        kind, rows = SIGNALS[name].kind, groups[SIGNALS[name].group]
        expected.append(relative_l1(now[kind][:, rows], before[kind][:, rows]))
    torch.testing.assert_close(meter.measure(now, look), torch.stack(expected))


def test_a_growing_window_compares_the_frames_seen_before_only() -> None:
    meter = SignalMeter(["input"], 5)
    before, now = feature(3, 0), feature(5, 1)
    meter.measure({"modulated": before}, call((0, 3)))
    found = meter.measure({"modulated": now}, call((0, 5)))
    torch.testing.assert_close(found[0], relative_l1(now[:, :3], before))


def test_a_moving_window_compares_by_latent_frame() -> None:
    meter = SignalMeter(["input"], 6)
    before, now, later = feature(4, 0), feature(4, 1), feature(4, 2)
    meter.measure({"modulated": before}, call((0, 4)))
    found = meter.measure({"modulated": now}, call((2, 6)))
    torch.testing.assert_close(found[0], relative_l1(now[:, :2], before[:, 2:]))
    found = meter.measure({"modulated": later}, call((0, 4)))
    torch.testing.assert_close(found[0], relative_l1(later, torch.cat([before[:, :2], now[:, :2]], 1)))


def test_a_group_without_frames_seen_before_has_no_signal() -> None:
    meter = SignalMeter(["current", "input", "history-mod"], 4)
    meter.measure({"modulated": feature(2, 0)}, call((0, 2)))
    current, whole, history = meter.measure(
        {"modulated": feature(4, 1)}, call((0, 4), [False, False, True, True])
    ).tolist()
    assert math.isnan(current) and whole > 0.0 and history > 0.0
    assert math.isnan(SignalMeter(["history-mod"], 4).measure({"modulated": feature(4, 1)}, call((0, 4))).item())


def test_history_outside_the_window_comes_first_and_belongs_to_history() -> None:
    meter = SignalMeter(["history-mod", "current", "input"], 4)
    before, now, later = feature(5, 0), feature(5, 1), feature(4, 2)
    meter.measure({"modulated": before}, call((0, 3)))
    found = meter.measure({"modulated": now}, call((0, 3)))
    expected = [relative_l1(now[:, rows], before[:, rows]) for rows in (slice(0, 2), slice(2, 5), slice(0, 5))]
    torch.testing.assert_close(found, torch.stack(expected))
    moved = meter.measure({"modulated": later}, call((1, 3)))
    torch.testing.assert_close(moved[1], relative_l1(later[:, 2:], now[:, 3:]))


def test_the_measure_does_not_hold_on_to_the_callers_tensors() -> None:
    meter = SignalMeter(["latent"], 2)
    before = feature(2, 0)
    kept = before.clone()
    meter.measure({"latent": before}, call((0, 2)))
    before.zero_()
    now = feature(2, 1)
    torch.testing.assert_close(meter.measure({"latent": now}, call((0, 2)))[0], relative_l1(now, kept))


def test_a_sketch_bounds_the_memory_and_estimates_the_signal() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(1, 3, 150, 192, generator=generator)
    now = before + 0.1 * torch.randn(1, 3, 150, 192, generator=generator) * torch.linspace(0, 2, 192)
    exact, small = SignalMeter(["input"], 3, sketch=None), SignalMeter(["input"], 3)
    for meter in (exact, small):
        meter.measure({"modulated": before}, call((0, 3)))
    assert exact.nbytes == 3 * 150 * 192 * 4 and 0 < small.nbytes <= 3 * 4096 * 4
    full = exact.measure({"modulated": now}, call((0, 3))).item()
    assert small.measure({"modulated": now}, call((0, 3))).item() == pytest.approx(full, rel=0.05)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 64), st.integers(1, 300))
def test_a_sketch_never_exceeds_its_size_and_reaches_every_channel(
    frames: int, tokens: int, channels: int, sketch: int
) -> None:
    meter = SignalMeter(["latent"], frames, sketch=sketch)
    rows = torch.arange(tokens * channels).float().reshape(tokens, channels).expand(1, frames, -1, -1)
    meter.measure({"latent": rows}, call((0, frames)))
    kept = meter._seen["latent"]._rows[0, 0].long()
    assert 1 <= len(kept) <= sketch
    assert len(set((kept % channels).tolist())) == min(len(kept), channels)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=6))
def test_equal_looks_measure_zero_or_nothing(windows: list[tuple[int, int]]) -> None:
    meter = SignalMeter(["input", "latent"], 5)
    rows = feature(5, 0)
    for first, last in windows:
        start, end = min(first, last - 1), max(first + 1, last)
        part = rows[:, start:end]
        for value in meter.measure({"modulated": part, "latent": part}, call((start, end))).tolist():
            assert math.isnan(value) or value == 0.0


def test_a_broken_frame_is_no_number_and_spoils_no_other_signal() -> None:
    meter = SignalMeter(["history-mod", "current"], 3)
    look = call((0, 3), [False, True, True])
    meter.measure({"modulated": feature(3, 0)}, look)
    broken = feature(3, 1)
    broken[0, 2, 0, 0] = math.nan
    history, current = meter.measure({"modulated": broken}, look).tolist()
    assert history > 0.0 and math.isnan(current)


def test_a_feature_of_another_shape_starts_again() -> None:
    meter = SignalMeter(["latent"], 2)
    meter.measure({"latent": feature(2, 0)}, call((0, 2)))
    assert math.isnan(meter.measure({"latent": feature(2, 0, batch=1)}, call((0, 2))).item())


def test_a_meter_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match="'motion' is not known"):
        SignalMeter(["motion"], 2)
    with pytest.raises(ValueError, match="sketch 0"):
        SignalMeter(["latent"], 2, sketch=0)
    meter = SignalMeter(["latent"], 3)
    with pytest.raises(ValueError, match="'latent' is missing"):
        meter.measure({"modulated": feature(2, 0)}, call((0, 2)))
    with pytest.raises(ValueError, match="2 or more"):
        meter.measure({"latent": feature(1, 0)}, call((0, 2)))


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors on ``meta`` have no values to read."""
    meter = SignalMeter(["input", "current", "latent"], 4)
    for window in ((0, 3), (1, 4)):
        features = {kind: torch.empty(1, 3, 8, 16, device="meta") for kind in meter.kinds}
        assert meter.measure(features, call(window)).shape == (3,)


def look(levels: dict[int, float], name: str, at: Call) -> float:
    found = level_step(name, levels, at)
    remember_levels(levels, at)
    return found


def test_level_steps_are_averaged_over_active_frames_seen_before() -> None:
    levels: dict[int, float] = {}
    assert math.isnan(look(levels, "log-snr", call((0, 2), sigmas=[0.8, 0.9])))
    found = look(levels, "log-snr", call((0, 3), [True, False, True], [0.5, 0.6, 1.0]))
    assert found == pytest.approx(math.log(0.8 / 0.2))
    assert levels == {0: 0.5, 1: 0.6, 2: 1.0}
    assert look(levels, "log-snr", call((1, 3), sigmas=[0.6, 1.0])) == 0.0
    assert math.isfinite(look(levels, "log-snr", call((1, 3), sigmas=[0.6, 0.0])))
    assert math.isnan(look(levels, "log-snr", call((1, 3), sigmas=[math.nan, 0.5])))


def test_the_log_signal_moves_while_the_picture_rises_out_of_the_noise() -> None:
    levels = {0: 0.99}
    assert look(levels, "log-signal", call((0, 1), sigmas=[0.98])) == pytest.approx(math.log(2))
    assert look({0: 0.02}, "log-signal", call((0, 1), sigmas=[0.01])) == pytest.approx(math.log(0.99 / 0.98))


def test_the_history_signal_is_the_first_that_can_tell_calls_apart() -> None:
    chosen = {
        ("auto", True, True, True): "history-mod",
        ("auto", True, False, True): "history-block0",
        ("auto", True, True, False): "current",
        ("auto", False, True, True): "current",
        ("mod", True, True, True): "history-mod",
        ("mod", True, False, True): "history-block0",
        ("block0", True, True, True): "history-block0",
        ("block0", True, False, False): "current",
        ("current", True, True, True): "current",
    }
    for question, name in chosen.items():
        found, note = resolve_history_signal(*question)
        assert found == name and found in SIGNALS
        wanted = {"auto": "history-mod", "mod": "history-mod", "block0": "history-block0"}.get(question[0], "current")
        assert (note is None) == (found == wanted)
    with pytest.raises(ValueError, match="'hgc' is not known"):
        resolve_history_signal("hgc", True, True, True)
