"""What an operation's kernels would move over a whole schedule, counted on tensors without data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

from accel.kernels.choose import Kernel, Traffic


class Counts:
    """Launches, bytes read and bytes written, summed; calls of the operation."""

    def __init__(self) -> None:
        self.calls, self.sums = 0, (0, 0, 0)

    def add(self, moved: Traffic) -> None:
        self.calls += 1
        self.sums = tuple(one + other for one, other in zip(self.sums, moved, strict=True))


@contextlib.contextmanager
def counted(kernel: Kernel, traffic: Callable[..., Traffic]) -> Iterator[Counts]:
    """While open, counts what the kernel would do in the place of every call that plain torch serves."""
    counts, form = Counts(), kernel.torch_form

    def told(*args, **options):
        counts.add(traffic(*args, **options))
        return form(*args, **options)

    with mock.patch.object(kernel, "torch_form", told):
        yield counts
