"""Small results on their way from the device to the host, so that no step waits for them."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """Sends vectors to the host and hands them over once they are there.

    On CUDA a copy into pinned memory is queued behind the work that makes the numbers, and an event says when it is
    done; on other devices the numbers are read when they are asked for.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, torch.cuda.Event | None, list[int]]] = []

    def send(self, values: Tensor, label: list[int]) -> None:
        """Queues ``values`` ``[n]``; ``label`` comes back with them and may be filled in later."""
        if not values.is_cuda:
            self._sent.append((values, None, label))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent.append((host, event, label))

    def arrived(self, wait: bool = False) -> list[tuple[list[float], list[int]]]:
        """What is there by now, oldest first; ``wait`` blocks until everything is."""
        found = []
        while self._sent:
            values, event, label = self._sent[0]
            if event is not None and not event.query():
                if not wait:
                    break
                event.synchronize()
            del self._sent[0]
            found.append((values.tolist(), label))
        return found
