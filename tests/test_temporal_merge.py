"""Temporal merge: exact for identical keys, one token to one, never above capacity, resumable."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from accel.kv.temporal_merge import TemporalMerge, TemporalMergeConfig, assign
from accel.kv.tokens import Tokens

HEIGHT, WIDTH, HEADS, DIM = 3, 4, 2, 8
SIZE = HEIGHT * WIDTH
ROOM = 10_000


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def film(frames, change, seed=0, batch=1, start=0):
    """Latent frames whose keys differ from one to the next by ``change`` (about the sine of the angle)."""
    keys = [random(batch, SIZE, HEADS, DIM, seed=seed)]
    for turn in range(1, frames):
        keys.append(keys[-1] + change * random(batch, SIZE, HEADS, DIM, seed=seed + turn))
    times = torch.arange(start, start + frames).repeat_interleave(SIZE)
    values = random(batch, frames * SIZE, HEADS, DIM, seed=seed + 99)
    return Tokens(torch.cat(keys, 1), values, times, torch.cat(keys, 1)[..., :2])


def some(tokens, first, last):
    rows = slice(first * SIZE, last * SIZE)
    return Tokens(tokens.keys[:, rows], tokens.values[:, rows], tokens.frames[rows], tokens.plain[:, rows])


def absorbed(tokens, config=None, capacity=ROOM, at_once=1, rule=None):
    """The middle after all frames of ``tokens`` have left the ring, ``at_once`` at a time."""
    rule = rule or TemporalMerge(config or TemporalMergeConfig(), HEIGHT, WIDTH)
    kept = None
    for first in range(0, len(tokens) // SIZE, at_once):
        kept = rule.absorb(0, kept, some(tokens, first, first + at_once), random(1, 3, HEADS, DIM), capacity)
        assert len(kept) <= capacity
    return kept


def equal(one, other):
    parts = ("keys", "values", "frames", "plain", "counts")
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


def attention(q, k, v, bias=0.0):
    return (q @ k.T / k.shape[1] ** 0.5 + bias).softmax(-1) @ v


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99))
def test_identical_keys_can_be_one_key_with_the_logarithm_of_their_number(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    q, few = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, len(sizes)))
    counts = torch.tensor(sizes)
    v = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64)
    mean = torch.stack([group.mean(0) for group in v.split(sizes)])
    every = attention(q, few.repeat_interleave(counts, 0), v)
    torch.testing.assert_close(attention(q, few, mean, counts.double().log()), every, atol=1e-6, rtol=0)


def test_without_the_logarithm_it_is_another_attention():
    q, k, v = (random(n, 4, seed=n).double() for n in (3, 2, 6))
    every = attention(q, k.repeat_interleave(torch.tensor([5, 1]), 0), v)
    mean = torch.stack([v[:5].mean(0), v[5]])
    assert (attention(q, k, mean) - every).abs().max() > 0.05


@given(st.integers(1, 8), st.integers(0, 99))
def test_attention_to_a_static_video_is_that_to_one_frame_with_counts(frames, seed):
    tokens = film(frames, 0.0, seed)
    tokens = Tokens(tokens.keys.double(), tokens.values.double(), tokens.frames, tokens.plain)
    out = absorbed(tokens)
    assert len(out) == SIZE and out.counts.tolist() == [frames] * SIZE and set(out.frames.tolist()) == {frames - 1}
    q = random(3, DIM, seed=seed).double()
    for head in range(HEADS):
        merged = attention(q, out.keys[0, :, head], out.values[0, :, head], out.counts.double().log())
        every = attention(q, tokens.keys[0, :, head], tokens.values[0, :, head])
        torch.testing.assert_close(merged, every, atol=1e-6, rtol=0)


@given(st.integers(1, 6), st.floats(0, 1.5), st.integers(0, 99), st.sampled_from([1, 2, 3]))
def test_counts_sum_to_the_tokens_absorbed(frames, change, seed, at_once):
    tokens = film(at_once * frames, change, seed)
    out = absorbed(tokens, TemporalMergeConfig(most=100), at_once=at_once)
    assert out.counts.sum() == len(tokens) and SIZE <= len(out) <= len(tokens)
    total = (out.counts[:, None, None] * out.values).sum(1)
    torch.testing.assert_close(total, tokens.values.sum(1), atol=1e-4, rtol=1e-4)
    assert (out.frames == tokens.frames[-1]).sum() == SIZE, "every place of the last frame has a token of its own"


@given(st.integers(1, 5), st.floats(0, 1.5), st.integers(0, 30), st.integers(0, 99))
def test_capacity_is_never_exceeded(frames, change, capacity, seed):
    out = absorbed(film(frames, change, seed), capacity=capacity)
    assert len(out) <= capacity and len(out.frames) == len(out.counts) == out.plain.shape[1] == len(out)


def test_a_video_that_moves_by_a_token_a_frame_keeps_what_stays_in_sight():
    wide = random(1, HEIGHT, WIDTH + 3, HEADS, DIM)
    keys = torch.cat([wide[:, :, n : n + WIDTH].flatten(1, 2) for n in range(4)], 1)
    times = torch.arange(4).repeat_interleave(SIZE)
    tokens = Tokens(keys, random(1, 4 * SIZE, HEADS, DIM), times, keys[..., :2])
    assert len(absorbed(tokens)) == HEIGHT * (WIDTH + 3)
    assert len(absorbed(tokens, TemporalMergeConfig(neighbourhood=0))) == 4 * SIZE


def test_a_token_that_joins_brings_its_key_and_shares_its_value():
    tokens = film(3, 0.02)
    out, size = absorbed(tokens), SIZE
    assert torch.equal(out.keys, tokens.keys[:, 2 * size :]) and torch.equal(out.plain, out.keys[..., :2])
    torch.testing.assert_close(out.values, tokens.values.unflatten(1, (3, size)).mean(1))


def test_beyond_the_most_it_is_an_exponential_mean():
    tokens = film(5, 0.0)
    out = absorbed(tokens, TemporalMergeConfig(most=2))
    mean = tokens.values[:, :SIZE]
    for n, frame in zip((1, 2, 2, 2), tokens.values.split(SIZE, 1)[1:], strict=True):
        mean = (n * mean + frame) / (n + 1)
    torch.testing.assert_close(out.values, mean)
    assert out.counts.tolist() == [2.0] * SIZE


def test_the_same_holds_frame_by_frame_and_all_at_once():
    tokens = film(6, 0.2)
    assert equal(absorbed(tokens), absorbed(tokens, at_once=3))
    out = absorbed(tokens)
    assert SIZE < len(out) < 6 * SIZE, "some merge, some do not"


def test_a_state_taken_along_changes_no_bit():
    tokens = film(6, 0.2)
    rule = TemporalMerge(TemporalMergeConfig(), HEIGHT, WIDTH)
    half = absorbed(some(tokens, 0, 3), rule=rule)
    resumed = TemporalMerge(TemporalMergeConfig(), HEIGHT, WIDTH)
    resumed.load(rule.state())
    assert all(tensor.dtype == torch.int64 for tensor in rule.state().values())
    rest, queries = some(tokens, 3, 6), random(1, 3, HEADS, DIM)
    expected = absorbed(tokens)
    assert equal(resumed.absorb(0, half, rest, queries, ROOM), expected)
    assert equal(rule.absorb(0, half, rest, queries, ROOM), expected)
    without = TemporalMerge(TemporalMergeConfig(), HEIGHT, WIDTH).absorb(0, half, rest, queries, ROOM)
    assert len(without) > len(expected), "without the state nothing corresponds"


def test_layers_and_runs_do_not_see_each_other():
    tokens, other = film(3, 0.2), film(3, 0.2, seed=50)
    rule = TemporalMerge(TemporalMergeConfig(), HEIGHT, WIDTH)
    kept = [None, None]
    for n in range(3):
        for layer, given_ in enumerate((tokens, other)):
            kept[layer] = rule.absorb(layer, kept[layer], some(given_, n, n + 1), given_.keys, ROOM)
    assert equal(kept[0], absorbed(tokens)) and equal(kept[1], absorbed(other))
    assert equal(absorbed(other, rule=rule), kept[1]), "an empty middle starts the layer anew"


def test_a_middle_of_another_length_matches_nothing_and_neither_does_an_empty_one():
    anything = TemporalMerge(TemporalMergeConfig(threshold=-1.0, floor=-1.0), HEIGHT, WIDTH)
    tokens = film(2, 0.0)
    for _ in range(2):
        assert absorbed(some(tokens, 0, 1), rule=anything).counts.tolist() == [1.0] * SIZE
    longer = absorbed(film(2, 9.0))
    out = anything.absorb(0, longer, some(tokens, 0, 1), tokens.keys, ROOM)
    assert len(out) == len(longer) + SIZE and torch.equal(out.counts[: len(longer)], longer.counts)


def test_where_all_keys_are_alike_each_token_joins_its_own_place():
    tokens = film(2, 0.0)
    out = absorbed(Tokens(torch.ones_like(tokens.keys), tokens.values, tokens.frames, tokens.plain))
    torch.testing.assert_close(out.values, tokens.values.unflatten(1, (2, SIZE)).mean(1))


@given(st.permutations(range(3)), st.integers(0, 99), st.floats(0, 0.5))
def test_the_order_of_the_batch_is_irrelevant(order, seed, change):
    tokens, order = film(3, change, seed, batch=3), list(order)
    swapped = Tokens(tokens.keys[order], tokens.values[order], tokens.frames, tokens.plain[order])
    out, other = absorbed(tokens), absorbed(swapped)
    assert torch.equal(out.frames, other.frames) and torch.equal(out.counts, other.counts)
    assert torch.equal(out.keys[order], other.keys) and torch.equal(out.values[order], other.values)


def test_what_is_given_stays_as_it_is():
    tokens = film(4, 0.2)
    rule = TemporalMerge(TemporalMergeConfig(), HEIGHT, WIDTH)
    kept = rule.absorb(0, None, some(tokens, 0, 2), tokens.keys, ROOM)
    gone = some(tokens, 2, 4)
    before = [t.clone() for one in (kept, gone) for t in (one.keys, one.values, one.frames, one.plain)]
    counts = kept.counts.clone()
    rule.absorb(0, kept, gone, tokens.keys, SIZE + 2)
    after = [t for one in (kept, gone) for t in (one.keys, one.values, one.frames, one.plain)]
    assert all(map(torch.equal, before, after)) and torch.equal(counts, kept.counts)


def test_a_frame_that_would_not_fit_merges_down_to_the_floor():
    tokens = film(2, 0.45, seed=4)
    similarity = F.cosine_similarity(tokens.keys[0, :SIZE], tokens.keys[0, SIZE:], dim=-1).mean(-1)
    apart = {least: int((similarity < least).sum()) for least in (0.95, 0.85)}
    assert 0 < apart[0.85] < apart[0.95]
    config = TemporalMergeConfig(neighbourhood=0)
    assert len(absorbed(tokens, config, SIZE + apart[0.95])) == SIZE + apart[0.95]
    assert len(absorbed(tokens, config, SIZE + apart[0.95] - 1)) == SIZE + apart[0.85]


def test_what_stands_for_little_and_is_old_is_evicted_first():
    tokens = film(3, 0.0)
    keys = tokens.keys.clone()
    keys[:, SIZE + 1] *= -1.0  # place 1 changes in frame 1 and back again in frame 2
    out = absorbed(Tokens(keys, tokens.values, tokens.frames, tokens.plain), capacity=SIZE + 1)
    assert sorted(out.counts.tolist()) == [1.0, 1.0] + [3.0] * (SIZE - 1)
    assert sorted(out.frames.tolist()) == [1] + [2] * SIZE, "its token of frame 0 is worth 1/3, that of frame 1 1/2"
    assert torch.equal(out.values[:, -1], tokens.values[:, 2 * SIZE + 1])


def test_no_place_refers_to_an_evicted_token():
    tokens = film(6, 0.3)
    rule = TemporalMerge(TemporalMergeConfig(), HEIGHT, WIDTH)
    kept = None
    for n in range(6):
        kept = rule.absorb(0, kept, some(tokens, n, n + 1), tokens.keys, SIZE - 3)
        places = rule.state()["places.0"]
        stands = places[places >= 0]
        assert len(stands) == len(set(stands.tolist())) and (kept.frames[stands] == n).all()
        assert (places < 0).any()


def one_by_one(similarity, candidates, threshold, rounds):
    """``assign`` token by token."""
    options, n = similarity.shape
    partner, taken = [-1] * n, set()
    for _ in range(rounds):
        asks = {}
        for token in range(n):
            free = [(-similarity[c, token], c) for c in range(options)
                    if similarity[c, token] >= threshold and candidates[c, token] not in taken]  # fmt: skip
            if partner[token] < 0 and free:
                best, which = min(free)
                asks.setdefault(candidates[which, token], []).append((best, token))
        for place, tokens in asks.items():
            partner[min(tokens)[1]] = place
            taken.add(place)
    return partner


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 4), st.randoms(use_true_random=False))
def test_one_token_joins_one(options, n, rounds, draw):
    similarity = [[draw.choice([0.2, 0.5, 0.6, 0.7, 0.9, -math.inf]) for _ in range(n)] for _ in range(options)]
    candidates = [[draw.randrange(n) for _ in range(n)] for _ in range(options)]
    candidates = [[n if s == -math.inf else c for s, c in zip(*rows, strict=True)]
                  for rows in zip(similarity, candidates, strict=True)]  # fmt: skip
    one, two = torch.tensor(similarity), torch.tensor(candidates)
    out = assign(one, two, 0.5, rounds).tolist()
    assert out == one_by_one(one.numpy(), two.numpy(), 0.5, rounds)
    joined = [place for place in out if place >= 0]
    assert len(joined) == len(set(joined)) and n not in joined


def test_a_similarity_that_is_not_a_number_joins_nothing():
    tokens = film(2, 0.0)
    tokens.keys[:, SIZE] = math.nan
    out = absorbed(tokens)
    assert len(out) == SIZE + 1 and out.counts.sum() == 2 * SIZE


@pytest.mark.parametrize(
    "options",
    [{"threshold": 1.5}, {"threshold": 0.8}, {"floor": math.nan}, {"most": 0}, {"neighbourhood": -1}, {"most": 2.5}],
)
def test_bad_settings_are_refused_in_a_sentence(options):
    with pytest.raises(ValueError, match=r"^Temporal merge: .*use"):
        TemporalMergeConfig(**options)


def test_what_is_not_whole_frames_is_refused():
    with pytest.raises(ValueError, match=r"^Temporal merge: 11 tokens must be whole latent frames of 3 x 4"):
        tokens = film(1, 0.0)
        TemporalMerge(TemporalMergeConfig(), HEIGHT, WIDTH).absorb(
            0, None, Tokens(tokens.keys[:, :11], tokens.values[:, :11], tokens.frames[:11]), tokens.keys, ROOM
        )
    with pytest.raises(ValueError, match=r"^Temporal merge: a grid of 0 x 4"):
        TemporalMerge(TemporalMergeConfig(), 0, WIDTH)
