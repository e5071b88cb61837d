"""Importance-redundancy: of the tokens between sink and recent window, those kept that the next block looks at most and
that are least like the others (FlowCache, arXiv 2602.10825, "joint importance-redundancy optimised compression").

Importance is the attention a token gets from the block about to be denoised, redundancy how much its key resembles all
other keys; each is a distribution over the tokens and ``score = mix * importance - (1 - mix) * redundancy``. The spread
of both is a few per cent of their size, so scores are float32 (or float64) whatever the keys are: bfloat16 would tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import column_mass as kernels
from ..kernels.choose import Kernel
from .tokens import Tokens, joined

TILE = 1 << 24
ROWS = 1024
UNITS = ("token", "frame", "chunk")
# Weights in [0, 1] over places in [0, 1], oldest token first. The cubic powers are FlowCache's ``power=3``; it names
# the exponential without a formula, and this is the simplest rising curve that reproduces what it selects.
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "no_weight": torch.ones_like,
    "polynomial": lambda place: place**3,
    "upper_convex_polynomial": lambda place: 1.0 - (1.0 - place) ** 3,
    "exponential": lambda place: 1.0 - 0.9 * torch.exp(-2.0 * place),
}


@dataclass(frozen=True, slots=True)
class ImportanceRedundancyConfig:
    """How tokens are scored and in which units they are kept.

    Attributes:
        mix: weight of importance in [0, 1], the rest is that of redundancy. FlowCache: 0.07.
        kernel: odd width, in tokens, of the maximum that smooths importance; 1 leaves it as it is.
        unit: ``token``, or ``frame`` to keep whole latent frames by their mean score.
        weighting: key of ``WEIGHTINGS``, favours newer tokens; None treats all alike.

    Raises:
        ValueError: a mix outside [0, 1], an even kernel, or an unknown unit or weighting.
    """

    mix: float = 0.07
    kernel: int = 7
    unit: str = "token"
    weighting: str | None = None

    def __post_init__(self) -> None:
        _check_score(self.mix, self.kernel, self.weighting)
        if self.unit not in ("token", "frame"):
            raise ValueError(f"Importance-redundancy: unit is {self.unit!r}; use 'token' or 'frame'.")


class ImportanceRedundancy:
    """A ``Middle`` that keeps, head by head, the tokens with the highest scores, in order of time.

    It remembers nothing between calls. Keys keep their rotations; ``frames`` of what it returns is ``[n, heads]``.

    Args:
        config: how tokens are scored. frame_tokens: tokens of a latent frame, needed by the unit ``frame``. tile: as of
            ``column_mass``.
    """

    def __init__(self, config: ImportanceRedundancyConfig, frame_tokens: int | None = None, tile: int = TILE) -> None:
        if config.unit == "frame" and (frame_tokens is None or frame_tokens < 1):
            raise ValueError(
                f"Importance-redundancy: a latent frame has {frame_tokens} tokens; give how many, or use unit 'token'."
            )
        self.config, self.frame_tokens, self._tile = config, frame_tokens, tile

    def absorb(self, layer: int, kept: Tokens | None, gone: Tokens, queries: Tensor, capacity: int) -> Tokens:
        """As ``Middle.absorb``; all tokens where they fit.

        Raises:
            ValueError: tokens that stand for several (``counts``), or whole frames asked for where not one fits.
        """
        tokens = joined([gone] if kept is None else [kept, gone])
        if tokens.counts is not None:
            raise ValueError("Importance-redundancy: tokens with counts were merged; use one rule for the middle only.")
        if len(tokens) <= capacity:
            return tokens
        size = self.frame_tokens if self.config.unit == "frame" else 1
        if 0 < capacity < size:
            raise ValueError(
                f"Importance-redundancy: {capacity} tokens hold no latent frame of {size}; allow more, or use 'token'."
            )
        chosen = select(
            queries.transpose(1, 2), tokens.keys.transpose(1, 2), capacity // size * size, self.config.mix,
            self.config.kernel, self.config.unit, size, self.config.weighting, self._tile,
        )  # fmt: skip
        return taken(tokens, chosen.sort(-1).values)


def select(
    q: Tensor,
    k: Tensor,
    budget: int,
    mix: float = 0.07,
    kernel: int = 7,
    unit: str = "token",
    unit_size: int | None = None,
    weighting: str | None = None,
    tile: int = TILE,
) -> Tensor:
    """The ``budget`` tokens a head with the highest ``mix * importance - (1 - mix) * redundancy``.

    Importance is ``column_mass`` under a running maximum of ``kernel`` tokens. Leading dimensions are averaged, once in
    the importance and once in the redundancy, so that all clips of a batch keep the same tokens.

    Args:
        q: ``[q_heads, queries, dim]`` or with leading dimensions; ``q_heads`` a multiple of ``kv_heads``.
        k: ``[kv_heads, tokens, dim]``, oldest first, with the same leading dimensions.
        budget: tokens to keep; the budget of more tokens than there are is all of them.
        mix, kernel, weighting: as in ``ImportanceRedundancyConfig``; weights multiply scores shifted to minimum 0.
        unit: ``token``; ``frame`` or ``chunk`` keep runs of ``unit_size`` tokens by their mean score.
        tile: as of ``column_mass``.

    Returns:
        int64 ``[kv_heads, budget]``, highest score first, equal scores oldest first, units whole and in order.

    Raises:
        ValueError: an option out of its range, shapes that do not fit, or units that do not divide tokens and budget.
    """
    _check_score(mix, kernel, weighting)
    tokens = k.shape[-2]
    budget = min(budget, tokens)
    size = _unit_size(unit, unit_size, tokens, budget)
    importance = F.max_pool1d(_batch_mean(column_mass(q, k, tile)), kernel, 1, kernel // 2)
    score = mix * importance - (1.0 - mix) * _batch_mean(redundancy(k))
    if weighting is not None:
        place = torch.linspace(0.0, 1.0, tokens, dtype=score.dtype, device=score.device)
        score = (score - score.amin(-1, keepdim=True)) * WEIGHTINGS[weighting](place)
    units = score.unflatten(-1, (-1, size)).mean(-1)
    best = units.sort(dim=-1, descending=True, stable=True).indices[:, : budget // size]
    return (best[..., None] * size + torch.arange(size, device=k.device)).flatten(1)


def column_mass(q: Tensor, k: Tensor, tile: int = TILE) -> Tensor:
    """Attention each key gets, as the mean over queries of ``softmax(q k / sqrt(dim))`` over these keys.

    Two passes, the first for the normaliser of each query, the second for the sums of the columns, so that no matrix of
    queries by tokens exists. On CUDA devices they are Triton kernels where these can run.

    Args:
        q: ``[..., q_heads, queries, dim]``. k: ``[..., kv_heads, tokens, dim]``. Of the query heads that share a key
            head the largest logit counts. tile: most logits held at once.

    Returns:
        ``[..., kv_heads, tokens]``, each row summing to 1; float32, float64 for float64 inputs.

    Raises:
        ValueError: ``q`` and ``k`` do not fit each other.
    """
    _check(q, k)
    return mass_kernel(q, k, tile)


def row_logsumexp(q: Tensor, k: Tensor, tile: int = TILE) -> Tensor:
    """The logarithm of each query's softmax normaliser over ``k``, ``[..., kv_heads, queries]``; -inf over no keys.

    Arguments and precision as in ``column_mass``.
    """
    _check(q, k)
    return row_kernel(q, k, tile)


def tiled_mass(q: Tensor, k: Tensor, tile: int) -> Tensor:
    """``column_mass``, a tile of logits at a time: beside its result it needs, in float32, at most about twice ``tile``
    logits and a tile's queries and keys (together about 256 MiB), whatever the numbers of queries and tokens."""
    mass = torch.zeros(k.shape[:-1], dtype=working_dtype(k), device=k.device)
    rows, columns = _tile(q, tile)
    for part in q.split(rows, -2):
        total = tiled_logsumexp(part, k, tile)[..., None]
        for keys, into in zip(k.split(columns, -2), mass.split(columns, -1), strict=True):
            into += _logits(part, keys).sub_(total).exp_().sum(-2)
    return mass / q.shape[-2]


def tiled_logsumexp(q: Tensor, k: Tensor, tile: int) -> Tensor:
    """``row_logsumexp``, a tile of logits at a time."""
    rows, columns = _tile(q, tile)
    parts = []
    for part in q.split(rows, -2):
        total = part.new_full((*k.shape[:-2], part.shape[-2]), -math.inf, dtype=working_dtype(k))
        for keys in k.split(columns, -2) if k.shape[-2] else ():
            total = torch.logaddexp(total, _logits(part, keys).logsumexp(-1))
        parts.append(total)
    return torch.cat(parts, -1)


mass_kernel = Kernel("column mass", tiled_mass, kernels.mass_form, kernels.supports)
row_kernel = Kernel("row log-sum-exp", tiled_logsumexp, kernels.logsumexp_form, kernels.supports)


def redundancy(k: Tensor) -> Tensor:
    """How much each key resembles all others: softmax over tokens of its mean cosine to them.

    ``sum_j cos(k_i, k_j)`` is one scalar product with the sum of the normalised keys: ``O(tokens dim)``, no matrix of
    tokens by tokens. As in the reference the own cosine is left out of the sum but not of the number it is divided by.

    Args:
        k: ``[..., kv_heads, tokens, dim]``.

    Returns:
        ``[..., kv_heads, tokens]``, float32 (float64 for float64 keys); 0 for a single token.
    """
    unit = F.normalize(k.to(working_dtype(k)), dim=-1)
    if k.shape[-2] == 1:
        return unit.new_zeros(k.shape[:-1])
    cosines = (unit @ unit.sum(-2).unsqueeze(-1)).squeeze(-1)
    return ((cosines - 1.0) / k.shape[-2]).softmax(-1)


def taken(tokens: Tokens, chosen: Tensor) -> Tokens:
    """The tokens at ``chosen`` ``[heads, n]``, which may differ from head to head."""
    places = chosen.T

    def pick(tensor: Tensor) -> Tensor:
        return tensor.gather(1, places[None, :, :, None].expand(tensor.shape[0], -1, -1, tensor.shape[-1]))

    frames = tokens.frames.gather(0, places) if tokens.frames.ndim == 2 else tokens.frames[places]
    plain = None if tokens.plain is None else pick(tokens.plain)
    return replace(tokens, keys=pick(tokens.keys), values=pick(tokens.values), frames=frames, plain=plain)


def _check_score(mix: float, kernel: int, weighting: str | None) -> None:
    """Raises ValueError for what no score can be made with."""
    if not (isinstance(mix, (int, float)) and 0.0 <= mix <= 1.0):
        raise ValueError(f"Importance-redundancy: mix is {mix}; use 0 (redundancy alone) to 1 (importance alone).")
    if not isinstance(kernel, int) or isinstance(kernel, bool) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"Importance-redundancy: kernel is {kernel!r}; use an odd number of tokens, 1 for none.")
    if weighting is not None and weighting not in WEIGHTINGS:
        raise ValueError(f"Importance-redundancy: weighting is {weighting!r}; use None or one of {sorted(WEIGHTINGS)}.")


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype scores are computed in: float32, or float64 where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _batch_mean(rows: Tensor) -> Tensor:
    return rows.reshape(-1, *rows.shape[-2:]).mean(0)


def _unit_size(unit: str, size: int | None, tokens: int, budget: int) -> int:
    if unit not in UNITS:
        raise ValueError(f"Importance-redundancy: unit is {unit!r}; use one of {UNITS}.")
    if unit == "token":
        return 1
    if size is None or size < 1 or tokens % size or budget % size:
        raise ValueError(
            f"Importance-redundancy: unit size {size} must divide the {tokens} tokens and the budget of {budget}."
        )
    return size


def _check(q: Tensor, k: Tensor) -> None:
    fits = q.ndim == k.ndim >= 3 and q.shape[:-3] == k.shape[:-3] and q.shape[-1] == k.shape[-1]
    if not fits or q.shape[-3] % k.shape[-3]:
        raise ValueError(
            f"Importance-redundancy: queries {tuple(q.shape)} and keys {tuple(k.shape)} must be [..., heads, tokens, "
            f"dim], with a multiple of the keys' heads."
        )


def _tile(q: Tensor, tile: int) -> tuple[int, int]:
    """Queries and keys of a tile of at most about ``tile`` logits, no wider than its keys' float32 copy allows."""
    rows = min(q.shape[-2], ROWS)
    return rows, max(1, tile // (math.prod(q.shape[:-2]) * max(rows, q.shape[-1])))


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """``[..., kv_heads, queries, tokens]``, the largest of each group of query heads."""
    dtype = working_dtype(k)
    group, rows = q.shape[-3] // k.shape[-3], q.shape[-2]
    queries = (q.to(dtype) / math.sqrt(q.shape[-1])).reshape(*k.shape[:-2], group * rows, q.shape[-1])
    logits = queries @ k.to(dtype).mT
    return logits if group == 1 else logits.unflatten(-2, (group, rows)).amax(-3)
