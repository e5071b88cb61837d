"""Bytes that tensor operations read and write, counted while they run; on tensors without data too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MovedBytes(TorchDispatchMode):
    """Counts every operation that is not a view: its inputs once, its outputs once. What an in-place copy overwrites
    is not read. ``total`` is the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if function is torch.ops.aten.copy_.default:
                given = given[1:]
            self.total += sum(x.nbytes for x in (*made, *given))
        return out


def clone_and_roll(keys: Tensor, values: Tensor, new: Tensor) -> None:
    """The usual append to a full store without a ring: what stays is cloned and moved to the front, ``new``
    ``[B, n, heads, head_dim]`` written behind it, in both ``[B, tokens, heads, head_dim]``."""
    count = new.shape[1]
    for side in (keys, values):
        side[:, :-count] = side[:, count:].clone()
        side[:, -count:] = new
