"""Where the keys and values of one layer lie: as the model makes them, as 8-bit integers, or partly in main memory.

A place is a token index ``[start, end)`` of a fixed allocation. Reading gives the first tokens up to a number, because
a store fills from the start; what is not there as it is gets widened, or fetched, into a scratch that layers share.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

LEVELS = 127  # of a signed byte


class Slots(Protocol):
    """A fixed allocation of keys and values ``[B, tokens, heads, head_dim]``."""

    nbytes: int

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Puts ``[B, n, heads, head_dim]`` at the places ``[start, start + n)``."""
        ...

    def read(self, end: int) -> tuple[Tensor, Tensor]:
        """The first ``end`` keys and values, to be used before the next read of any layer."""
        ...

    def part(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of ``[start, end)``."""
        ...

    def write_time(self, start: int, time: Tensor) -> None:
        """Replaces the leading channels ``[B, n, heads, channels]`` of the keys from ``start`` on by turned ones."""
        ...

    def time(self, start: int, end: int, channels: int) -> Tensor | None:
        """The leading channels of the keys of ``[start, end)`` as they lie, to be changed in place; None where they do
        not lie as they are read, so that ``write_time`` has to be used."""
        ...

    def fetch(self, end: int) -> None:
        """A read of the first ``end`` is about to come, after one of another layer."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name, as it is."""
        ...


class PlainSlots:
    """Keys and values in the dtype the model makes them in; reading gives views.

    Args:
        like: a tensor ``[B, n, heads, head_dim]`` for batch, heads, width, dtype and device. tokens: places.
    """

    def __init__(self, like: Tensor, tokens: int) -> None:
        shape = (like.shape[0], tokens, *like.shape[2:])
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.nbytes = self.keys.nbytes + self.values.nbytes

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, spare: int = 0) -> PlainSlots:
        """Slots that lie in tensors made before; ``spare``: bytes beside them that nothing else counts."""
        slots = cls.__new__(cls)
        slots.keys, slots.values, slots.nbytes = keys, values, keys.nbytes + values.nbytes + spare
        return slots

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        self.keys[:, start : start + keys.shape[1]] = keys
        self.values[:, start : start + keys.shape[1]] = values

    def read(self, end: int) -> tuple[Tensor, Tensor]:
        return self.keys[:, :end], self.values[:, :end]

    def part(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        return self.keys[:, start:end], self.values[:, start:end]

    def write_time(self, start: int, time: Tensor) -> None:
        self.keys[:, start : start + time.shape[1], :, : time.shape[3]] = time

    def time(self, start: int, end: int, channels: int) -> Tensor | None:
        return self.keys[:, start:end, :, :channels]

    def fetch(self, end: int) -> None:
        """Nothing to do: all is there."""

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "values": self.values}


class Scratch:
    """One buffer for the widened keys and values of whichever layer is being read."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    def pair(self, like: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Two tensors ``[B, tokens, heads, head_dim]``; they are overwritten by the next layer's."""
        shape = (2, like.shape[0], tokens, *like.shape[2:])
        if self._buffer is None or self._buffer.shape != shape:
            self._buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        return self._buffer[0], self._buffer[1]


class ByteSlots:
    """Keys and values as signed bytes with one float16 scale a token and head.

    A key's scale comes from the lengths of its channel pairs, which no rotation changes, so turned time channels keep
    it. Reading widens into ``scratch``.
    """

    def __init__(self, like: Tensor, tokens: int, scratch: Scratch) -> None:
        shape = (like.shape[0], tokens, *like.shape[2:])
        self._like, self._tokens, self._scratch = like[:, :0], tokens, scratch
        self._bytes = torch.zeros((2, *shape), dtype=torch.int8, device=like.device)
        self._scales = torch.zeros((2, *shape[:-1], 1), dtype=torch.float16, device=like.device)
        self.nbytes = self._bytes.nbytes + self._scales.nbytes

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        places = slice(start, start + keys.shape[1])
        for index, (given, length) in enumerate(((keys, _pair_length(keys)), (values, values.float().abs()))):
            scale = (length.amax(-1, keepdim=True) / LEVELS).half()
            self._scales[index, :, places] = scale
            self._bytes[index, :, places] = _rounded(given, scale)

    def read(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :end] for buffer in self._scratch.pair(self._like, self._tokens))
        for index, target in enumerate((keys, values)):
            target.copy_(self._bytes[index, :, :end])
            target.mul_(self._scales[index, :, :end])
        return keys, values

    def part(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        wide = (self._bytes[:, :, start:end] * self._scales[:, :, start:end].float()).to(self._like.dtype)
        return wide[0], wide[1]

    def write_time(self, start: int, time: Tensor) -> None:
        places = slice(start, start + time.shape[1])
        self._bytes[0, :, places, :, : time.shape[3]] = _rounded(time, self._scales[0, :, places])

    def time(self, start: int, end: int, channels: int) -> Tensor | None:
        return None

    def fetch(self, end: int) -> None:
        """Nothing to do: bytes are widened when they are read."""

    def tensors(self) -> dict[str, Tensor]:
        return {"bytes": self._bytes, "scales": self._scales}


class Fetching:
    """Two scratches in turn, so that one layer's middle travels while another layer attends."""

    def __init__(self) -> None:
        self._scratches, self._turn, self._stream = (Scratch(), Scratch()), 0, None

    @property
    def nbytes(self) -> int:
        return sum(scratch.nbytes for scratch in self._scratches)

    def start(self, source: tuple[Tensor, Tensor], like: Tensor, front: int, places: int) -> tuple:
        """Copies pinned ``source`` behind ``front`` places of the next scratch; returns what ``finish`` wants."""
        self._turn = 1 - self._turn
        pair = self._scratches[self._turn].pair(like, places)
        if like.device.type != "cuda":
            self._copy(pair, source, front)
            return pair, None
        self._stream = self._stream or torch.cuda.Stream(like.device)
        self._stream.wait_stream(torch.cuda.current_stream(like.device))
        with torch.cuda.stream(self._stream):
            self._copy(pair, source, front)
            return pair, self._stream.record_event()

    @staticmethod
    def finish(travelling: tuple) -> tuple[Tensor, Tensor]:
        """The scratch, once everything has arrived."""
        pair, arrived = travelling
        if arrived is not None:
            torch.cuda.current_stream(pair[0].device).wait_event(arrived)
        return pair

    @staticmethod
    def _copy(pair: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor], front: int) -> None:
        for target, given in zip(pair, source, strict=True):
            target[:, front : front + given.shape[1]].copy_(given, non_blocking=True)


class SplitSlots:
    """The first places on the device, the others in main memory (pinned where the device is a GPU).

    Args:
        like, tokens: as in ``PlainSlots``. front: places on the device. fetching: shared by all layers.
    """

    def __init__(self, like: Tensor, tokens: int, front: int, fetching: Fetching) -> None:
        self._front, self._count, self._places, self._fetching = PlainSlots(like, front), front, tokens, fetching
        shape, pinned = (like.shape[0], tokens - front, *like.shape[2:]), like.device.type == "cuda"
        self._back = tuple(torch.zeros(shape, dtype=like.dtype, pin_memory=pinned) for _ in range(2))
        self._like, self._travelling = like[:, :0], None
        self.nbytes = self._front.nbytes
        self.host_bytes = sum(side.nbytes for side in self._back)

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        if start < self._count:
            self._front.write(start, keys, values)
            return
        start, self._travelling = start - self._count, None
        for side, given in zip(self._back, (keys, values), strict=True):
            side[:, start : start + given.shape[1]] = given.to(side.device)

    def read(self, end: int) -> tuple[Tensor, Tensor]:
        if end <= self._count:
            return self._front.read(end)
        if self._travelling is None:
            self.fetch(end)
        pair, self._travelling = self._fetching.finish(self._travelling), None
        for target, given in zip(pair, self._front.read(self._count), strict=True):
            target[:, : self._count] = given
        return pair[0][:, :end], pair[1][:, :end]

    def part(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        if end <= self._count:
            return self._front.part(start, end)
        places = slice(start - self._count, end - self._count)
        return tuple(side[:, places].to(self._like.device) for side in self._back)

    def write_time(self, start: int, time: Tensor) -> None:
        if start < self._count:
            self._front.write_time(start, time)
            return
        start, self._travelling = start - self._count, None
        self._back[0][:, start : start + time.shape[1], :, : time.shape[3]] = time.to(self._back[0].device)

    def time(self, start: int, end: int, channels: int) -> Tensor | None:
        return self._front.time(start, end, channels) if end <= self._count else None

    def fetch(self, end: int) -> None:
        if end > self._count:
            source = tuple(side[:, : end - self._count] for side in self._back)
            self._travelling = self._fetching.start(source, self._like, self._count, self._places)

    def tensors(self) -> dict[str, Tensor]:
        back = {"back keys": self._back[0], "back values": self._back[1]}
        return self._front.tensors() | back


def _pair_length(keys: Tensor) -> Tensor:
    return keys.float().unflatten(-1, (-1, 2)).norm(dim=-1)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    steps = (x.float() / scale.float().clamp_min(1e-12)).round()
    return steps.clamp(-LEVELS, LEVELS).to(torch.int8)
