"""Small numbers on their way between host and device, so that neither waits for the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def alongside(device: torch.device) -> bool:
    """Whether copies from this device to the host run beside its work."""
    return device.type == "cuda"


def on_device(values: Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of host numbers on the device; the host does not wait until the device takes it, as
    ``torch.tensor(values, device=device)`` would."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass(slots=True)
class Label:
    """What a vector is about.

    Attributes:
        signals: how many of its first numbers are increments of signals.
        checked: records of the timeline that what follows them (a flag whether a forward was finite, an error a record,
            what the quality target learns) is about; may be filled in later.
    """

    signals: int = 0
    checked: list[int] = field(default_factory=list)


class Readback:
    """Sends vectors to the host and hands them over once they are there.

    On CUDA a copy into pinned memory is queued behind the work that makes the numbers, and an event says when it is
    done; on other devices the numbers are read when they are asked for.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, torch.cuda.Event | None, Label]] = []

    def send(self, values: Tensor, label: Label) -> None:
        """Queues ``values`` ``[n]``; ``label`` comes back with them."""
        if not alongside(values.device):
            self._sent.append((values, None, label))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent.append((host, event, label))

    def arrived(self, leave: int | None = None) -> list[tuple[list[float], Label]]:
        """Vectors not handed over before, oldest first.

        Args:
            leave: how many of the newest are left for later; all others are waited for, in one go. None waits for
                nothing and hands over what is there by now.
        """
        count = len(self._sent) - (leave or 0)
        if count < 1:
            return []
        if leave is None:
            count = next((n for n, (_, event, _) in enumerate(self._sent) if event and not event.query()), count)
        elif (event := self._sent[count - 1][1]) is not None:
            event.synchronize()  # the older ones lie before it on the same stream
        taken, self._sent = self._sent[:count], self._sent[count:]
        return [(values.tolist(), label) for values, _, label in taken]
