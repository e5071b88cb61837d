"""Triton kernels on the CPU: run by Triton's interpreter, with what every launch reads and writes counted.

``interpreted()`` makes ``backend="triton"`` run tensors of the CPU and gives a ``Launches``. Dots of bfloat16 are wrong
in the interpreter (triton issue 11584); keep tensors below about 1e5 elements.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import pytest

from accel.kernels import choose

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install -r requirements-dev.txt"
)


@dataclass
class Launches:
    """Names of the kernels launched, in order, and bytes at distinct addresses that each launch read and wrote."""

    names: list[str] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)

    @property
    def traffic(self) -> tuple[int, int, int]:
        """Launches, bytes read, bytes written."""
        return len(self.names), sum(self.read), sum(self.written)


class _Addresses:
    """Distinct bytes touched since the last ``count``."""

    def __init__(self) -> None:
        self._touched: list[np.ndarray] = []

    def touch(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        inside = np.broadcast_to(mask, pointers.shape).astype(bool)
        starts = np.unique(pointers[inside].astype(np.uint64))
        self._touched.append((starts[:, None] + np.arange(itemsize, dtype=np.uint64)).ravel())

    def count(self) -> int:
        touched, self._touched = self._touched, []
        return int(np.unique(np.concatenate(touched)).size) if touched else 0


@contextlib.contextmanager
def interpreted() -> Iterator[Launches]:
    """Runs kernels on tensors of the CPU while it is open."""
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    builder, launches = interpreter.InterpreterBuilder, Launches()
    loads, stores = _Addresses(), _Addresses()
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, ptrs, mask, *rest):
        found = load(self, ptrs, mask, *rest)
        loads.touch(ptrs.data, mask.data, found.data.itemsize)
        return found

    def counted_store(self, ptrs, value, mask, *rest):
        stores.touch(ptrs.data, mask.data, value.data.itemsize)
        return store(self, ptrs, value, mask, *rest)

    class Counted(interpreter.InterpretedFunction):
        def run(self, *args, grid, warmup, **kwargs):
            done = super().run(*args, grid=grid, warmup=warmup, **kwargs)
            launches.names.append(self.fn.__name__)
            launches.read.append(loads.count())
            launches.written.append(stores.count())
            return done

    def call(self: JITFunction, *args, **kwargs):
        """Triton's own library (``tl.sum``) is compiled code here, because Triton was imported for compiling."""
        return interpreter.InterpretedFunction(self.fn)(*args, **kwargs)

    made: dict[Callable, Counted] = {}
    with (
        mock.patch.object(choose, "interpreter", lambda function: made.setdefault(function, Counted(function))),
        mock.patch.object(JITFunction, "__call__", call),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        np.errstate(all="ignore"),
    ):
        yield launches
