"""Prompt attention: collapsing padding is exact, pruning keeps what the queries look at."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.attention import prompt as module
from accel.attention.dense import attend
from accel.attention.prompt import PromptAttention, PromptConfig, collapse, prune, token_scores
from tests.attention_reference import tensors


def padded(texts, length, heads=2, width=8, queries=12, seed=0):
    """Queries, keys and values ``[B, n, heads, width]`` of prompts of these text lengths, padded with one same row."""
    q, k, v = tensors(queries, length, heads, width, batch=len(texts), seed=seed)
    for entry, text in enumerate(texts):
        k[entry, text:], v[entry, text:] = k[0, -1].clone(), v[0, -1].clone()
    return q, k, v


@given(texts=st.lists(st.integers(0, 20), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_collapsed_padding_is_the_same_attention(texts, seed):
    q, k, v = padded(texts, 20, seed=seed)
    prompt = PromptAttention(PromptConfig())
    prompt.put(0, k, v)
    assert torch.allclose(prompt(0, q), attend(q, k, v), atol=1e-12)
    padding = 20 - max(texts)
    assert prompt.keys_seen(0) == (20 if padding < 2 else max(texts) + 1)


def test_the_collapsed_prompt_is_a_view_with_ln_n_on_its_last_row():
    _, k, v = padded([5], 512)
    short = collapse(k, v)
    assert short.keys.shape[1] == 6 and short.text == 5 and short.padding == 507
    assert short.keys.data_ptr() == k.data_ptr() and short.values.data_ptr() == v.data_ptr()
    assert short.bias[:5].eq(0).all() and float(short.bias[5]) == pytest.approx(math.log(507))


def test_raw_rows_collapse_before_any_layer_projects_them():
    q, k, _ = padded([4, 7], 16)
    rows = k.flatten(2)
    short = collapse(rows)
    key, value = (torch.randn(16, 16, dtype=torch.float64) for _ in "kv")

    def heads(x):
        return x.unflatten(2, (2, 8))

    out = attend(q, heads(short.keys @ key), heads(short.keys @ value), short.bias)
    assert short.keys.shape == (2, 8, 16) and short.values is None
    assert float((out - attend(q, heads(rows @ key), heads(rows @ value))).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_differ_in_one_bit_are_left_alone(dtype):
    _, k, v = (x.to(dtype) for x in padded([5], 20))
    assert collapse(k, v).padding == 15
    bits = v.view(module.BITS[v.element_size()])
    bits[0, 18, 1, 3] ^= 1
    assert collapse(k, v).padding == 0 and collapse(k, v).bias is None and collapse(k, v).keys is k
    bits[0, 18, 1, 3] ^= 1
    bits[0, 9, 1, 3] ^= 1
    assert collapse(k, v).padding == 10, "only the run at the end"
    zeros = torch.zeros(1, 4, 8, dtype=dtype)
    zeros[0, 2] = -0.0
    assert collapse(zeros).padding == 0, "minus zero has other bits"


def test_without_collapse_the_prompt_stays_as_it_is():
    q, k, v = padded([5], 20)
    prompt = PromptAttention(PromptConfig(collapse=False))
    prompt.put(0, k, v)
    assert torch.equal(prompt(0, q), attend(q, k, v)) and prompt.keys_seen(0) == 20


def test_token_scores_are_the_largest_logits_over_heads_and_a_sample_of_queries():
    q, k, _ = tensors(600, 9, heads=2, batch=2)
    sampled = q[:, ::3]
    wanted = torch.einsum("bqhd,bkhd->bhqk", sampled, k).amax((1, 2)) / 8**0.5
    assert torch.allclose(token_scores(q, k).double(), wanted, atol=1e-5)
    q, k, _ = tensors(10, 9)
    wanted = torch.einsum("bqhd,bkhd->bhqk", q, k).amax((1, 2)) / 8**0.5
    assert torch.allclose(token_scores(q, k).double(), wanted, atol=1e-5), "few queries are all looked at"


@pytest.mark.parametrize("padding", [True, False], ids=["padded", "full"])
def test_pruning_keeps_the_first_token_the_wanted_ones_and_the_padding(padding):
    q, k, v = padded([10, 10], 30 if padding else 10)
    k[:, :10] *= 0.01
    k[0, 4, 1], k[0, 7, 0] = q[0, 3, 1] * 9, q[0, 5, 0] * 9
    k[1, 2, 0], k[1, 8, 1] = q[1, 0, 0] * 9, q[1, 7, 1] * 9
    short = prune(collapse(k, v), q, 0.3)
    last = [10] if padding else []
    for entry, wanted in enumerate(([0, 4, 7], [0, 2, 8])):
        assert torch.equal(short.keys[entry], k[entry, wanted + last])
        assert torch.equal(short.values[entry], v[entry, wanted + last])
    if padding:
        assert short.bias.tolist() == pytest.approx([0, 0, 0, math.log(20)])
    else:
        assert short.bias is None


@given(text=st.integers(1, 12), keep=st.floats(0.01, 0.99))
def test_the_fraction_kept_is_rounded_up(text, keep):
    q, k, v = padded([text], 20)
    prompt = PromptAttention(PromptConfig(keep=keep))
    prompt.put(0, k, v)
    prompt(0, q)
    assert prompt.keys_seen(0) == math.ceil(keep * text) + 1


def test_a_prompt_of_padding_alone_is_one_key():
    q, k, v = padded([0], 20)
    prompt = PromptAttention(PromptConfig(keep=0.5))
    prompt.put(0, k, v)
    assert torch.allclose(prompt(0, q), attend(q, k, v), atol=1e-12) and prompt.keys_seen(0) == 1


def test_tokens_are_picked_anew_for_a_block_and_for_a_prompt_only():
    q, k, v = padded([10], 20)
    other = -q
    prompt = PromptAttention(PromptConfig(keep=0.4))
    prompt.put(3, k, v)
    assert prompt.holds(3) and not prompt.holds(2) and not prompt.holds(3, branch=1)

    def over(picked):
        short = prune(collapse(k, v), picked, 0.4)
        return attend(other, short.keys, short.values, short.bias)

    prompt(3, q, fresh=True)
    assert torch.equal(prompt(3, other), over(q)) and not torch.equal(over(q), over(other))
    assert torch.equal(prompt(3, other, fresh=True), over(other))
    prompt.put(3, k.flip(3), v)
    assert not torch.equal(prompt(3, other), over(other))
    prompt.forget()
    assert not prompt.holds(3)


def test_what_cannot_be_served_is_refused_in_a_sentence():
    for keep in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"^Prompt attention: keep is {keep}; use "):
            PromptConfig(keep=keep)
    with pytest.raises(ValueError, match="turn collapse on or use keep 1"):
        PromptConfig(collapse=False, keep=0.5)
    q, k, v = padded([5], 20)
    prompt = PromptAttention(PromptConfig())
    with pytest.raises(ValueError, match="layer 0 has no prompt for branch 0; put one first"):
        prompt(0, q)
    prompt.put(0, k, v)
    with pytest.raises(ValueError, match="2 batch entries meet a prompt of 1; forget and put anew"):
        prompt(0, q.expand(2, -1, -1, -1))
