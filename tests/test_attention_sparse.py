"""Attention over listed key tiles: equal to dense attention that is told to leave the other keys out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.attention import block_sparse
from accel.attention.block_sparse import attend_tiles, supports
from accel.attention.dense import attend
from tests.attention_reference import lists, masked, seen, tensors


@given(
    queries=st.integers(1, 20),
    keys=st.integers(1, 40),
    tile=st.sampled_from([1, 4, 7, 8]),
    query_tile=st.sampled_from([None, 3, 12]),
    heads=st.sampled_from([1, 3]),
    batch=st.sampled_from([1, 2]),
    shared=st.booleans(),
    biased=st.sampled_from(["none", "keys", "heads"]),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_listed_tiles_equal_dense_attention_with_that_mask(
    queries, keys, tile, query_tile, heads, batch, shared, biased, seed, data
):
    q, k, v = tensors(queries, keys, heads, batch=batch, seed=seed)
    count = -(-keys // tile)
    shape = (1 if shared else heads, -(-queries // (query_tile or tile)))
    tiles = lists(shape, count, data.draw(st.integers(1, count)), seed)
    bias = {"none": None, "keys": torch.randn(keys), "heads": torch.randn(heads, keys)}[biased]
    out = attend_tiles(q, k, v, tiles, tile, bias, query_tile=query_tile)
    assert torch.allclose(out, masked(q, k, v, seen(tiles, tile, queries, keys, None, query_tile), bias), atol=1e-12)


@given(shared=st.booleans(), batched=st.booleans(), biased=st.booleans(), seed=st.integers(0, 999))
def test_an_order_says_which_keys_a_tile_holds(shared, batched, biased, seed):
    q, k, v = tensors(11, 29, heads=2, batch=2, seed=seed)
    shape = (2 if batched else 1, 1 if shared else 2)
    tiles, order = lists((*shape, 3), 8, 3, seed), lists(shape, 29, 29, seed)
    bias = torch.randn(2, 29) if biased else None
    out = attend_tiles(q, k, v, tiles, 4, bias, order)
    assert torch.allclose(out, masked(q, k, v, seen(tiles, 4, 11, 29, order), bias), atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_with_all_tiles_listed_it_is_dense_attention(dtype, tolerance):
    q, k, v = tensors(100, 200, width=16, dtype=dtype)
    tiles, bias = lists((2, 2), 4, 4), torch.randn(2, 200)
    out, wanted = attend_tiles(q, k, v, tiles, 64, bias), attend(q.double(), k.double(), v.double(), bias)
    assert out.dtype == dtype and float((out.double() - wanted).norm() / wanted.norm()) < tolerance


def test_scratch_is_bounded_and_changes_nothing(monkeypatch):
    q, k, v = tensors(33, 64)
    tiles = lists((2, 5), 8, 3)
    whole = attend_tiles(q, k, v, tiles, 8)
    sizes = []
    picked = block_sparse.picked_rows
    monkeypatch.setattr(block_sparse, "picked_rows", lambda *given: sizes.append(picked(*given)) or sizes[-1])
    for rows in (1, 2):
        one = 2 * 2 * 3 * 8 * 8 * 8
        monkeypatch.setattr(block_sparse, "SCRATCH", rows * one)
        sizes.clear()
        assert torch.allclose(attend_tiles(q, k, v, tiles, 8), whole, atol=1e-14)
        assert max(2 * size.nbytes for size in sizes) == rows * one


def test_either_memory_layout_is_read_through_a_view():
    tokens_first = torch.randn(6, 3, 4)
    heads_first = torch.randn(3, 6, 4).transpose(0, 1)
    for x in (tokens_first, heads_first, torch.randn(9, 3, 4)[:6]):
        table, token_step, head_step = block_sparse.row_table(x)
        assert table.data_ptr() == x.data_ptr()
        index = torch.tensor([[[4, 0]]])
        rows = block_sparse.picked_rows(table, token_step, head_step, index, 3)
        assert torch.equal(rows[0], x[[4, 0]].transpose(0, 1))


def test_what_cannot_be_served_is_refused_in_a_sentence():
    q, k, v = tensors(10, 20)
    with pytest.raises(ValueError, match=r"10 queries in tiles of 4 need \[2 or 1, 3, kept\]"):
        attend_tiles(q, k, v, lists((2, 2), 5, 1), 4)
    with pytest.raises(ValueError, match=r"order has shape \(1, 1, 19\); use"):
        attend_tiles(q, k, v, lists((2, 3), 5, 1), 4, order=torch.arange(19)[None, None])
    with pytest.raises(ValueError, match="backend is 'dense'; use one of auto, gather, flex"):
        attend_tiles(q, k, v, lists((2, 3), 5, 1), 4, backend="dense")


def test_where_flex_attention_is_not_taken_the_reason_is_told():
    ok, reason = supports("cpu", torch.float32)
    assert not ok and "13 s" in reason
    ok, reason = supports("mps", torch.float16)
    assert not ok and "mps" in reason


@pytest.mark.long
@pytest.mark.parametrize("keys, biased, ordered, query_tile", [(256, False, False, 64), (200, True, True, 128)])
def test_flex_attention_equals_the_gather_form(keys, biased, ordered, query_tile):
    for seed in range(2):
        q, k, v = tensors(150, keys, width=16, batch=2, seed=seed, dtype=torch.float32)
        tiles = lists((2, 2, -(-150 // query_tile)), 4, 2, seed)
        bias = torch.randn(2, keys) if biased else None
        order = lists((2, 2), keys, keys, seed) if ordered else None
        gathered = attend_tiles(q, k, v, tiles, 64, bias, order, query_tile, "gather")
        assert torch.allclose(attend_tiles(q, k, v, tiles, 64, bias, order, query_tile, "flex"), gathered, atol=1e-5)
