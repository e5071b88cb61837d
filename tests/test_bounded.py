"""The K/V store of fixed size: equal to dense attention while all fits, one allocation and true distances after."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.kv.bounded import LONGEST_POSITION, BoundedStore
from accel.kv.ring import Layout
from accel.kv.rotary import TimeRotary
from accel.kv.slots import ByteSlots, PlainSlots, Scratch

TOKENS, HEADS, DIM = 3, 2, 12
ROTARY = TimeRotary.of_wan(DIM)


def dense(layer, q, k, v, bias, always, fresh):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, None if bias is None else bias[None, None, None])
    return out.transpose(1, 2)


def store(sink, ring, middle=0, span=None, rule=None, make=PlainSlots, layers=1):
    layout = Layout(TOKENS, sink, ring, middle, span or sink + ring)
    return BoundedStore(layers, layout, ROTARY, dense, rule, make)


def rows(frames, seed=0, dtype=torch.float64):
    shape = (1, frames * TOKENS, HEADS, DIM)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def turned(x, first):
    frames = torch.arange(first, first + x.shape[1] // TOKENS).repeat_interleave(TOKENS)
    time = ROTARY.turn(x[..., : ROTARY.channels].float(), frames).to(x.dtype)
    return torch.cat((time, x[..., ROTARY.channels :]), -1)


def roll(kept, q, k, v, blocks, passes=2):
    """Forwards the blocks as a sampler would, noisy first and clean last; outputs of the clean ones."""
    outputs, first = [], 0
    for frames in blocks:
        part = slice(first * TOKENS, (first + frames) * TOKENS)
        for number in range(passes):
            at = kept.begin(first, frames)
            scale = 1.0 if number == passes - 1 else 0.3
            out = kept.attend(0, turned(q[:, part], at), turned(k[:, part] * scale, at), v[:, part] * scale)
        outputs.append(out)
        kept.commit()
        first += frames
    return torch.cat(outputs, 1)


def expected(q, k, v, blocks, sink, ring):
    """Every block against the sink and the frames that the ring still holds, at true distances up to the window."""
    outputs, first = [], 0
    for frames in blocks:
        newest, span = first + frames - 1, sink + ring
        oldest = max(sink, first + frames - ring)
        seen = [f for f in range(first + frames) if f < sink or f >= oldest]
        places = [max(f, newest + 1 - span + f) if f < sink else f for f in seen]
        keys = torch.cat([turned(k[:, f * TOKENS : (f + 1) * TOKENS], p) for f, p in zip(seen, places, strict=True)], 1)
        values = torch.cat([v[:, f * TOKENS : (f + 1) * TOKENS] for f in seen], 1)
        part = slice(first * TOKENS, (first + frames) * TOKENS)
        outputs.append(dense(0, turned(q[:, part], first), keys, values, None, (), True))
        first += frames
    return torch.cat(outputs, 1)


def test_while_all_fits_attention_is_dense_and_positions_are_the_videos():
    q, k, v = rows(7)
    kept = store(1, 6)
    assert torch.allclose(roll(kept, q, k, v, (1, 3, 3)), expected(q, k, v, (1, 3, 3), 1, 6), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2), st.integers(3, 7), st.lists(st.integers(1, 3), min_size=1, max_size=12))
def test_a_window_sees_its_frames_at_true_distances_and_the_sink_no_further_than_the_window(sink, ring, blocks):
    q, k, v = rows(sum(blocks))
    ours = roll(store(sink, ring), q, k, v, blocks)
    assert torch.allclose(ours, expected(q, k, v, blocks, sink, ring), atol=1e-5)


def test_positions_stay_small_and_distances_true_however_long_the_video():
    kept, blocks = store(1, 6), [2] * 500
    q, k, v = rows(sum(blocks), dtype=torch.float32)
    ours = roll(kept, q, k, v, blocks, passes=1)
    assert torch.allclose(ours, expected(q, k, v, blocks, 1, 6).float(), atol=2e-4)
    assert kept.begin(1000, 2) <= LONGEST_POSITION
    kept.frames = 1_000_000
    kept._block, kept._base = None, kept._base + 999_000
    at = kept.begin(1_000_000, 2)
    assert 0 <= at <= LONGEST_POSITION
    assert torch.isfinite(kept.attend(0, *(turned(x[:, : 2 * TOKENS], at) for x in (q, k)), v[:, : 2 * TOKENS])).all()


def test_nothing_is_allocated_once_the_first_block_is_in():
    q, k, v = rows(40, dtype=torch.float32)
    kept, sizes, keys, first = store(1, 6), [], [], 0
    for _ in range(20):
        part = slice(first * TOKENS, (first + 2) * TOKENS)
        at = kept.begin(first, 2)
        kept.attend(0, turned(q[:, part], at), turned(k[:, part], at), v[:, part])
        sizes.append(kept.nbytes), keys.append(kept.keys)
        kept.commit()
        first += 2
    assert len(set(sizes)) == 1 and keys[3:] == [21.0] * 17 and keys[:3] == [6.0, 12.0, 18.0]


def test_a_block_must_fit_the_ring_and_follow_what_is_committed():
    kept = store(1, 3)
    with pytest.raises(ValueError, match="does not fit the 3"):
        kept.begin(0, 4)
    with pytest.raises(ValueError, match="0 are committed"):
        kept.begin(2, 1)


@pytest.mark.parametrize("make", [PlainSlots, lambda like, tokens: ByteSlots(like, tokens, Scratch())])
def test_a_resumed_store_goes_on_bit_for_bit(make):
    q, k, v = rows(24, dtype=torch.float32)
    whole = roll(store(1, 6, make=make), q, k, v, [2] * 12)
    first = store(1, 6, make=make)
    roll(first, q, k, v, [2] * 7)
    again = store(1, 6, make=make)
    again.load({key: value.clone() for key, value in first.state().items()})
    rest = []
    for start in range(14, 24, 2):
        part = slice(start * TOKENS, (start + 2) * TOKENS)
        for scale in (0.3, 1.0):
            at = again.begin(start, 2)
            out = again.attend(0, turned(q[:, part], at), turned(k[:, part] * scale, at), v[:, part] * scale)
        rest.append(out)
        again.commit()
    assert torch.equal(torch.cat(rest, 1), whole[:, 14 * TOKENS :])


def test_a_store_resumed_where_positions_begin_anew_goes_on_bit_for_bit():
    q, k, v = rows(LONGEST_POSITION + 4, dtype=torch.float32)
    whole = roll(store(1, 6), q, k, v, [2] * (LONGEST_POSITION // 2 + 2), passes=1)
    first, again = store(1, 6), store(1, 6)
    roll(first, q, k, v, [2] * (LONGEST_POSITION // 2), passes=1)
    again.load({key: value.clone() for key, value in first.state().items()})
    for start in (LONGEST_POSITION, LONGEST_POSITION + 2):
        part = slice(start * TOKENS, (start + 2) * TOKENS)
        at = again.begin(start, 2)
        assert at < 10
        out = again.attend(0, turned(q[:, part], at), turned(k[:, part], at), v[:, part])
        assert torch.equal(out, whole[:, part])
        again.commit()


def test_bytes_hold_keys_and_values_to_a_hundredth():
    q, k, v = rows(12, dtype=torch.float32)
    exact = roll(store(1, 6), q, k, v, [2] * 6)
    scratch = Scratch()
    kept = store(1, 6, make=lambda like, tokens: ByteSlots(like, tokens, scratch))
    rough = roll(kept, q, k, v, [2] * 6)
    assert (rough - exact).norm() < 0.02 * exact.norm()
    assert not torch.equal(rough, exact) and kept.nbytes < 0.62 * store_bytes(q, k, v)


def store_bytes(q, k, v):
    kept = store(1, 6)
    roll(kept, q, k, v, [2])
    return kept.nbytes


def test_a_turn_undone_is_no_turn_and_turns_add_up():
    x = torch.randn(1, 5, 2, ROTARY.channels, dtype=torch.float64)
    at = torch.tensor([0, 3, 900, 12, -4])
    assert torch.allclose(ROTARY.turn(ROTARY.turn(x, at), -at), x, atol=1e-5)
    assert torch.allclose(ROTARY.turn(ROTARY.turn(x, at), at), ROTARY.turn(x, 2 * at), atol=1e-5)
