"""The column mass kernels against float64, and what they move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.kernels import choose
from accel.kernels.choose import Usage
from accel.kernels.column_mass import supports, traffic
from accel.kv.head_groups import head_masses
from accel.kv.importance_redundancy import mass_kernel, row_kernel, select, tiled_logsumexp, tiled_mass
from tests.triton_interpreter import interpreted, needs_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sides(queries, keys, q_heads=1, kv_heads=1, dim=16, batch=1, dtype=torch.float32, seed=0):
    """Queries and keys ``[B, heads, n, dim]`` as views of ``[B, n, heads, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, queries, q_heads, dim), (batch, keys, kv_heads, dim)
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def check(q, k):
    """Both kernels give what float64 gives; what the launches of the column mass moved."""
    with interpreted() as launches:
        mass = mass_kernel(q, k, 0, backend="triton")
    assert launches.names == ["row_totals", "column_sums"]
    wanted = tiled_mass(q.double(), k.double(), 1 << 20)
    assert mass.dtype == torch.float32 and mass.shape == wanted.shape
    torch.testing.assert_close(mass.double(), wanted, rtol=5e-6, atol=1e-9)
    with interpreted():
        totals = row_kernel(q, k, 0, backend="triton")
    torch.testing.assert_close(totals.double(), tiled_logsumexp(q.double(), k.double(), 1 << 20), rtol=1e-6, atol=5e-6)
    return launches.traffic


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_and_normalisers_are_those_of_float64(dtype):
    q, k = sides(70, 130, 4, 2, 12, 2, dtype)
    assert check(q, k) == traffic(q, k)


@needs_triton
@settings(max_examples=6, deadline=None)
@given(
    queries=st.integers(1, 90), keys=st.integers(1, 90), group=st.integers(1, 3), dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(queries, keys, group, dim, dtype, seed):
    q, k = sides(queries, keys, group, 1, dim, 1, dtype, seed)
    assert check(q, k) == traffic(q, k)


@needs_triton
def test_one_query_and_one_key_share_everything_and_three_axes_are_enough():
    q, k = (side[0] for side in sides(1, 1))
    check(q, k)


@needs_triton
def test_logits_that_overflow_float16_do_not_matter():
    q, k = sides(5, 70, dtype=torch.float16)
    check(q * 60, k * 60)


@needs_triton
def test_tokens_and_head_groups_are_chosen_the_same_with_them(monkeypatch):
    q, k = sides(40, 90, 4, 2, 16)
    kept, masses = select(q, k, 30), head_masses(q[:, :2], k, 10, 20)
    usage = Usage()
    with interpreted() as launches, monkeypatch.context() as patch:
        patch.setattr(choose, "available", lambda device: (True, ""))
        assert torch.equal(select(q, k, 30), kept)
        torch.testing.assert_close(head_masses(q[:, :2], k, 10, 20), masses)
    assert launches.names == ["row_totals", "column_sums"] + ["row_totals"] * 3
    assert usage.line() == "column mass, row log-sum-exp Triton"


@needs_triton
def test_on_a_cpu_nothing_changes():
    q, k = sides(40, 90)
    usage = Usage()
    assert torch.equal(mass_kernel(q, k, 500), tiled_mass(q, k, 500))
    assert usage.line() == "column mass torch (no CUDA device)"


def test_a_full_size_block_moves_no_matrix():
    """A block of 3 latent frames against 21 on Wan 1.3B at 480p in bfloat16, one layer, by shape."""
    q, k = (torch.empty((1, frames * 1560, 12, 128), dtype=torch.bfloat16, device="meta") for frames in (3, 21))
    moved, matrix = traffic(q.transpose(1, 2), k.transpose(1, 2)), 4 * 12 * (3 * 1560) * (21 * 1560)
    totals, mass = 4 * 12 * 3 * 1560, 4 * 12 * 21 * 1560
    assert moved == (2, 2 * (q.nbytes + k.nbytes) + totals, totals + mass)
    assert matrix > 31 * (moved.read + moved.written), "the matrix alone, written once"
    assert totals < matrix / 30_000, "kept between the launches"


def test_what_the_kernels_do_not_take_has_a_reason():
    q, k = sides(8, 9)
    assert supports(q, k) == (True, "")
    for refused, reason in (
        ((q.double(), k.double()), "no kernel for torch.float64"),
        ((q.half(), k), "torch.float16 and torch.float32"),
        ((q, k[:, :, :0]), "no keys"),
        (sides(8, 9, dim=128), "128 channels in torch.float32"),
        (sides(8, 9, dim=256, dtype=torch.float16), "256 channels in torch.float16"),
        ((q.mT.contiguous().mT, k), "side by side"),
    ):
        ok, why = supports(*refused)
        assert not ok and reason in why
