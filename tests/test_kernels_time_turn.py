"""Time channels are turned in place, in the dtype they are kept in, with each scalar read and written once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accel.kernels.time_turn import supports, traffic, turn_pairs
from accel.kv.rotary import TimeRotary
from tests.triton_interpreter import interpreted, needs_triton

ROUNDING = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def keys(batch: int, tokens: int, heads: int, width: int, dtype, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, heads, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(positions: int, heads: int, channels: int, seed: int = 1) -> Tensor:
    return 50 * torch.rand(positions, heads, channels // 2, generator=torch.Generator().manual_seed(seed))


def in_float64(x: Tensor, turned: Tensor) -> Tensor:
    turned = turned.double().repeat_interleave(x.shape[1] // len(turned), 0)
    rotated = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(turned), turned
    )
    return torch.view_as_real(rotated).flatten(-2)


def check(x: Tensor, turned: Tensor, out: Tensor) -> None:
    """Both forms give float64's result to one rounding of the dtype, and the kernel moves what ``traffic`` says."""
    expected, cos, sin = in_float64(x, turned), turned.double().cos().float(), turned.double().sin().float()
    moved = traffic(x, cos, sin, out)
    plain = turn_pairs(x, cos, sin, torch.empty_like(out), backend="torch").double()
    with interpreted() as launches:
        assert turn_pairs(x, cos, sin, out, backend="triton") is out
    assert launches.traffic == moved
    bound = ROUNDING[out.dtype] * x.double().abs().max() * 2
    assert (plain - expected).abs().max() <= bound
    assert (out.double() - expected).abs().max() <= bound


@needs_triton
@pytest.mark.parametrize("dtype", ROUNDING)
def test_pinned_keys_go_from_their_unturned_channels_into_the_store(dtype) -> None:
    """Channels of a head of 128 at their places in the store; the others stay."""
    store, plain = keys(2, 90, 3, 128, dtype), keys(2, 60, 3, 44, dtype, 1)
    before = store.clone()
    check(plain[:, :45], angles(3, 1, 44), store[:, :45, :, :44])
    assert torch.equal(store[..., 44:], before[..., 44:]) and torch.equal(store[:, 45:], before[:, 45:])


@needs_triton
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_store_turns_its_own_keys_in_place(dtype) -> None:
    store = keys(1, 70, 2, 32, dtype)
    copy = store.clone()
    cos, sin = (f(angles(1, 1, 12)) for f in (torch.cos, torch.sin))
    expected = turn_pairs(copy[..., :12].clone(), cos, sin, torch.empty(1, 70, 2, 12, dtype=dtype), backend="torch")
    turn_pairs(copy[..., :12], cos, sin, copy[..., :12], backend="torch")
    assert torch.equal(copy[..., :12], expected)
    check(store[..., :12], angles(1, 1, 12), store[..., :12])


@needs_triton
@settings(max_examples=10)
@given(
    batch=st.integers(1, 2),
    positions=st.integers(1, 4),
    each=st.integers(1, 5),
    heads=st.integers(1, 3),
    pairs=st.integers(1, 9),
    per_head=st.booleans(),
    dtype=st.sampled_from(tuple(ROUNDING)),
)
def test_any_sizes_with_angles_of_their_own_for_heads(batch, positions, each, heads, pairs, per_head, dtype) -> None:
    x = keys(batch, positions * each, heads, 2 * pairs, dtype)
    check(x, angles(positions, heads if per_head else 1, 2 * pairs), torch.empty_like(x))


def test_a_few_positions_turn_as_one_for_every_token() -> None:
    rotary, x = TimeRotary.of_wan(128), keys(1, 60, 4, 44, torch.bfloat16)
    few = torch.tensor([3, -7, 250])
    assert torch.equal(rotary.turn(x, few), rotary.turn(x, few.repeat_interleave(20)))


def test_the_sink_of_a_full_size_store_moves_twice_its_time_channels() -> None:
    """A pinned latent frame of Wan 1.3B at 480p in bfloat16, one layer: 1560 tokens of 12 heads, 44 time channels."""
    plain = torch.empty(1, 1560, 12, 44, dtype=torch.bfloat16, device="meta")
    store = torch.empty(1, 21 * 1560, 12, 128, dtype=torch.bfloat16, device="meta")
    cos = torch.empty(1, 1, 22, device="meta")
    moved = traffic(plain, cos, cos, store[:, :1560, :, :44])
    assert moved == (1, 1560 * 12 * 44 * 2 + 2 * 22 * 4, 1560 * 12 * 44 * 2)


def test_what_the_kernel_does_not_take_has_a_reason() -> None:
    x, cos = keys(1, 4, 1, 4, torch.float32), torch.ones(4, 1, 2)
    assert supports(x, cos, cos, x) == (True, "")
    assert supports(x.double(), cos, cos, x) == (False, "no kernel from torch.float64 to torch.float32")
    assert supports(x.transpose(1, 3), cos, cos, x)[0] is False
