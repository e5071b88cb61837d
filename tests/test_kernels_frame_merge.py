"""The kernels of temporal merge against float64, and what they move."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.kernels import choose, frame_merge
from accel.kernels.choose import Usage
from accel.kernels.frame_merge import supports, traffic
from accel.kv.temporal_merge import TemporalMerge, TemporalMergeConfig, correspondence, merge_frame, merge_kernel
from accel.kv.tokens import Tokens
from tests.triton_interpreter import interpreted, needs_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS, PLAIN = 2, 6


def tokens(rows, frames, batch=1, dim=16, dtype=torch.float32, seed=0, near=None, change=0.3):
    """Random tokens of one time; like ``near`` but for ``change``, where given."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, rows, HEADS, dim, generator=generator) for _ in range(2))
    if near is not None:
        keys = near.float() + change * keys
    keys = keys.to(dtype)
    return Tokens(keys, values.to(dtype), torch.full((rows,), frames), keys[..., :PLAIN].contiguous())


def case(grid, extra, batch=1, dim=16, dtype=torch.float32, change=0.3, missing=0, seed=0):
    """A middle whose first rows stand for a frame's places in another order, and the frame after it."""
    size, generator = grid[0] * grid[1], torch.Generator().manual_seed(seed)
    places = torch.randperm(size, generator=generator)
    middle = tokens(2 * size + extra, 3, batch, dim, dtype, seed)
    middle = Tokens(
        middle.keys, middle.values, middle.frames, middle.plain,
        torch.randint(1, 5, (len(middle),), generator=generator).float(),
    )  # fmt: skip
    frame = tokens(size, 4, batch, dim, dtype, seed + 1, middle.keys[:, places], change)
    places[:missing] = -1
    return places, torch.tensor(size + extra), middle, frame


def copied(middle):
    parts = (middle.keys, middle.values, middle.frames, middle.plain, middle.counts)
    return Tokens(*(part.clone() for part in parts))


def wide(one):
    counts = None if one.counts is None else one.counts.double()
    return Tokens(one.keys.double(), one.values.double(), one.frames, one.plain.double(), counts)


def check(places, live, middle, frame, capacity, config, grid):
    """The kernels do what the torch form does in float64, up to the rounding of values."""
    expected, shown = copied(wide(middle)), copied(middle)
    into, grown = merge_frame(places, live, expected, wide(frame), capacity, config, grid)
    with interpreted() as launches:
        found, length = merge_kernel(places, live, shown, frame, capacity, config, grid, backend="triton")
    assert torch.equal(found, into) and torch.equal(length, grown) and length.dtype == live.dtype
    for part in ("keys", "plain", "frames", "counts"):
        assert torch.equal(getattr(shown, part).double(), getattr(expected, part).double()), part
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[frame.keys.dtype]
    torch.testing.assert_close(shown.values.double(), expected.values, rtol=rounding, atol=rounding)
    assert launches.names == ["similarities", "assigned", "joined"]
    return launches, into


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [0.0, 0.45, 3.0])
def test_a_frame_joins_as_in_float64(dtype, change):
    config = TemporalMergeConfig(threshold=0.9, floor=0.7, most=3)
    *_, into = check(*case((3, 5), 7, 2, 16, dtype, change), None, config, (3, 5))
    joined = int((into < 15 + 7).sum())
    assert joined == 15 if change == 0.0 else joined < 15


@needs_triton
@settings(max_examples=6, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)), reach=st.integers(0, 1), dim=st.sampled_from([6, 16, 20]),
    room=st.integers(-9, 3), change=st.floats(0.0, 0.9), missing=st.integers(0, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_grid_any_neighbourhood_and_any_room(grid, reach, dim, room, change, missing, seed):
    size = grid[0] * grid[1]
    config = TemporalMergeConfig(threshold=0.9, floor=0.4, neighbourhood=reach)
    given_ = case(grid, 3, 1, dim, torch.float32, change, min(missing, size), seed)
    check(*given_, size + 3 + room + size // 2, config, grid)


@needs_triton
def test_where_several_ask_the_first_of_the_most_similar_gets_it():
    places, live, middle, frame = case((3, 4), 0, change=0.0)
    ones = Tokens(torch.ones_like(frame.keys), frame.values, frame.frames, frame.plain)
    middle.keys[:] = 1.0
    for missing in (0, 5):
        places[:missing] = -1
        check(places, live, middle, ones, None, TemporalMergeConfig(), (3, 4))


@needs_triton
def test_what_is_not_a_number_joins_nothing():
    places, live, middle, frame = case((2, 3), 0, change=0.0)
    frame.keys[:, 1] = math.nan
    with interpreted():
        into, grown = merge_kernel(
            places, live, middle, frame, None, TemporalMergeConfig(neighbourhood=0), (2, 3), backend="triton"
        )
    assert into[1] == 6 and grown == 7


@needs_triton
def test_a_film_is_merged_the_same_with_them(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    keys = [torch.randn(1, 12, HEADS, 16, generator=generator)]
    for _ in range(5):
        keys.append(keys[-1] + 0.5 * torch.randn(1, 12, HEADS, 16, generator=generator))
    film = [Tokens(key, key + 1, torch.full((12,), at), key[..., :PLAIN].contiguous()) for at, key in enumerate(keys)]
    plain, fast = (TemporalMerge(TemporalMergeConfig(threshold=0.9), 3, 4) for _ in range(2))
    kept = other = None
    for frame in film:
        kept = plain.absorb(0, kept, frame, frame.keys, 20)
        usage = Usage()
        with interpreted() as launches, monkeypatch.context() as patch:
            patch.setattr(choose, "available", lambda device: (True, ""))
            other = fast.absorb(0, other, frame, frame.keys, 20)
        assert (len(launches.names), usage.line()) == (3, "temporal merge Triton")
        for part in ("keys", "frames", "counts", "plain"):
            assert torch.equal(getattr(kept, part), getattr(other, part))
        torch.testing.assert_close(kept.values, other.values)
    assert len(kept) == 20, "it had to evict"


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("change", [0.0, 0.45])
def test_every_number_is_moved_once(dtype, change):
    places, live, middle, frame = case((4, 5), 2, 2, 16, dtype, change)
    launches, into = check(places, live, middle, frame, None, TemporalMergeConfig(threshold=0.9), (4, 5))
    joining = int((into < 22).sum())
    assert joining == 20 if change == 0.0 else 0 < joining < 20
    counted, most = launches.traffic, traffic(2, HEADS, 16, (4, 5), joining, dtype.itemsize, PLAIN, 1)
    assert counted == most if joining == 20 else most.read - 80 <= counted[1] <= most.read
    assert counted[2] == most.written


def test_a_full_size_frame_moves_what_it_must():
    """Wan 1.3B at 480p in bfloat16, all tokens joining: six passes over a frame's keys, and less than a hundredth."""
    moved, side = traffic(1, 12, 128, (30, 52), 1560, 2, 44, 1), 1560 * 12 * 128 * 2
    assert moved.launches == 3
    times = 1560 * 12 * 44 * 2
    assert moved.read + moved.written == pytest.approx(7 * side + 2 * times, rel=0.01)


def test_the_torch_form_makes_more_than_ten_times_as_much():
    """Bytes that the torch form writes on the way, at full size, by shape."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Written(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not function.is_view:
                self.bytes += out.nbytes
            return out

    with Written() as written:
        shape = (1, 1560, 12, 128)
        keys = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        one = Tokens(keys, keys, torch.empty(1560, dtype=torch.int64, device="meta"))
        before = written.bytes
        correspondence(torch.empty(1560, dtype=torch.int64, device="meta"), one, one, 1, (30, 52))
    assert written.bytes - before > 10 * traffic(1, 12, 128, (30, 52), 1560, 2, 44, 1).written


def test_what_the_kernels_do_not_take_has_a_reason():
    places, live, middle, frame = case((2, 3), 0)
    config = TemporalMergeConfig()
    assert supports(places, live, middle, frame, None, config, (2, 3)) == (True, "")
    for refused, settings_, reason in (
        (wide(frame), config, "no kernel for torch.float64"),
        (frame, TemporalMergeConfig(neighbourhood=frame_merge.MOST_REACH + 1), "neighbourhood of 4"),
        (Tokens(frame.keys.transpose(2, 3), frame.values, frame.frames, frame.plain), config, "one after another"),
    ):
        ok, why = supports(places, live, middle, refused, None, settings_, (2, 3))
        assert not ok and reason in why
