"""Importance-redundancy: the reference's selections, no matrix of queries by tokens, and what a middle must keep to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from accel.kv.importance_redundancy import (
    WEIGHTINGS,
    ImportanceRedundancy,
    ImportanceRedundancyConfig,
    column_mass,
    redundancy,
    row_logsumexp,
    select,
)
from accel.kv.tokens import Tokens

Q, K, V = (0.41, 1.1, 0.83, 0.017), (0.67, 0.5, 1.9, 0.029), (0.13, 0.7, 0.31, 0.011)


def waves(tokens, heads, dim, factors):
    """The golden files' inputs: ``sin(a i + b h + c j + e i j)``, ``[heads, tokens, dim]`` in float64."""
    a, b, c, e = factors
    i = torch.arange(tokens, dtype=torch.float64)[:, None]
    h = torch.arange(heads, dtype=torch.float64)[:, None, None]
    j = torch.arange(dim, dtype=torch.float64)
    return torch.sin(a * i + b * h + c * j + e * i * j)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_mass(q, k):
    """The definition, with the matrix."""
    group = q.shape[-3] // k.shape[-3]
    logits = q.double() @ k.double().repeat_interleave(group, -3).mT / q.shape[-1] ** 0.5
    return logits.unflatten(-3, (-1, group)).amax(-3).softmax(-1).mean(-2)


def dense_redundancy(k):
    unit = F.normalize(k.double(), dim=-1)
    cosines = unit @ unit.mT
    return (cosines - torch.diag_embed(cosines.diagonal(dim1=-2, dim2=-1))).mean(-1).softmax(-1)


def frames_of(count, heads=2, dim=8, tokens=4, seed=0, batch=1):
    """``count`` latent frames as a ``Tokens``."""
    n = count * tokens
    return Tokens(
        random(batch, n, heads, dim, seed=seed), random(batch, n, heads, dim, seed=seed + 1),
        torch.arange(count).repeat_interleave(tokens), random(batch, n, heads, 2, seed=seed + 2),
    )  # fmt: skip


@pytest.mark.parametrize("index", range(3))
def test_it_keeps_the_tokens_the_reference_keeps(golden, index):
    case = golden("kv_compression")["token"][index]
    q = waves(case["q"], case["heads"], case["dim"], Q)
    k, v = (waves(case["kv"], case["heads"], case["dim"], factors) for factors in (K, V))
    torch.testing.assert_close(column_mass(q, k), torch.tensor(case["importance"]).double(), atol=5e-9, rtol=0)
    torch.testing.assert_close(redundancy(k), torch.tensor(case["redundancy"]).double(), atol=5e-9, rtol=0)
    for dtype in (torch.float64, torch.float32):
        kept = select(q.to(dtype), k.to(dtype), case["budget"], case["mix_lambda"], case["kernel"])
        assert kept.tolist() == case["kept"]
    places = kept[..., None].expand(-1, -1, case["dim"])
    assert k.gather(1, places).sum().item() == pytest.approx(case["k_sum"], abs=1e-9)
    assert v.gather(1, places).sum().item() == pytest.approx(case["v_sum"], abs=1e-9)


def test_it_keeps_the_frames_the_reference_keeps(golden):
    (case,) = golden("kv_compression")["frame"]
    q, k = waves(6, 2, 8, Q), waves(24, 2, 8, K)
    kept = select(q, k, case["budget"], case["mix_lambda"], unit="frame", unit_size=case["frame_size"])
    assert kept.tolist() == case["kept"]


@pytest.mark.parametrize("index", range(5))
def test_it_keeps_what_the_reference_keeps_on_magi(golden, index):
    case = golden("kv_compression")["magi"][index]
    queries = waves(12, 2, 8, Q)
    q = torch.cat([queries, queries.flip(1)])
    q = q[:, -4:] if case["query_granularity"] == "frame" else q
    size = 12 if case["strategy"] == "chunk" else None
    kept = select(
        q, waves(36, 2, 8, K), case["budget"], unit=case["strategy"], unit_size=size, weighting=case["weighting"]
    )
    assert kept.tolist() == case["kept"]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(1, 30), st.integers(1, 400))
def test_tiles_change_nothing(kv_heads, group, queries, tokens, tile):
    q, k = random(2, kv_heads * group, queries, 4, seed=tokens), random(2, kv_heads, tokens, 4, seed=queries)
    torch.testing.assert_close(column_mass(q, k, tile), dense_mass(q, k).float())
    whole = (q[:, ::group] @ k.mT / 2).logsumexp(-1)
    torch.testing.assert_close(row_logsumexp(q[:, ::group], k, tile), whole)
    torch.testing.assert_close(redundancy(k), dense_redundancy(k).float() if tokens > 1 else torch.zeros(k.shape[:-1]))


def test_more_queries_than_a_tile_has_rows_change_nothing():
    q, k = random(1, 2500, 4), random(1, 9, 4, seed=1)
    torch.testing.assert_close(column_mass(q, k), dense_mass(q, k).float())


def test_no_tensor_is_larger_than_a_tile_or_the_inputs():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    q, k = random(4, 256, 4), random(4, 512, 4)
    with Largest() as seen:
        column_mass(q, k, tile=8192)
        redundancy(k)
    assert seen.elements == max(8192, k.numel()) < 4 * 256 * 512 / 50


@given(st.integers(1, 12), st.integers(0, 15), st.sampled_from([None, *WEIGHTINGS]), st.floats(0, 1), st.integers(0, 9))
def test_indices_are_distinct_and_a_larger_budget_only_adds(tokens, budget, weighting, mix, seed):
    q, k = random(2, 3, 4, seed=seed), random(2, tokens, 4, seed=seed + 1)
    every = select(q, k, tokens, mix, weighting=weighting)
    assert every.sort(-1).values.tolist() == [list(range(tokens))] * 2
    assert torch.equal(select(q, k, budget, mix, weighting=weighting), every[:, : min(budget, tokens)])


def test_mix_one_is_importance_alone_and_mix_zero_redundancy_alone():
    q, k = random(2, 5, 8, seed=1), random(2, 12, 8, seed=2)
    assert torch.equal(select(q, k, 12, 1.0, 1), column_mass(q, k).argsort(-1, descending=True))
    assert torch.equal(select(q, k, 12, 0.0), redundancy(k).argsort(-1))


def test_a_key_that_is_there_twice_goes_first_among_orthogonal_ones():
    k = torch.eye(8)[None, [0, 1, 2, 3, 2, 4]]
    order = select(torch.zeros(1, 1, 8), k, 6, kernel=1).tolist()
    assert order == [[0, 1, 3, 5, 2, 4]], "equal scores oldest first, the two copies last"


def test_equal_scores_go_oldest_first():
    k = torch.eye(2).repeat(1, 1000, 1)
    assert select(torch.zeros(1, 1, 2), k, 2000).tolist() == [list(range(2000))]


def test_bfloat16_keys_are_scored_in_float32():
    q, k = random(2, 6, 8).bfloat16(), random(2, 40, 8, seed=1).bfloat16()
    assert column_mass(q, k).dtype == redundancy(k).dtype == torch.float32
    assert torch.equal(select(q, k, 20), select(q.float(), k.float(), 20))


def test_a_batch_is_averaged_and_every_clip_keeps_the_same():
    q, k = random(3, 2, 5, 8, dtype=torch.float64), random(3, 2, 12, 8, seed=1, dtype=torch.float64)
    assert torch.equal(select(q[:1], k[:1], 6), select(q[0], k[0], 6))
    assert torch.equal(select(q, k, 6), select(q.flip(0), k.flip(0), 6))
    assert not torch.equal(select(q, k, 6), select(q[0], k[0], 6))
    importance, cosine = dense_mass(q, k).mean(0), dense_redundancy(k).mean(0)
    assert torch.equal(select(q, k, 6, 0.4, 1), (0.4 * importance - 0.6 * cosine).topk(6).indices)


def test_the_middle_holds_each_heads_choice_with_its_frames_in_order_of_time():
    gone, queries = frames_of(3), random(1, 5, 2, 8, seed=7)
    before = [tensor.clone() for tensor in (gone.keys, gone.values, gone.frames, gone.plain)]
    out = ImportanceRedundancy(ImportanceRedundancyConfig()).absorb(0, None, gone, queries, 7)
    chosen = select(queries[0].transpose(0, 1), gone.keys[0].transpose(0, 1), 7).sort(-1).values
    assert len(out) == 7 and out.frames.shape == (7, 2)
    for head in range(2):
        for kept, given_ in ((out.keys, gone.keys), (out.values, gone.values), (out.plain, gone.plain)):
            assert torch.equal(kept[:, :, head], given_[:, chosen[head], head])
        assert torch.equal(out.frames[:, head], gone.frames[chosen[head]])
    assert chosen[0].tolist() != chosen[1].tolist()
    assert all(map(torch.equal, before, (gone.keys, gone.values, gone.frames, gone.plain)))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 30), st.sampled_from(["token", "frame"]))
def test_the_middle_never_outgrows_its_capacity_and_stays_in_order(arrivals, capacity, unit):
    rule = ImportanceRedundancy(ImportanceRedundancyConfig(unit=unit), frame_tokens=4)
    kept, offset = None, 0
    for turn, count in enumerate(arrivals):
        gone = frames_of(count, seed=turn)
        gone = Tokens(gone.keys, gone.values, gone.frames + offset, gone.plain)
        offset += count
        if unit == "frame" and 0 < capacity < 4:
            with pytest.raises(ValueError, match="no latent frame"):
                rule.absorb(0, kept, gone, random(1, 3, 2, 8), capacity)
            return
        before = 0 if kept is None else len(kept)
        kept = rule.absorb(0, kept, gone, random(1, 3, 2, 8, seed=turn), capacity)
        assert len(kept) == min(before + len(gone), capacity if unit == "token" else capacity // 4 * 4)
        assert (kept.frames.diff(dim=0) >= 0).all()
        if unit == "frame" and len(kept):
            assert (kept.frames.reshape(len(kept) // 4, 4, -1).diff(dim=1) == 0).all(), "whole frames"


def test_what_fits_is_kept_as_it_is():
    gone = frames_of(2)
    out = ImportanceRedundancy(ImportanceRedundancyConfig()).absorb(0, None, gone, random(1, 3, 2, 8), 8)
    assert torch.equal(out.keys, gone.keys) and torch.equal(out.frames, gone.frames)


@pytest.mark.parametrize(
    "options",
    [{"mix": 1.5}, {"mix": float("nan")}, {"kernel": 4}, {"kernel": True}, {"unit": "pixel"}, {"weighting": "linear"}],
)
def test_bad_settings_are_refused_in_a_sentence(options):
    with pytest.raises(ValueError, match=r"^Importance-redundancy: .*use"):
        ImportanceRedundancyConfig(**options)
    with pytest.raises(ValueError, match=r"^Importance-redundancy: "):
        select(torch.zeros(1, 1, 4), torch.zeros(1, 4, 4), 2, **options)


def test_what_does_not_fit_is_refused_in_a_sentence():
    q, k = random(3, 4, 8), random(2, 12, 8)
    for refused in (
        lambda: select(q, k, 4),
        lambda: select(q[:2], k, 4, unit="frame", unit_size=5),
        lambda: select(q[:2], k, 4, unit="frame"),
        lambda: ImportanceRedundancy(ImportanceRedundancyConfig(unit="frame")),
        lambda: ImportanceRedundancy(ImportanceRedundancyConfig()).absorb(
            0, None, Tokens(k[None], k[None], torch.zeros(2), counts=torch.ones(2)), q[None], 1
        ),
    ):
        with pytest.raises(ValueError, match=r"^Importance-redundancy: "):
            refused()
