"""Bytes that tensor operations read and write, counted while they run; on tensors without data too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accel.kernels.choose import Kernel, Traffic


class MovedBytes(TorchDispatchMode):
    """Counts every operation that is not a view: its inputs once, its outputs once. What an in-place copy or an
    ``out=`` overwrites is not read. ``total`` is the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            read = {name: value for name, value in (kwargs or {}).items() if name != "out"}
            given = [x for x in tree_leaves((args, read)) if isinstance(x, Tensor)]
            if function is torch.ops.aten.copy_.default:
                given = given[1:]
            self.total += sum(x.nbytes for x in (*made, *given))
        return out


@contextlib.contextmanager
def fused(kernel: Kernel, traffic: Callable[..., Traffic], counted: MovedBytes) -> Iterator[None]:
    """While open, calls of an operation that writes into its argument ``out`` count as its kernel's ``traffic`` says,
    and do nothing."""

    def told(*args: Tensor) -> Tensor:
        moved = traffic(*args)
        counted.total += moved.read + moved.written
        return args[-1]

    with mock.patch.object(kernel, "torch_form", told):
        yield


def clone_and_roll(keys: Tensor, values: Tensor, new: Tensor) -> None:
    """The usual append to a full store without a ring: what stays is cloned and moved to the front, ``new``
    ``[B, n, heads, head_dim]`` written behind it, in both ``[B, tokens, heads, head_dim]``."""
    count = new.shape[1]
    for side in (keys, values):
        side[:, :-count] = side[:, count:].clone()
        side[:, -count:] = new
