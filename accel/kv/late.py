"""Numbers of tokens that the device knows first, and that the host gets all at once."""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor

from ..readback import Label, Readback


class LateCounts:
    """What came out in several layers and CFG branches: the first time the host asks for one, it gets all there are,
    in one transfer. Knows its counts weakly: they know it, and a run that ends in between leaves nothing behind."""

    def __init__(self) -> None:
        self._readback = Readback()
        self._new: list[tuple[ref[LateCount], Tensor]] = []
        self._sent: list[list[ref[LateCount]]] = []

    def add(self, number: Tensor) -> LateCount:
        """One more, ``[]`` of whole numbers."""
        count = LateCount(self)
        self._new.append((ref(count), number))
        return count

    def send(self) -> None:
        """Sends for what was added since the last time; what is queued from now on need not be waited for."""
        if self._new:
            counts, numbers = zip(*self._new, strict=True)
            self._readback.send(torch.stack(numbers), Label())
            self._sent.append(list(counts))
            self._new = []

    def receive(self) -> None:
        """Waits for everything."""
        self.send()
        for numbers, _ in self._readback.arrived(leave=0):
            for known, number in zip(self._sent.pop(0), numbers, strict=True):
                if (count := known()) is not None:
                    count.value = int(number)


class LateCount:
    """A number of tokens; ``int`` of it waits for the device if nobody has before."""

    def __init__(self, counts: LateCounts) -> None:
        self._counts, self.value = counts, None

    def __int__(self) -> int:
        if self.value is None:
            self._counts.receive()
        return self.value
