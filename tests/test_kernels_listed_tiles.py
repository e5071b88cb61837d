"""The block-sparse attention kernel against dense attention in float64 that leaves the other keys out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.attention import block_sparse
from accel.attention.ann import AnnAttention, AnnConfig
from accel.attention.block_sparse import attend_tiles, kernel_supports
from accel.kernels import choose
from accel.kernels.choose import Usage
from accel.kernels.listed_tiles import BREAK_EVEN, pays, supports, traffic
from tests.attention_reference import lists, masked, seen, tensors
from tests.triton_interpreter import interpreted, needs_triton

ERRORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def check(q, k, v, tiles, tile, query_tile, bias=None, order=None):
    queries, keys = q.shape[1], k.shape[1]
    with interpreted() as launches:
        out = attend_tiles(q, k, v, tiles, tile, bias, order, query_tile, backend="triton")
    wanted = masked(q, k, v, seen(tiles, tile, queries, keys, order, query_tile), bias)
    assert out.dtype == q.dtype and launches.names == ["attend"]
    assert float((out.double() - wanted).norm() / wanted.norm()) < ERRORS[q.dtype]
    return launches.traffic


@needs_triton
@pytest.mark.parametrize("dtype", ERRORS)
def test_lists_of_every_head_and_query_tile_with_order_and_bias(dtype):
    q, k, v = tensors(50, 90, 2, 16, 2, dtype=dtype)
    tiles, order = lists((2, 2, 3), 6, 3), lists((2, 2), 90, 90, 1)
    counts = torch.randint(1, 17, (2, 90), generator=torch.Generator().manual_seed(0))
    check(q, k, v, tiles, 16, 24, counts.float().log(), order)


@needs_triton
@settings(max_examples=8, deadline=None)
@given(
    queries=st.integers(1, 40), tile=st.sampled_from([1, 7, 16, 70]), query_tile=st.sampled_from([3, 16, 80]),
    width=st.sampled_from([5, 16, 24]), shared=st.booleans(), ordered=st.booleans(),
    biased=st.sampled_from(["none", "keys", "heads"]), seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
def test_any_sizes(queries, tile, query_tile, width, shared, ordered, biased, seed, data):
    keys = data.draw(st.integers(2 * tile, 2 * tile + 30))
    q, k, v = tensors(queries, keys, 2, width, seed=seed, dtype=torch.float32)
    count, heads = -(-keys // tile), 1 if shared else 2
    tiles = lists((heads, -(-queries // query_tile)), count, data.draw(st.integers(1, int(BREAK_EVEN * count))), seed)
    order = lists((1, heads), keys, keys, seed) if ordered else None
    bias = {"none": None, "keys": torch.randn(keys), "heads": torch.randn(2, keys)}[biased]
    check(q, k, v, tiles, tile, query_tile, bias, order)


@needs_triton
def test_keys_that_a_bias_rules_out_do_not_count():
    q, k, v = tensors(8, 64, 1, 16, dtype=torch.float32)
    bias = torch.zeros(64)
    bias[:24] = -math.inf
    v[:, :24] = 1e30
    tiles = torch.tensor([[[0, 1]]])
    with interpreted():
        out = attend_tiles(q, k, v, tiles, 16, bias, None, 8, backend="triton")
    v[:, :24] = 0.0
    wanted = masked(q, k, v, seen(tiles, 16, 8, 64, None, 8), bias)
    assert float((out.double() - wanted).norm() / wanted.norm()) < 1e-6


@needs_triton
def test_views_of_a_store_are_read_in_place():
    q, _, _ = tensors(20, 1, 2, 16, dtype=torch.float32)
    store = torch.randn(2, 1, 100, 3, 32)
    k, v = (side[:, 10:74, 1:, 8:24] for side in store)
    check(q, k, v, lists((2, 1), 4, 2), 16, 20, torch.randn(64))


@needs_triton
def test_where_every_key_is_listed_by_some_tile_all_is_read_once():
    q, k, v = tensors(64, 64, 2, 16, dtype=torch.float16)
    tiles = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])[None].expand(2, -1, -1).contiguous()
    order, bias = lists((1, 2), 64, 64), torch.randn(2, 64)
    given_ = (q, k, v, tiles[None], (16, 16), bias, order)
    assert check(q, k, v, tiles, 16, 16, bias, order) == traffic(*given_)


@needs_triton
def test_ann_attention_is_the_same_with_it(monkeypatch):
    config = AnnConfig(density=0.3, tile=16, query_tile=16, shortest=1)
    q, k, v = tensors(32, 400, 2, 16, dtype=torch.float32)
    given_ = (0, q, k, v, torch.rand(400), [(0, 16), (368, 400)], True)
    wanted, usage = AnnAttention(config, 16)(*given_), Usage()
    with interpreted(), monkeypatch.context() as patch:
        patch.setattr(choose, "available", lambda device: (True, ""))
        found = AnnAttention(config, 16)(*given_)
    torch.testing.assert_close(found, wanted)
    assert usage.line() == "block-sparse attention Triton"


def test_a_full_size_call_reads_what_the_store_has_once():
    """A block of 3 latent frames at a history of 60, a quarter listed, on Wan 1.3B at 480p in bfloat16, by shape."""
    q, k = (torch.empty((1, frames * 1560, 12, 128), dtype=torch.bfloat16, device="meta") for frames in (3, 63))
    keys, rows = 63 * 1560, -(-3 * 1560 // 256)
    count = -(-keys // 64)
    tiles = torch.empty((1, 12, rows, count // 4), dtype=torch.int64, device="meta")
    order, bias = (torch.empty((1, 12, keys), dtype=kind, device="meta") for kind in (torch.int64, torch.float32))
    moved = traffic(q, k, k, tiles, (256, 64), bias[0], order)
    lookups = tiles.nbytes + order.nbytes + bias.nbytes
    assert moved == (1, q.nbytes + 2 * k.nbytes + lookups, q.nbytes) and lookups < 0.03 * moved.read


def test_it_is_taken_where_flex_attention_is_not_or_would_copy_and_where_it_pays(monkeypatch):
    q, k, v = tensors(64, 256, 2, 16, dtype=torch.float32)
    few, many, order = lists((1, 2, 1), 4, 2), lists((1, 2, 1), 4, 3), lists((1, 2), 256, 256)
    given_ = (q, k, v, few, (64, 64), None)
    assert kernel_supports(*given_, None) == (True, "")
    monkeypatch.setattr(block_sparse, "supports", lambda *told: (True, ""))
    assert kernel_supports(*given_, None) == (False, "FlexAttention reads keys in place")
    assert kernel_supports(*given_, order) == (True, "")
    assert pays(many, 64, 256) == kernel_supports(q, k, v, many, *given_[4:], order)
    assert pays(many, 64, 256) == (False, "density 0.75 is above 0.65")


def test_what_the_kernel_does_not_take_has_a_reason():
    q, k, v = tensors(8, 64, 1, 16, dtype=torch.float32)
    tiles = torch.tensor([[[[0, 2]]]])
    assert supports(q, k, v, tiles, (8, 16), None, None) == (True, "")
    for refused, reason in (
        ((q.double(), k.double(), v.double()), "no kernel for torch.float64"),
        ((q, k, v[..., :8]), "16 and 8 channels"),
        (tensors(8, 64, 1, 256, dtype=torch.float16), "256 and 256 channels in torch.float16"),
        ((q, k.transpose(1, 3).contiguous().transpose(1, 3), v), "side by side"),
        ((q, k[:, :0], v[:, :0]), "no keys"),
    ):
        ok, why = supports(*refused, tiles, (8, 16), None, None)
        assert not ok and reason in why
