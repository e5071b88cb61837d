"""ANN attention: exactly dense over the keys it selects, those selected well, and dense where it cannot pay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.attention import selection
from accel.attention.ann import AnnAttention, AnnConfig, shortest_history
from accel.attention.dense import attend
from accel.attention.selection import hash_ranks, merged, tile_means
from accel.flops import attention_flops
from tests.attention_reference import lists, masked, seen, tensors

SMALL = AnnConfig(density=0.3, bits=6, tile=16, query_tile=16, shortest=0)
FRAME = 10


def selected(ann, layer, queries, keys):
    """Which keys each query of a layer reads, bool ``[B, groups, queries, keys]``."""
    kept = ann._kept[layer][1]
    in_order = seen(kept.tiles, ann.config.tile, queries, keys, kept.key_order.long(), ann.config.query_tile)
    back = kept.query_order.argsort(-1)
    return in_order.gather(2, back[..., None].expand(-1, -1, -1, keys))


def error(one, other) -> float:
    return float((one - other).norm() / other.norm())


@given(
    keys=st.integers(60, 150),
    queries=st.integers(1, 40),
    heads=st.sampled_from([1, 2]),
    batch=st.sampled_from([1, 2]),
    groups=st.sampled_from(["head", "all"]),
    query_tile=st.sampled_from([16, 24]),
    biased=st.booleans(),
    sink=st.integers(0, 20),
    seed=st.integers(0, 999),
)
def test_it_is_dense_attention_over_the_selected_keys(
    keys, queries, heads, batch, groups, query_tile, biased, sink, seed
):
    q, k, v = tensors(queries, keys, heads, batch=batch, seed=seed)
    bias = torch.randn(heads, keys, generator=torch.Generator().manual_seed(seed)) if biased else None
    ann = AnnAttention(replace(SMALL, groups=groups, query_tile=query_tile), FRAME)
    always = [(0, sink), (keys - queries, keys)]
    out = ann(0, q, k, v, bias, always, fresh=True)
    assert ann.counts.sparse == (ann.keys_seen(queries, keys, always) < keys)
    if ann.counts.sparse:
        allowed = selected(ann, 0, queries, keys)
        assert allowed[..., :sink].all() and allowed[..., keys - queries :].all()
        assert int(allowed.sum(-1).max()) <= ann.keys_seen(queries, keys, always) < keys
        assert torch.allclose(out, masked(q, k, v, allowed, bias), atol=1e-12)
    else:
        assert torch.equal(out, attend(q, k, v, bias))


@pytest.mark.parametrize("config", [replace(SMALL, density=1.0), replace(SMALL, shortest=20), AnnConfig()])
@pytest.mark.parametrize("biased", [False, True])
def test_density_one_and_a_short_history_are_dense_bit_for_bit(config, biased):
    q, k, v = tensors(30, 200, dtype=torch.float32)
    bias = torch.randn(200) if biased else None
    ann = AnnAttention(config, FRAME)
    always = [(0, 10), (160, 200)]
    assert torch.equal(ann(0, q, k, v, bias, always, fresh=True), attend(q, k, v, bias))
    assert ann.counts.flops == ann.counts.dense_flops == attention_flops(30, 200, 16)
    assert ann.keys_seen(30, 200, always) == 200 and ann.nbytes == 0
    assert ann.note().startswith("ANN attention is off")


def clustered(frames=8, frame=256, clusters=100, shown=8, width=32, heads=2, seed=0):
    """Keys of every frame scattered around common centres (with a common offset), queries around a few of these: a
    block shows a part of what the video has shown, and finds it in every frame at other places."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(clusters, heads, width, generator=generator, dtype=torch.float64)

    def near(tokens, among):
        of = torch.randint(among, (tokens,), generator=generator)
        noise = torch.randn(tokens, heads, width, generator=generator, dtype=torch.float64)
        return (centres[of] + 0.3 * noise)[None]

    keys, queries = near(frames * frame, clusters), near(2 * frame, shown)
    values = torch.randn(keys.shape, generator=generator, dtype=torch.float64)
    return queries, keys + 3.0 * torch.randn(heads, width, generator=generator, dtype=torch.float64), values


@pytest.mark.parametrize("groups", ["head", "all"])
@pytest.mark.parametrize("seed", range(4))
def test_on_clustered_keys_it_errs_far_less_than_a_random_selection(groups, seed):
    q, k, v = clustered(seed=seed)
    always = [(0, 256), (2048 - 512, 2048)]
    ann = AnnAttention(AnnConfig(density=0.33, tile=16, query_tile=16, shortest=0, groups=groups), 256)
    dense = attend(q, k, v)
    ours = error(ann(0, q, k, v, None, always, fresh=True), dense)
    kept = ann._kept[0][1]
    shared = 768 // 16
    picked = kept.tiles.shape[3] - shared
    assert picked == 27, "0.33 of 80 tiles"
    chance = lists(kept.tiles.shape[:3], 80, picked, seed) + shared
    tiles = torch.cat([kept.tiles[..., :shared], chance], -1)
    ann._kept[0] = (ann._kept[0][0], replace(kept, tiles=tiles))
    random = error(ann(0, q, k, v, None, always, fresh=False), dense)
    assert 2 * ours < random, (ours, random)


def test_a_selection_is_renewed_with_a_block_and_reused_in_its_other_calls():
    ann = AnnAttention(SMALL, FRAME)
    q, k, v = tensors(20, 120)
    always = [(100, 120)]
    ann(0, q, k, v, None, always, fresh=True)
    first = ann._kept[0][1]
    other = torch.randn_like(q)
    out = ann(0, other, k, v, None, always, fresh=False)
    assert ann._kept[0][1] is first and ann.counts.selections == 1
    assert torch.allclose(out, masked(other, k, v, selected(ann, 0, 20, 120)), atol=1e-12)
    ann(1, q, k, v, None, always, fresh=False)
    assert ann.counts.selections == 2, "another layer has one of its own"
    ann(0, q, k, v, None, always, fresh=True)
    assert ann.counts.selections == 3
    ann(0, q, k[:, 20:], v[:, 20:], None, [(80, 100)], fresh=False)
    ann(0, q, k[:, 20:], v[:, 20:], None, [(60, 100)], fresh=False)
    assert ann.counts.selections == 5, "shapes and what every query sees must agree"
    ann.forget()
    assert ann.nbytes == 0


def test_batch_entries_do_not_see_each_other():
    q, k, v = tensors(20, 150, batch=2)
    both = AnnAttention(SMALL, FRAME)(0, q, k, v, None, [(130, 150)], fresh=True)
    for entry in (0, 1):
        one = slice(entry, entry + 1)
        alone = AnnAttention(SMALL, FRAME)(0, q[one], k[one], v[one], None, [(130, 150)], fresh=True)
        assert torch.allclose(both[one], alone, atol=1e-12)


def test_the_projections_are_the_run_s_own_and_leave_global_randomness_alone():
    q, k, v = tensors(20, 150)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    outs = [AnnAttention(SMALL, FRAME, seed=seed)(3, q, k, v, None, [], fresh=True) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_flops_are_those_of_the_keys_read_and_of_the_selections():
    ann = AnnAttention(SMALL, FRAME)
    q, k, v = tensors(32, 160, heads=2, width=8, batch=2)
    always = [(128, 160)]
    for fresh in (True, False, False):
        ann(0, q, k, v, None, always, fresh)
    kept = 2 + 3
    assert ann.keys_seen(32, 160, always) == kept * 16, "two tiles that all see and 0.3 of the other eight"
    chosen = 2 * (2 * (32 + 160) * 16 * (6 + 1) + 2 * 2 * 10 * 16)
    assert ann.counts.selection_flops == chosen
    assert ann.counts.flops == 3 * 2 * attention_flops(32, kept * 16, 16) + chosen
    assert ann.counts.dense_flops == 3 * 2 * attention_flops(32, 160, 16)
    assert ann.note() == (
        f"ANN attention: density 0.3 in 3 of 3 calls, 50% of their keys read, "
        f"{ann.counts.flops / ann.counts.dense_flops:.0%} of dense attention's FLOPs in all"
    )
    assert ann.nbytes == 2 * 2 * (32 * 8 + 160 * 4 + 2 * kept * 8)


@given(
    density=st.floats(0.01, 0.64),
    frame=st.integers(64, 4000),
    block=st.integers(1, 4),
    calls=st.integers(1, 10),
    extra=st.integers(0, 3),
)
def test_from_the_shortest_history_on_sparse_attention_costs_less(density, frame, block, calls, extra):
    config = AnnConfig(density=density)
    queries, always = block * frame, (block + extra) * frame
    shortest = shortest_history(config, queries, always, calls)

    def costs(history):
        keys = queries + history
        seen = always + density * (keys - always)
        choice = 2 * (queries + keys) * 13 + 2 * queries * keys / (64 * 256)
        return 4 * queries * seen / 0.65 + choice / calls, 4 * queries * keys

    if shortest is None:
        sparse, dense = costs(1e12)
        assert sparse > dense
    else:
        sparse, dense = costs(shortest + 1)
        assert sparse < dense
        if shortest:
            sparse, dense = costs(shortest - 1)
            assert sparse >= dense


def test_a_self_forcing_block_pays_from_eight_latent_frames_of_history():
    frame = 1560
    assert 7 < shortest_history(AnnConfig(), 3 * frame, 5 * frame, 5) / frame < 8
    assert shortest_history(AnnConfig(density=0.66), 3 * frame, 5 * frame, 5) is None
    ann = AnnAttention(AnnConfig(), frame, calls=5)
    always = [(0, frame), (6 * frame, 10 * frame)]
    assert ann.keys_seen(3 * frame, 10 * frame, always) == 10 * frame
    always = [(0, frame), (17 * frame, 21 * frame)]
    assert 0.48 < ann.keys_seen(3 * frame, 21 * frame, always) / (21 * frame) < 0.5


def test_the_note_says_why_it_is_off():
    q, k, v = tensors(20, 60)

    def note(config):
        ann = AnnAttention(config, FRAME)
        ann(0, q, k, v, None, [(40, 60)], fresh=True)
        return ann.note()

    assert note(AnnConfig(shortest=9)) == (
        "ANN attention is off: the history is at most 4 latent frames and it pays from 9.0"
    )
    assert note(AnnConfig(density=1.0)) == "ANN attention is off: density 1 reads every key"
    assert note(replace(SMALL, density=0.9)) == "ANN attention is off: every key lies in a tile that is read anyway"
    assert note(AnnConfig(density=0.7)).endswith("density 0.7 does not pay at any length; use less than 0.65")


def test_no_value_is_read_back_from_the_device():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    q, k, v = tensors(20, 150, dtype=torch.float32)
    ann = AnnAttention(SMALL, FRAME, backend="gather")
    with Reads() as reads:
        for fresh in (True, False):
            ann(0, q, k, v, torch.zeros(150), [(0, 10), (130, 150)], fresh)
    assert ann.counts.sparse == 2
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & set(reads.names)


def test_hashes_put_similar_tokens_beside_each_other():
    _, k, _ = clustered(frames=2, clusters=12)
    projection = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
    rank = hash_ranks(k, projection)[0, 0]
    keys = k[0, :, 0]
    ordered = keys[rank.argsort()]

    def spread(x):
        return float(x.unflatten(0, (-1, 16)).var(1).mean())

    assert spread(ordered) < 0.6 * spread(keys)
    assert torch.equal(hash_ranks(k + 100, projection), hash_ranks(k, projection)), "an offset is no similarity"


def test_tile_means_are_the_same_in_any_amount_of_scratch(monkeypatch):
    x = tensors(1, 50, heads=2, batch=2)[1]
    order = lists((2, 2), 50, 50)
    whole = tile_means(x, order, 16)
    wanted = x.transpose(1, 2).gather(2, order[..., None].expand(-1, -1, -1, 8))
    assert whole.shape == (2, 2, 4, 8)
    assert torch.allclose(whole[:, :, 3].double(), wanted[:, :, 48:].mean(2), atol=1e-6)
    monkeypatch.setattr(selection, "SCRATCH", 1)
    assert torch.allclose(tile_means(x, order, 16), whole, atol=1e-6)


def test_intervals_of_keys_are_joined_and_must_be_the_keys_own():
    assert merged([(5, 9), (0, 2), (2, 3), (4, 4), (8, 12)], 12) == [(0, 3), (5, 12)]
    for bad in ((-1, 2), (3, 2), (4, 13)):
        with pytest.raises(ValueError, match="is no interval of 12 keys; use"):
            merged([bad], 12)


@pytest.mark.parametrize(
    "options",
    [{"density": 0.0}, {"density": 1.5}, {"density": float("nan")}, {"bits": 0}, {"bits": 17}, {"tile": 8},
     {"query_tile": 2000}, {"shortest": -1}, {"groups": "layer"}],
)  # fmt: skip
def test_bad_settings_are_refused_in_a_sentence(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"^ANN attention: {name} is {value!r}; use "):
        AnnConfig(**options)
    with pytest.raises(ValueError, match="must both be 1 or more"):
        AnnAttention(AnnConfig(), 0)
