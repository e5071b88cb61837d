"""Grouped heads at work: each head attends over exactly the frames its group keeps, in the bytes the layer had."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from accel.acceleration import Acceleration
from accel.attention.ann import AnnAttention, AnnConfig
from accel.kv.bounded import BoundedStore
from accel.kv.budget import HEADS, KVBudgetConfig, StoreShape, plan
from accel.kv.grouping import HeadGrouping, group_layouts, measured_parts
from accel.kv.head_groups import HeadGroupsConfig
from accel.kv.memory import dense, make_memory
from accel.kv.ring import Layout
from accel.kv.rotary import TimeRotary
from accel.metrics import psnr
from demo import denoiser as demo_denoiser
from demo.codec import TinyCodec
from demo.generate import load, sample_causal, start_noise
from demo.prompt import embed_text

TOKENS, LAYERS, HEADS_A_LAYER, DIM = 3, 3, 4, 12
ROTARY = TimeRotary.of_wan(DIM)
NOISE = 0.3  # what a noisy pass makes of keys and values


def store(sink, ring, block, share=0.5, near=1, span=None, attention=dense):
    layout = Layout(TOKENS, sink, ring, 0, span or sink + ring)
    grouping = HeadGrouping(HeadGroupsConfig(share, near), LAYERS, block, 64)
    return BoundedStore(LAYERS, layout, ROTARY, attention, grouping=grouping)


def rows(frames, batch=1, seed=0):
    shape = (LAYERS, batch, frames * TOKENS, HEADS_A_LAYER, DIM)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def turned(x, positions):
    time = ROTARY.turn(x[..., : ROTARY.channels], torch.tensor(positions).repeat_interleave(TOKENS))
    return torch.cat((time, x[..., ROTARY.channels :]), -1)


def frames_of(x, frames):
    return torch.cat([x[:, frame * TOKENS : (frame + 1) * TOKENS] for frame in frames], 1)


def roll(kept, sides, blocks, start=0, passes=2, told=None):
    """Forwards blocks as a sampler would, noisy first and clean last, from block ``start`` on; the clean outputs."""
    outputs, first = [], sum(blocks[:start])
    for frames in blocks[start:]:
        part = range(first, first + frames)
        for number in range(passes):
            at = kept.begin(first, frames)
            scale = 1.0 if number == passes - 1 else NOISE
            q, k, v = ([frames_of(layer, part) for layer in side] for side in sides)
            where = list(range(at, at + frames))
            out = [
                kept.attend(layer, turned(q[layer], where), turned(k[layer] * scale, where), v[layer] * scale)
                for layer in range(LAYERS)
            ]
        if told is not None:
            told.append((kept.nbytes, kept.keys))
        outputs.append(torch.stack(out))
        kept.commit()
        first += frames
    return torch.cat(outputs, 2)


def stand(frame, sink, newest, span):
    """Where a latent frame stands: one of the sink no further back than the window."""
    return max(frame, newest + 1 - span + frame) if frame < sink else frame


def simulated(sides, blocks, sink, ring, span, block, share, near):
    """Every head, in float64, over the frames that its group is to hold, the groups found from the definition."""
    (q, k, v), held, room = [side.double() for side in sides], None, {}
    outputs, first, since = [], 0, 0
    for frames in blocks:
        part, newest = list(range(first, first + frames)), first + frames - 1
        oldest = max(sink, newest + 1 - ring)
        common = [f for f in range(newest + 1) if f < sink or f >= oldest]
        where = [stand(f, sink, newest, span) for f in common]
        measure = held is None and share > 0 and newest + 1 - ring > sink
        if measure:
            first_frames = common[:sink] or [oldest]
            masses = measured(q, k, common, where, part, first_frames)
        out = torch.zeros_like(q[:, :, : frames * TOKENS])
        for layer in range(LAYERS):
            for head in range(HEADS_A_LAYER):
                seen = common
                if held is not None and (layer, head) in held:
                    seen = list(range(max(newest + 1 - min(near + block, ring), since - near), newest + 1))
                elif held is not None:
                    begin = max(newest + 1 - (room[layer] - sink), since - ring)
                    seen = [f for f in range(newest + 1) if f < sink or f >= begin]
                where = [stand(f, sink, newest, span) for f in seen]
                one = (layer, slice(None), slice(None), slice(head, head + 1))
                keys, values = turned(frames_of(k[one], seen), where), frames_of(v[one], seen)
                out[one] = dense(0, turned(frames_of(q[one], part), part), keys, values, None, (), True)
        outputs.append(out)
        first += frames
        if measure:
            order = masses.flatten().argsort(stable=True)[: round(share * LAYERS * HEADS_A_LAYER)].tolist()
            held, since = {divmod(index, HEADS_A_LAYER) for index in order}, first
            for layer in range(LAYERS):
                count = sum(one == layer for one, _ in held)
                given_up = count * (sink + ring - min(near + block, ring))
                others = HEADS_A_LAYER - count
                room[layer] = min(sink + ring + (given_up // others if others else 0), max(span, sink + ring))
    return torch.cat(outputs, 2), held, room


def measured(q, k, common, where, part, sink):
    """``max(sink, middle)`` of the attention of a third of the block's queries at its first, noisy pass."""
    keys = torch.stack([turned(frames_of(layer, common), where) for layer in k])
    keys[:, :, -len(part) * TOKENS :] = torch.stack([turned(frames_of(layer, part) * NOISE, part) for layer in k])
    count = max(1, round(len(part) * TOKENS / 3))
    chosen = [index * len(part) * TOKENS // count for index in range(count)]
    asked = torch.stack([turned(frames_of(layer, part), part) for layer in q])[:, :, chosen]
    weights = (torch.einsum("lbqhd,lbkhd->lbhqk", asked, keys) / DIM**0.5).softmax(-1).unflatten(-1, (-1, TOKENS))
    by_frame = weights.sum(-1).mean((1, 3))
    first = by_frame[..., [index for index, frame in enumerate(common) if frame in sink and frame not in part]].sum(-1)
    rest = by_frame[..., [index for index, frame in enumerate(common) if frame not in (*sink, *part)]].sum(-1)
    return torch.maximum(first, rest)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2), st.integers(4, 7), st.integers(0, 5), st.lists(st.integers(1, 3), min_size=4, max_size=12),
    st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.integers(0, 2), st.integers(1, 2), st.integers(0, 99),
)  # fmt: skip
def test_every_head_attends_over_the_frames_of_its_group(sink, ring, more, blocks, share, near, batch, seed):
    sides, span = rows(sum(blocks), batch, seed), sink + ring + more
    kept = store(sink, ring, 3, share, near, span)
    ours = roll(kept, sides, blocks)
    expected, held, room = simulated(sides, blocks, sink, ring, span, 3, share, near)
    assert torch.allclose(ours.double(), expected, atol=1e-5)
    groups = kept.grouping.groups
    assert (groups is None) == (held is None)
    if groups is not None:
        assert {(layer, head) for layer, heads in enumerate(groups.near) for head in heads} == held
        assert kept.full_frames == [room[layer] for layer in range(LAYERS) if groups.full[layer]]


@pytest.mark.parametrize("span", [7, 9, 40])
def test_bytes_never_grow_and_what_the_longest_distance_leaves_is_freed(span):
    kept, told = store(1, 6, 2, near=0, span=span), []
    roll(kept, rows(40), [2] * 20, told=told)
    sizes = [size for size, _ in told]
    allocated = sum({side.untyped_storage().data_ptr(): side.untyped_storage().nbytes() for ring in
                     kept._present().values() for side in ring.slots.tensors().values()}.values())  # fmt: skip
    plain = sum(ring._plain.nbytes for ring in kept._present().values())
    assert sizes[-1] == allocated + plain and sizes == sorted(sizes, reverse=True)
    assert len(set(sizes[:4])) == 1 and (sizes[-1] < 0.8 * sizes[0]) == (span < 40)
    assert max(kept.full_frames) <= span


def test_keys_weigh_layers_and_heads_by_what_they_read():
    kept, told = store(1, 6, 2, span=40), []
    roll(kept, rows(60), [2] * 30, told=told)
    near = sum(map(len, kept.grouping.groups.near))
    full = [len(heads) * frames for heads, frames in zip(kept.grouping.groups.full, kept.full_frames, strict=True)]
    assert near == LAYERS * HEADS_A_LAYER / 2
    assert told[-1][1] == pytest.approx(TOKENS * (3 * near + sum(full)) / (LAYERS * HEADS_A_LAYER))
    assert [keys for _, keys in told[:4]] == [6.0, 12.0, 18.0, 21.0] and told[4][1] < 21.0 < told[-1][1] + 21.0


@pytest.mark.parametrize("stop", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("span", [7, 40])
def test_a_resumed_store_goes_on_bit_for_bit_before_and_after_the_heads_are_grouped(stop, span):
    sides, blocks = rows(24, batch=2), [2] * 12
    whole = roll(store(1, 6, 2, span=span), sides, blocks)
    first = store(1, 6, 2, span=span)
    roll(first, sides, blocks[:stop])
    assert (first.grouping.groups is not None) == (stop >= 4)
    again = store(1, 6, 2, span=span)
    again.load({key: value.clone() for key, value in first.state().items()})
    assert torch.equal(roll(again, sides, blocks, start=stop), whole[:, :, 2 * stop * TOKENS :])
    assert stop < 4 or again.nbytes <= first.nbytes


def test_grouped_rings_are_turned_back_with_the_video():
    sides, blocks = rows(520), [4] * 130
    ours = roll(store(1, 8, 4, span=12), sides, blocks, passes=2)
    expected, held, _ = simulated(sides, blocks, 1, 8, 12, 4, 0.5, 1)
    assert held and torch.allclose(ours.double(), expected, atol=2e-4)


def test_without_near_heads_and_while_all_fits_a_window_stays_a_window_bit_for_bit():
    sides = rows(24)
    window = BoundedStore(LAYERS, Layout(TOKENS, 1, 6, 0, 20), ROTARY, dense)
    assert torch.equal(roll(store(1, 6, 2, share=0.0, span=20), sides, [2] * 12), roll(window, sides, [2] * 12))
    long = store(0, 24, 2)
    window = BoundedStore(LAYERS, Layout(TOKENS, 0, 24, 0, 24), ROTARY, dense)
    assert torch.equal(roll(long, sides, [2] * 12), roll(window, sides, [2] * 12)) and long.grouping.groups is None


def test_a_block_whose_first_forward_was_skipped_is_grouped_all_the_same():
    kept = store(1, 6, 2)
    roll(kept, rows(24), [2] * 12, passes=1)
    assert kept.grouping.groups is not None and kept.grouping.since == 8


def test_sparse_attention_of_grouped_heads_reads_sink_last_frame_and_block_of_its_own_ring():
    seen = []

    def spy(layer, q, k, v, bias, always, fresh):
        seen.append((layer, q.shape[2], k.shape[1], always))
        return dense(layer, q, k, v, bias, always, fresh)

    roll(store(1, 6, 2, span=20, attention=spy), rows(40), [2] * 20)
    last = {layer: (heads, keys, always) for layer, heads, keys, always in seen}
    assert {heads for heads, *_ in last.values()} <= {1, 2, 3, 4} and sum(one[0] for one in last.values()) >= 12
    for layer, (_, keys, always) in last.items():
        lengths = sum(end - start for start, end in always)
        assert lengths == TOKENS * (3 if layer >= LAYERS or keys == 3 * TOKENS else 4) and always[-1][1] <= keys
    sparse = AnnAttention(AnnConfig(density=0.3, tile=16, shortest=0), TOKENS)
    out = roll(store(1, 26, 2, span=40, attention=sparse), rows(80), [2] * 40)
    assert out.isfinite().all() and sparse.counts.sparse > 0


def test_parts_of_a_ring_that_has_wrapped():
    layout = Layout(TOKENS, 1, 6, 0, 7)
    assert measured_parts(layout, 6, 2) == [[(0, 3)], [(6, 18)], [(3, 6), (18, 21)]]
    assert measured_parts(Layout(TOKENS, 0, 4, 0, 4), 4, 2) == [[(6, 9)], [(9, 12)], [(0, 6)]]


def test_the_longer_ring_stays_within_the_longest_distance():
    full, near = group_layouts(Layout(TOKENS, 1, 12, 0, 21), 6, 6, 1, 3, 30)
    assert (full.sink, full.ring, full.gone, near.sink, near.ring, near.gone) == (1, 20, 17, 0, 4, 29)
    full, _ = group_layouts(Layout(TOKENS, 1, 12, 0, 21), 3, 9, 1, 3, 30)
    assert full.whole_frames == 16


def test_wan_plans_the_same_window_with_groups_as_without():
    shape = StoreShape(30, 12, 128, (30, 52), 1, 2, TimeRotary.of_wan(128))
    window = plan(KVBudgetConfig(frames=13), shape, 1, 3, 81)
    assert plan(KVBudgetConfig(frames=13, keep=HEADS), shape, 1, 3, 81) == window


def test_eight_bit_storage_is_refused_in_a_sentence():
    with pytest.raises(
        ValueError, match="^KV Cache Budget: storage is '8-bit', but head-groups .* set storage to model"
    ):
        KVBudgetConfig(frames=8, keep=HEADS, storage="8-bit")


class Beside(TorchDispatchMode):
    """The most bytes of tensors alive at once that lie outside the given storages."""

    def __init__(self, known):
        super().__init__()
        self.known, self.sizes, self.most = known, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
            place = out.untyped_storage().data_ptr()
            self.sizes[id(out)] = (place, out.untyped_storage().nbytes())
            weakref.finalize(out, self.sizes.pop, id(out), None)
            self.most = max(self.most, sum(dict(self.sizes.values()).values()))
        return out


@pytest.mark.parametrize("near", [0, 1, 3])
def test_heads_are_given_other_room_with_no_more_beside_than_was_planned(near):
    shape = StoreShape(8, 4, 12, (8, 8), 2, 4, ROTARY)
    memory = make_memory(KVBudgetConfig(frames=14, sink=0, keep=HEADS, near=near, span=200), shape, 1, 2, 100)
    store, generator, most = memory.stores[0], torch.Generator().manual_seed(1), 0
    for first in range(0, 18, 2):
        memory.begin(first, 2)
        for layer in range(8):
            memory.attend(layer, *(torch.randn(2, 128, 4, 12, generator=generator) for _ in range(3)))
        tensors = [tensor for ring in store._present().values() for tensor in ring.tensors().values()]
        with Beside({tensor.untyped_storage().data_ptr() for tensor in tensors}) as beside:
            memory.commit()
        most = max(most, beside.most)
    assert all(map(len, store.grouping.groups.full)), "no layer gives memory back, which a CPU copies beside"
    assert 0 < most <= shape.scratch_bytes(memory.layout, memory.config) + 2048  # which heads, and their masses


@cache
def rollouts(frames=8):
    """The trained causal model over 24 latent frames of two seeds: videos and final K/V of all kept, of a window, of
    groups with the defaults and with a chunk of near history."""
    model, codec, context = load("tiny-causal"), TinyCodec.load(), embed_text("red disc, blue square, gravity")
    noise, made, memories = start_noise([1, 2], 24), {}, []
    make = demo_denoiser.make_memory

    def remembered(*args, **kwargs):
        memories.append(make(*args, **kwargs))
        return memories[-1]

    window = KVBudgetConfig(frames=frames)
    asked = {"all": None, "window": window, "share 0": replace(window, keep=HEADS, near_share=0.0),
             "groups": replace(window, keep=HEADS), "chunk": replace(window, keep=HEADS, near=4)}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_denoiser, "make_memory", remembered)
        for name, budget in asked.items():
            result = sample_causal(
                model, context.expand(2, -1, -1), noise, Acceleration(kv_budget=budget), steps=5, guidance=2.0
            )
            made[name] = codec.decode(result.latents), memories[-1] if budget else None
    return made


def test_a_trained_model_rolls_out_with_grouped_heads_within_its_bytes():
    made = rollouts()
    video, memory = made["groups"]
    near = [heads for store in memory.stores for heads in store.grouping.groups.near]
    assert video.isfinite().all() and sum(map(len, near)) == 18  # half the heads of two branches
    assert memory.layout == made["window"][1].layout and memory.nbytes <= made["window"][1].nbytes
    assert memory.nbytes < memory.planned_bytes
    assert "18 of 36 heads keep the latest 1 and their block; the others keep " in memory.note()
    assert 0.5 * made["window"][1].keys < memory.keys < 1.2 * made["window"][1].keys
    assert torch.equal(made["share 0"][0], made["window"][0])
    quality = {name: psnr(made["all"][0], made[name][0]) for name in ("window", "groups", "chunk")}
    assert min(quality["groups"], quality["chunk"]) > quality["window"] - 3.0, quality


def test_memory_of_grouped_heads_is_saved_and_loaded_with_both_branches():
    shape = StoreShape(2, 4, 12, (2, 2), 1, 4, ROTARY)

    def forward(memory, first, seed):
        generator = torch.Generator().manual_seed(seed)
        memory.begin(first, 2)
        out = [memory.attend(layer, *(torch.randn(2, 8, 4, 12, generator=generator) for _ in range(3)))
               for layer in range(2)]  # fmt: skip
        memory.commit()
        return torch.stack(out)

    one, two = (make_memory(KVBudgetConfig(frames=10, keep=HEADS), shape, 2, 2, 100) for _ in range(2))
    for first in range(0, 20, 2):
        forward(one, first, first)
    two.load(one.state())
    for first in range(20, 30, 2):
        assert torch.equal(forward(one, first, first), forward(two, first, first))
    assert one.nbytes == two.nbytes and one.keys == two.keys and one.note() == two.note()
