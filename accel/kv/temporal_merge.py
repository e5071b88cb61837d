"""Temporal merge: a token that hardly differs from the one before it in time joins it (TempCache of FAST-AR,
arXiv 2602.01801).

Lemma: n identical keys can be one key whose logit gets ``+ ln n`` and whose value is the mean of theirs, exactly.
Near-duplicates are found by temporal correspondence: a token looks at the tokens that stand for the latent frame before
its own, at its place on the grid and around it. The paper's abstract and lemma name neither similarity, threshold nor
what represents a group: those here are this module's reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import frame_merge
from ..kernels.choose import Kernel
from .late import LateCount, LateCounts
from .tokens import Tokens


@dataclass(frozen=True, slots=True)
class TemporalMergeConfig:
    """When a token joins the one it corresponds to.

    Attributes:
        threshold: least similarity, mean over heads and clips of the cosine of the rotated keys, in [-1, 1].
        neighbourhood: how far on the grid, in tokens, the corresponding token may be: 1 looks at 3x3, 0 at one place.
        most: tokens one may stand for, 1 or more; beyond, its value is an exponential mean with weight 1 / (most + 1).
        floor: similarity the threshold falls to for a frame that would not fit, at most ``threshold``.

    Raises:
        ValueError: a number outside its range.
    """

    threshold: float = 0.95
    neighbourhood: int = 1
    most: int = 16
    floor: float = 0.85

    def __post_init__(self) -> None:
        for name in ("threshold", "floor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and -1.0 <= value <= 1.0):
                raise ValueError(f"Temporal merge: {name} is {value}; use a cosine in [-1, 1], such as 0.9.")
        if self.floor > self.threshold:
            raise ValueError(
                f"Temporal merge: floor {self.floor} is above threshold {self.threshold}; use the threshold or less."
            )
        for name, least in (("neighbourhood", 0), ("most", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Temporal merge: {name} is {value!r}; use a whole number of {least} or more.")


class TemporalMerge:
    """A ``Middle`` in which one token may stand for several of successive latent frames, with ``counts``.

    Frames are absorbed one at a time, oldest first. Each token asks its most similar candidate (its own place first
    where several are equal); of those that ask the same one the most similar joins it, and the others ask twice more
    among the candidates still free. So one token joins one, and counts are durations. The candidate's key, plain
    channels and frame become the newest ones, its value the mean of all it stands for. Who finds none becomes a token
    of its own, behind those that were there.

    Where a frame would not fit, its threshold is the floor; what is still too much is evicted, the lowest
    ``count / (1 + age)`` first, with ``age`` in latent frames behind the one just absorbed, and equal ones in order.

    One object serves one store (one CFG branch): it remembers, layer by layer, which token stands for which place of
    the last frame. An empty middle starts a layer anew, and one of another length than it left matches nothing.

    How many tokens come out depends on the data. Nothing but that number is read from the device: every frame is merged
    in tensors as long as the middle can get, so a store that calls ``merge`` for all its layers, and whose branches
    share ``late``, costs one read a block.

    Args:
        config: when tokens merge. height, width: tokens of a latent frame. late: where lengths come out.
    """

    def __init__(self, config: TemporalMergeConfig, height: int, width: int, late: LateCounts | None = None) -> None:
        if min(height, width) < 1:
            raise ValueError(f"Temporal merge: a grid of {height} x {width} tokens must be 1 x 1 or more.")
        self.config, self.height, self.width, self.late = config, height, width, late or LateCounts()
        self._places: dict[int, Tensor] = {}
        self._lengths: dict[int, int | LateCount] = {}

    def absorb(self, layer: int, kept: Tokens | None, gone: Tokens, queries: Tensor, capacity: int) -> Tokens:
        """As ``Middle.absorb``; ``queries`` have no say. ``merge``, and the read that tells how many came out.

        Raises:
            ValueError: as ``merge``.
        """
        return self.merge(layer, kept, gone, capacity).there()

    def merge(self, layer: int, kept: Tokens | None, gone: Tokens, capacity: int) -> Tokens:
        """As ``EarlyMiddle.merge``.

        Raises:
            ValueError: ``gone`` are not whole latent frames of the grid, or have counts or frames per head.
        """
        size, device = self.height * self.width, gone.keys.device
        if len(gone) % size or gone.counts is not None or gone.frames.ndim != 1:
            raise ValueError(
                f"Temporal merge: {len(gone)} tokens must be whole latent frames of {self.height} x {self.width}, "
                f"as they leave the ring."
            )
        most = 0 if kept is None else len(kept)
        if kept is None or int(self._lengths.get(layer, -1)) != most:
            self._places[layer] = torch.full((size,), -1, device=device)
        middle, places = _roomy(kept, gone, min(most + len(gone), capacity + size)), self._places[layer].to(device)
        live = torch.full((), most, device=device)
        for start in range(0, len(gone), size):
            frame, most = gone.part(slice(start, start + size)), most + size
            limit = capacity if most > capacity else None
            places, live = merge_kernel(places, live, middle, frame, limit, self.config, (self.height, self.width))
            if most > capacity:
                middle, places, live = _evict(middle, places, frame.frames[0], live, capacity)
                most = capacity
        self._places[layer] = places
        self._lengths[layer] = self.late.add(live)
        return replace(middle.part(slice(0, most)), live=self._lengths[layer])

    def state(self) -> dict[str, Tensor]:
        """What it remembers, int64 on the CPU, for ``load``: a run resumed with it goes on bit by bit."""
        lengths = {f"length.{layer}": torch.tensor(int(length)) for layer, length in self._lengths.items()}
        return {f"places.{layer}": places.cpu().clone() for layer, places in self._places.items()} | lengths

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Remembers what ``state`` told, in place of all else."""
        told = [(*name.split("."), tensor) for name, tensor in state.items()]
        self._places = {int(layer): tensor.clone() for name, layer, tensor in told if name == "places"}
        self._lengths = {int(layer): int(tensor) for name, layer, tensor in told if name == "length"}


def merge_frame(
    places: Tensor, live: Tensor, middle: Tokens, frame: Tokens, capacity: int | None, config: TemporalMergeConfig,
    grid: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Takes one more latent frame into a middle, in place, behind the tokens there are.

    Args:
        places: which row of ``middle`` stands for each place of the latent frame before, -1 for none. live: rows that
            are tokens, ``[]``. middle: with counts, and room for ``frame`` behind them. capacity: tokens above which
            the threshold falls to the floor; None where there is room for all. grid: height and width in tokens.

    Returns:
        ``places`` and ``live`` after the frame.
    """
    similarity, candidates = correspondence(places, middle, frame, config.neighbourhood, grid)
    partner = assign(similarity, candidates, config.threshold)
    if capacity is not None:
        closer = assign(similarity, candidates, config.floor)
        partner = torch.where(live + (partner < 0).sum() > capacity, closer, partner)
    apart = partner < 0
    into = torch.where(apart, live + apart.cumsum(0) - 1, places[partner.clamp(min=0)])
    counts = torch.where(apart, 0.0, middle.counts[into])
    n = counts[:, None, None]
    mean = ((n * middle.values[:, into] + frame.values) / (n + 1.0)).to(middle.values.dtype)
    middle.values[:, into] = torch.where(apart[:, None, None], frame.values, mean)
    middle.keys[:, into] = frame.keys
    middle.frames[into] = frame.frames
    middle.counts[into] = (counts + 1.0).clamp(max=config.most)
    if middle.plain is not None:
        middle.plain[:, into] = frame.plain
    return into, live + apart.sum()


merge_kernel = Kernel("temporal merge", merge_frame, frame_merge.triton_form, frame_merge.supports)


def correspondence(
    places: Tensor, middle: Tokens, frame: Tokens, reach: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Similarity of each token to its candidates ``[candidates, n]``, and their places on the grid.

    The own place comes first; a candidate off the grid or that nobody stands for has similarity -inf.
    """
    (height, width), size = grid, len(frame)
    spots = torch.arange(size, device=places.device).view(height, width)
    spots = F.pad(torch.where(places.view(height, width) < 0, size, spots), (reach,) * 4, value=size)
    new = _unit(frame.keys).unflatten(1, (height, width))
    old = _unit(middle.keys[:, places.clamp(min=0)])
    old = F.pad(old.unflatten(1, (height, width)), (0, 0, 0, 0, *(reach,) * 4))
    offsets = sorted(product(range(2 * reach + 1), repeat=2), key=lambda offset: offset != (reach, reach))
    similarity, candidates = [], []
    for y, x in offsets:
        rows, columns = slice(y, y + height), slice(x, x + width)
        candidates.append(spots[rows, columns].flatten())
        cosines = (new * old[:, rows, columns]).sum(-1)
        similarity.append(cosines.mean((0, 3)).flatten().masked_fill(candidates[-1] == size, -math.inf))
    return torch.stack(similarity), torch.stack(candidates)


def assign(similarity: Tensor, candidates: Tensor, threshold: float, rounds: int = 3) -> Tensor:
    """Which place each token joins, at most one token a place.

    In each round every token without a place asks the most similar free candidate at ``threshold`` or above, and the
    most similar of those that ask, the first where several are, gets it.

    Args:
        similarity, candidates: ``[candidates, n]``, of each token and its candidates, and the candidates' places in
            [0, n]; n is none and has similarity -inf. rounds: how often a token may ask.

    Returns:
        int64 ``[n]``, -1 for a token that joins none.
    """
    n = similarity.shape[1]
    tokens = torch.arange(n, device=similarity.device)
    partner = torch.full_like(tokens, -1)
    open_ = similarity.masked_fill(~(similarity >= threshold), -math.inf)
    taken = torch.zeros(n + 1, dtype=torch.bool, device=similarity.device)
    for _ in range(rounds):
        best, which = open_.max(0)
        asked = torch.where(best > -math.inf, candidates.gather(0, which[None])[0], n)
        highest = best.new_full((n + 1,), -math.inf).scatter_reduce(0, asked, best, "amax")
        ahead = torch.where(best == highest[asked], asked, n)
        first = tokens.new_full((n + 1,), n).scatter_reduce(0, ahead, tokens, "amin")
        wins = (asked < n) & (first[asked] == tokens)
        partner = torch.where(wins, asked, partner)
        taken = taken | (highest > -math.inf)
        open_ = open_.masked_fill(wins | taken[candidates], -math.inf)
    return partner


def _roomy(kept: Tokens | None, like: Tokens, rows: int) -> Tokens:
    """A copy of the middle with room for ``rows`` tokens."""
    kept = like.part(slice(0, 0)) if kept is None else kept
    room = rows - len(kept)
    if kept.counts is None:
        kept = replace(kept, counts=torch.ones(len(kept), device=like.keys.device))

    def longer(x: Tensor, axis: int) -> Tensor:
        return torch.cat([x, x.new_zeros((*x.shape[:axis], room, *x.shape[axis + 1 :]))], axis)

    plain = None if kept.plain is None else longer(kept.plain, 1)
    return Tokens(longer(kept.keys, 1), longer(kept.values, 1), longer(kept.frames, 0), plain, longer(kept.counts, 0))


def _evict(
    middle: Tokens, places: Tensor, newest: Tensor, live: Tensor, capacity: int
) -> tuple[Tokens, Tensor, Tensor]:
    """The ``capacity`` tokens worth most at the time ``newest`` first, in order, who stands for each place then, and
    how many there are. Rows without a token are worth less than any with one."""
    rows = torch.arange(len(middle), device=places.device)
    worth = middle.counts / (1.0 + (newest - middle.frames).clamp(min=0))
    order = torch.where(rows < live, worth, -math.inf).argsort(stable=True)
    excess = len(middle) - capacity
    stay = order[excess:].sort().values
    moved = torch.full_like(rows, -1)
    moved[stay] = rows[:capacity]
    return middle.part(torch.cat([stay, order[:excess]])), moved[places], live.clamp(max=capacity)


def _unit(keys: Tensor) -> Tensor:
    return F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
