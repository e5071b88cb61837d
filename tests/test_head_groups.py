"""Head groups: masses are those of the softmax, the heads that look back least become near, bytes stay."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.kv.head_groups import HeadGroupsConfig, classify, head_masses, ring_frames, sampled


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(q, k, sink, current):
    """The definition, with the matrix, in float64."""
    attention = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1)
    middle = k.shape[-2] - sink - current
    masses = torch.stack([part.sum(-1) for part in attention.split([sink, middle, current], -1)], -1)
    return masses.mean(-2).reshape(-1, k.shape[-3], 3).mean(0)


@given(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)), st.integers(1, 12), st.integers(1, 3),
    st.integers(1, 300), st.integers(0, 99),
)  # fmt: skip
def test_masses_are_the_sums_of_the_softmax(parts, queries, batch, tile, seed):
    q, k = random(batch, 3, queries, 8, seed=seed), random(batch, 3, sum(parts), 8, seed=seed + 1)
    masses = head_masses(q, k, parts[0], parts[2], sample=1.0, tile=tile)
    torch.testing.assert_close(masses, dense(q, k, parts[0], parts[2]).float())
    torch.testing.assert_close(masses.sum(-1), torch.ones(3))
    exact = head_masses(q.double(), k.double(), parts[0], parts[2], sample=1.0, tile=tile)
    torch.testing.assert_close(exact, dense(q, k, parts[0], parts[2]), atol=1e-12, rtol=0)


def test_a_third_of_the_queries_is_taken_at_even_distances():
    assert sampled(9, 1 / 3).tolist() == [0, 3, 6] and sampled(10, 0.25).tolist() == [0, 5]
    assert sampled(2, 0.01).tolist() == [0] and sampled(3, 1.0).tolist() == [0, 1, 2]
    q, k = random(2, 9, 8), random(2, 12, 8, seed=1)
    torch.testing.assert_close(head_masses(q, k, 4, 4), dense(q[:, ::3], k, 4, 4).float())


@given(st.integers(1, 500), st.floats(0.01, 1))
def test_samples_are_distinct_queries(queries, share):
    found = sampled(queries, share)
    assert (found.diff() > 0).all() and found[0] == 0 and found[-1] < queries
    assert abs(len(found) - share * queries) <= 1


def test_large_logits_do_not_overflow():
    masses = head_masses(1e3 * torch.ones(1, 2, 4), torch.ones(1, 6, 4) * torch.arange(6)[:, None], 2, 2, 1.0)
    assert masses.tolist() == [[0.0, 0.0, 1.0]]


def test_a_head_that_looks_at_its_own_block_is_near():
    q = torch.eye(4)[:3, None].expand(3, 5, 4) * 20
    k = torch.eye(4)[[0, 0, 1, 1, 1, 2]].expand(3, 6, 4)
    masses = head_masses(q, k, sink_tokens=2, current_tokens=1)
    assert masses.argmax(-1).tolist() == [0, 1, 2]
    groups = classify(masses[None], HeadGroupsConfig(share=1 / 3))
    assert groups.near == ((2,),) and groups.full == ((0, 1),)


def test_the_share_is_of_all_heads_of_all_layers_by_the_larger_of_sink_and_middle():
    masses = torch.tensor([
        [[0.1, 0.2, 0.7], [0.0, 0.5, 0.5], [0.4, 0.0, 0.6]],
        [[0.05, 0.05, 0.9], [0.1, 0.1, 0.8], [0.15, 0.16, 0.69]],
    ])  # fmt: skip
    groups = classify(masses, HeadGroupsConfig(share=0.5))
    assert groups.near == ((), (0, 1, 2)) and groups.full == ((0, 1, 2), ())
    groups = classify(masses, HeadGroupsConfig(share=0.8))
    assert groups.near == ((0, 2), (0, 1, 2)) and groups.full == ((1,), ())


def test_masses_are_normalised_head_by_head():
    masses = torch.tensor([[[0.2, 0.1, 0.7], [0.3, 0.1, 2.6]]])
    assert classify(masses, HeadGroupsConfig()).near == ((1,),)


def test_equal_heads_go_by_layer_and_index():
    groups = classify(torch.full((4, 30, 3), 1 / 3), HeadGroupsConfig(share=0.375))
    assert groups.near == (tuple(range(30)), tuple(range(15)), (), ())


def test_a_head_without_a_finite_mass_keeps_everything():
    masses = torch.full((1, 3, 3), 1 / 3)
    masses[0, 0] = math.nan
    assert classify(masses, HeadGroupsConfig(share=1.0)).full == ((0,),)


@given(st.integers(1, 4), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_every_head_is_in_one_group_and_no_near_head_looks_back_more_than_a_full_one(layers, heads, share, seed):
    masses = random(layers, heads, 3, seed=seed).softmax(-1)
    groups = classify(masses, HeadGroupsConfig(share=share))
    for near, full in zip(groups.near, groups.full, strict=True):
        assert sorted(near + full) == list(range(heads)) and list(near) == sorted(near)
    assert sum(map(len, groups.near)) == round(share * layers * heads)
    back = [[masses[layer, head, :2].max() for layer in range(layers) for head in group[layer]]
            for group in (groups.near, groups.full)]  # fmt: skip
    assert not all(back) or max(back[0]) <= min(back[1])


def test_what_near_heads_give_up_the_full_ones_get():
    assert ring_frames(frames=21, heads=12, near_heads=6, near=1, block=3) == 38
    assert ring_frames(21, 12, 0, 1, 3) == ring_frames(21, 12, 12, 1, 3) == 21
    assert ring_frames(3, 12, 6, 1, 3) == 3, "never fewer"


@given(st.integers(0, 40), st.integers(1, 24), st.integers(0, 24), st.integers(0, 4), st.integers(0, 6))
def test_the_slots_of_a_layer_never_grow_and_none_is_wasted(frames, heads, near_heads, near, block):
    near_heads = min(near_heads, heads - 1)
    full = ring_frames(frames, heads, near_heads, near, block)
    used = (heads - near_heads) * full + near_heads * min(near + block, frames)
    assert full >= frames and 0 <= heads * frames - used < heads - near_heads


@pytest.mark.parametrize("options", [{"share": 1.1}, {"share": math.nan}, {"near": -1}, {"near": 1.5}, {"sample": 0}])
def test_bad_settings_are_refused_in_a_sentence(options):
    with pytest.raises(ValueError, match=r"^Head groups: .*use"):
        HeadGroupsConfig(**options)


def test_what_does_not_fit_is_refused_in_a_sentence():
    for refused in (
        lambda: head_masses(random(2, 3, 4), random(2, 5, 4), 3, 3),
        lambda: head_masses(random(4, 3, 4), random(2, 5, 4), 1, 1),
        lambda: classify(torch.zeros(2, 3), HeadGroupsConfig()),
        lambda: ring_frames(21, 6, 7, 1, 3),
    ):
        with pytest.raises(ValueError, match=r"^Head groups: .*must"):
            refused()
