"""Frozen K/V inside ComfyUI: core's self-attention answers with the kept keys and values of idle latent frames.

It goes through core's attention override, so the model itself is not touched; an override that is there already (such
as another attention kernel) is called with the completed keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..accel.call import Call
from ..accel.graphs import outside_graphs
from ..accel.kv.frozen import FrozenKV

ATTENTION = "optimized_attention_override"


class KeptAttention:
    """Keys and values of a segment, a store for every CFG branch.

    A branch whose prompt changes with the noise level keeps what it has; two prompts of one branch at the same time
    cannot be told apart and are refused.

    Args:
        layers: transformer blocks. frames: latent frames of the segment. tokens: tokens of a latent frame.
    """

    def __init__(self, layers: int, frames: int, tokens: int) -> None:
        self._shape = (layers, frames, tokens)
        self._stores: dict[int, FrozenKV] = {}

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(store.nbytes for store in self._stores.values())

    def attention(self, call: Call, inner: Callable | None) -> Callable[..., Tensor]:
        """The override for one guided call: this object, since a compiled model would take each new one for a change.

        ``inner`` is the override it takes the place of."""
        self._call, self._inner, self._last, self._answered = call, inner, None, set()
        return self

    @outside_graphs
    def __call__(self, func: Callable, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention of the call that ``attention`` was told of, as core calls an override."""
        options, inner = kwargs.get("transformer_options") or {}, self._inner
        layer = options.get("block_index")
        if layer is not None and layer != self._last:  # a block's self-attention comes before its cross-attention
            branches = options["cond_or_uncond"]
            asked = {(layer, branch) for branch in branches}
            if len(asked) < len(branches) or asked & self._answered:
                raise ValueError(
                    "AR Segment Sampler: several conditionings are used at the same time, which kept K/V cannot "
                    "serve; use one positive and one negative, or remove Active Frame Window, Shared Prefix Cache "
                    "and Chunk Cache."
                )
            self._answered.update(asked)
            k, v = self._complete(layer, k, v, branches, self._call)
        self._last = layer
        return func(q, k, v, *args, **kwargs) if inner is None else inner(func, q, k, v, *args, **kwargs)

    def _complete(self, layer: int, k: Tensor, v: Tensor, branches: list[int], call: Call) -> tuple[Tensor, Tensor]:
        shares = zip(branches, k.chunk(len(branches)), v.chunk(len(branches)), strict=True)
        parts = [
            self._stores.setdefault(branch, FrozenKV(*self._shape)).exchange(
                layer, key, value, call.queries, call.frames
            )
            for branch, key, value in shares
        ]
        if len(parts) == 1:
            return parts[0]
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys), torch.cat(values)
