"""Dense attention with a bias per key: exact in both forms, on views of a store."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.attention.dense import attend, masked_attend, ratio_attend
from accel.kv.store import KVStore
from tests import attention_reference


def tensors(queries=9, keys=21, heads=2, width=8, batch=2, **options):
    return attention_reference.tensors(queries, keys, heads, width, batch, **options)


def reference(q, k, v, bias):
    return attention_reference.masked(q, k, v, torch.ones((), dtype=torch.bool), bias)


def error(one, other) -> float:
    return float((one.double() - other).norm() / other.norm())


@pytest.mark.parametrize("form", [attend, masked_attend, ratio_attend])
@pytest.mark.parametrize("per_head", [False, True], ids=["bias per key", "bias per head and key"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_a_bias_is_added_to_the_logits(form, per_head, dtype, tolerance):
    q, k, v = tensors(dtype=dtype)
    counts = torch.randint(1, 506, (2, 21) if per_head else (21,), generator=torch.Generator().manual_seed(1))
    out = form(q, k, v, counts.double().log())
    assert out.dtype == dtype and out.shape == q.shape
    assert error(out, reference(q, k, v, counts.double().log())) < tolerance


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_key_with_ln_n_stands_for_n_identical_keys(counts, seed):
    q, k, v = tensors(keys=len(counts), seed=seed)
    repeats = torch.tensor(counts)
    whole = attend(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))
    for form in (masked_attend, ratio_attend):
        assert torch.allclose(form(q, k, v, repeats.double().log()), whole, atol=1e-12)


@pytest.mark.parametrize("form", [masked_attend, ratio_attend])
def test_a_key_with_a_bias_of_minus_infinity_is_not_there(form):
    q, k, v = tensors()
    bias = torch.zeros(21, dtype=torch.float64)
    bias[5:] = float("-inf")
    assert torch.allclose(form(q, k, v, bias), attend(q, k[:, :5], v[:, :5]), atol=1e-12)


def test_in_bfloat16_the_mask_on_a_cpu_is_closer_than_the_ratio():
    q, k, v = tensors(queries=64, keys=256, width=32, dtype=torch.bfloat16)
    counts = torch.randint(1, 17, (256,), generator=torch.Generator().manual_seed(1)).double()
    counts[-1] = 505
    wanted = reference(q, k, v, counts.log())
    assert error(attend(q, k, v, counts.log().float()), wanted) < error(ratio_attend(q, k, v, counts.log()), wanted)


def test_views_of_a_store_are_read_in_place():
    store = KVStore(1, 40)
    q, k, v = tensors(keys=21)
    keys, values = store.append(0, k, v)
    assert not keys.is_contiguous()
    bias = torch.linspace(0, 2, 21, dtype=torch.float64)
    for form in (attend, ratio_attend):
        assert torch.equal(form(q, keys, values, bias), form(q, k, v, bias))
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    assert torch.allclose(attend(q, *heads_first, bias), attend(q, k, v, bias), atol=1e-14)


def test_without_a_bias_it_is_the_host_s_attention_bit_for_bit():
    q, k, v = tensors(dtype=torch.float32)
    plain = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert torch.equal(attend(q, k, v), plain.transpose(1, 2))


def test_a_bias_of_another_shape_is_refused_in_a_sentence():
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"bias has shape \(20,\); use \[21\]"):
        attend(q, k, v, torch.zeros(20))
    with pytest.raises(ValueError, match="use masked_attend"):
        ratio_attend(q, k, v[..., :4], torch.zeros(21))
