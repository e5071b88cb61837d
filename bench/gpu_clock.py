"""Time, waits and memory of works on a device: CUDA events on a GPU; process time and counting on a CPU.

Works are timed in turn, one of each a round, so that clocks and heat treat them alike; their ratio is the median over
rounds. A work is given the number of its round, so that it can take other buffers than the round before.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Work = Callable[[int], Any]
LOAD = (8192, 8)  # side of a matrix product and how many of them keep a GPU busy while a step is queued behind


class Clock(Protocol):
    """Seconds that a work takes, by three readings of one device."""

    def device(self, work: Callable[[], Any]) -> float:
        """Between two marks in the device's queue, waits for the host included."""
        ...

    def queued(self, work: Callable[[], Any]) -> float:
        """The same behind other work, as after a forward: the host runs ahead and only the device's time counts."""
        ...

    def wall(self, work: Callable[[], Any]) -> float:
        """From an idle device to an idle device, the host's time included."""
        ...


class ProcessClock:
    """Process time, for a CPU."""

    def device(self, work: Callable[[], Any]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    queued = wall = device


class EventClock:
    """CUDA events and, for ``wall``, the host's clock around a device that stands still."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._load = device, None

    def device(self, work: Callable[[], Any]) -> float:
        torch.cuda.synchronize(self._device)
        return self._between(work)

    def queued(self, work: Callable[[], Any]) -> float:
        side, products = LOAD
        if self._load is None:
            self._load = torch.randn(3, side, side, device=self._device, dtype=torch.bfloat16)
        torch.cuda.synchronize(self._device)
        for _ in range(products):
            torch.mm(self._load[0], self._load[1], out=self._load[2])
        return self._between(work)

    def wall(self, work: Callable[[], Any]) -> float:
        torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - started

    @staticmethod
    def _between(work: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Pace:
    """The time a part has. ``now`` is another clock for tests."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._now = seconds, now
        self._end = now() + seconds

    @property
    def left(self) -> float:
        return self._end - self._now()

    def demand(self, what: str, seconds: float = 0.0) -> None:
        """Stops the part where less than ``seconds`` of its time are left.

        Raises:
            TimeoutError: naming what could not begin.
        """
        if self.left <= seconds:
            raise TimeoutError(f"of the part's {self.seconds:.0f} s too few were left for: {what}")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of every work, round by round."""

    seconds: Mapping[str, list[float]]

    @property
    def rounds(self) -> int:
        return min(map(len, self.seconds.values()))

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def ratio(self, above: str, below: str) -> float:
        """Median over rounds of one work's time over another's in the same round."""
        return median(a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True))


def in_turn(
    measure: Callable[[Callable[[], Any]], float], works: Mapping[str, Work], rounds: int, warmup: int, pace: Pace,
    repeats: int = 1,
) -> Times:  # fmt: skip
    """Times ``works`` in turn.

    Args:
        measure: a reading of a ``Clock``. rounds: as many, or as the pace allows, at least one. warmup: rounds before,
            not counted. repeats: how often a work runs for one reading, each time with another number.

    Raises:
        TimeoutError: the part's time is over already.
    """
    pace.demand(", ".join(works))
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warmup + rounds):
        before = pace.left
        for name, work in works.items():
            first = number * repeats
            taken = measure(lambda work=work, first=first: [work(first + index) for index in range(repeats)])
            if number >= warmup:
                seconds[name].append(taken / repeats)
        if number >= warmup and pace.left < before - pace.left:
            break
    return Times(seconds)


def syncs(device: torch.device, work: Callable[[], Any]) -> int:
    """How often the host waits for the device in ``work``; on a CPU, how often a tensor is read as a number."""
    if device.type != "cuda":
        with _Reads() as counted:
            work()
        return counted.total
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """Most bytes allocated at once while ``work`` runs, beyond what there was before."""
    if device.type != "cuda":
        with _Live() as counted:
            work()
        return counted.peak
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _Reads(TorchDispatchMode):
    """Counts tensors read as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.total += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        return function(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):
    """Bytes of the storages that were made inside and still live, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in given:
                    self._known[storage._cdata] = storage.nbytes()
                    self._now += storage.nbytes()
                    self.peak = max(self.peak, self._now)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key: int) -> None:
        self._now -= self._known.pop(key, 0)
