"""Where torch.compile'd models end and this pack begins.

A K/V store, a mask over kept keys or the pruning of a prompt work with Python numbers that change from block to block.
Traced into a user's compiled model, each of them would be a reason to compile it again, until torch gives up. So they
stay outside: the compiled graph ends before them and goes on behind them, for every block and step the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

_waiting: list[tuple[type, str]] = []


class outside_graphs:  # noqa: N801 - reads as what it is, a decorator
    """Decorates a method that a compiled model may call but never contains, from ``keep_outside`` on."""

    def __init__(self, method: Callable) -> None:
        self._method = method

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, name, self._method)
        _waiting.append((owner, name))


def keep_outside() -> None:
    """Closes all such methods to torch's compiler, once, if something was compiled; call before a run.

    The compiler takes seconds to import, and without it there is nothing to close.
    """
    while _waiting and "torch._dynamo" in sys.modules:
        owner, name = _waiting.pop()
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))
