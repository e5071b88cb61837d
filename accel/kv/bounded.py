"""A K/V store of fixed size for rollouts of any length, as a causal model's attention sees it.

A block's first forward makes room (what is pushed out goes to the rule of the middle); every forward of it writes the
block's keys and values and attends over what is stored; only a commit makes the block history. So a skipped forward
leaves the bookkeeping exactly as the forward would have. One store serves one CFG branch.

Positions: the model is told where a block starts (``begin``), a small number however long the video is: once it passes
``LONGEST_POSITION``, what is stored is turned back by as much as the video has moved on. The ring is shorter than the
distance between two such turns, so a latent frame lives through one at most.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .ring import Layout, Ring
from .rotary import TimeRotary
from .slots import PlainSlots, Slots
from .tokens import Middle

LONGEST_POSITION = 240
"""Latent frames; bfloat16 counts to 256, and that is what some models compute their rotations in."""


class Attention(Protocol):
    """Attends over stored keys; see ``accel.attention``."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, always: Sequence[tuple[int, int]],
        fresh: bool,
    ) -> Tensor: ...  # fmt: skip


class BoundedStore:
    """Rotated keys and plain values of every layer in one allocation a layer, made at its first forward.

    Args:
        layers: transformer blocks. layout: room of each. rotary: how time turns keys. attention: what attends.
        middle: rule for what leaves the ring; None forgets it. make: makes an allocation.
    """

    def __init__(
        self, layers: int, layout: Layout, rotary: TimeRotary, attention: Attention, middle: Middle | None = None,
        make: Callable[[Tensor, int], Slots] = PlainSlots,
    ) -> None:  # fmt: skip
        if layers < 1:
            raise ValueError(f"BoundedStore: {layers} layers; use 1 or more.")
        self.layout, self.frames, self._base = layout, 0, 0
        self._block: tuple[int, int] | None = None
        self._unopened: set[int] = set()
        self._rings: list[Ring | None] = [None] * layers
        self._saved: dict[int, tuple[Mapping[str, Tensor], Mapping[str, int]]] = {}
        self._rotary, self._attention, self._middle, self._make = rotary, attention, middle, make

    @property
    def nbytes(self) -> int:
        """Bytes allocated, bookkeeping included."""
        return sum(ring.nbytes for ring in self._rings if ring is not None)

    @property
    def keys(self) -> float:
        """Tokens that a query of the open block reads, the mean over layers."""
        frames = self.frames if self._block is None else sum(self._block)
        rings = [ring for ring in self._rings if ring is not None]
        if not rings:
            return float(min(frames, self.layout.whole_frames) * self.layout.tokens)
        return sum(ring.filled(frames) for ring in rings) / len(rings)

    def begin(self, first: int, frames: int) -> int:
        """A forward of the block ``[first, first + frames)`` follows; returns the position of its first latent frame.

        Raises:
            ValueError: the block is longer than the ring, or does not follow the committed frames.
        """
        if self._block == (first, frames):
            return first - self._base
        if first != self.frames:
            raise ValueError(f"K/V store: block starts at latent frame {first}, but {self.frames} are committed.")
        if frames > self.layout.ring:
            raise ValueError(
                f"K/V store: a block of {frames} latent frames does not fit the {self.layout.ring} that the budget "
                "leaves beside the sink; use a larger K/V budget or smaller blocks."
            )
        self._block, self._unopened = (first, frames), set(range(len(self._rings)))
        if first + frames - self._base > max(LONGEST_POSITION, self.layout.span):
            moved = first + frames - self.layout.span - self._base
            for ring in self._rings:
                if ring is not None:
                    ring.shift(self.frames, moved)
            self._base += moved
        return first - self._base

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the block over what is stored and itself.

        Args:
            layer: index of the transformer block. queries, keys, values: ``[B, n, heads, head_dim]``, rotated.

        Returns:
            ``[B, n, heads, head_dim]``.
        """
        first, frames = self._block
        ring = self._ring(layer, keys)
        fresh = layer in self._unopened
        if fresh:
            self._unopened.discard(layer)
            ring.open(layer, first, frames, self._base, queries)
        ring.write(first, keys, values)
        stored_keys, stored_values, bias = ring.read(first + frames)
        self._fetch(layer + 1, first + frames)
        return self._attention(layer, queries, stored_keys, stored_values, bias, self._always(first, frames), fresh)

    def commit(self) -> None:
        """The forward just made was of clean frames, which are history now."""
        first, frames = self._block
        for ring in self._rings:
            if ring is not None:
                ring.remember_sink(first, frames, self._base)
        self.frames, self._block = first + frames, None

    def shrink(self, layout: Layout, block: int) -> None:
        """Keeps less from now on; a block that was begun has to be begun anew. One layer is held twice for a moment."""
        self.layout, self._block = layout, None
        for ring in self._rings:
            if ring is not None:
                ring.shrink(layout, self.frames, block)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, between two blocks."""
        named = {f"{index}.{key}": value for index, ring in self._present() for key, value in ring.tensors().items()}
        numbers = {str(index): ring.numbers() for index, ring in self._present()}
        told = {"frames": self.frames, "base": self._base, "rings": numbers}
        if hasattr(self._middle, "state"):
            named |= {f"middle.{key}": value for key, value in self._middle.state().items()}
        return named | {"numbers": torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over, before the first forward, what ``state`` of a store with the same layout gave; host tensors will
        do: each layer takes its own at its first forward."""
        told = json.loads(bytes(state["numbers"].cpu().tolist()))
        self.frames, self._base = int(told["frames"]), int(told["base"])
        self._saved = {
            int(layer): (
                {key.split(".", 1)[1]: value for key, value in state.items() if key.startswith(f"{layer}.")},
                numbers,
            )
            for layer, numbers in told["rings"].items()
        }
        if hasattr(self._middle, "load"):
            own = {key.removeprefix("middle."): value for key, value in state.items() if key.startswith("middle.")}
            self._middle.load(own)

    def _ring(self, layer: int, like: Tensor) -> Ring:
        """The layer's, made at its first forward."""
        if self._rings[layer] is None:
            ring = self._rings[layer] = Ring(self.layout, like, self._make, self._rotary, self._middle)
            if layer in self._saved:
                ring.load(*self._saved.pop(layer))
        return self._rings[layer]

    def _fetch(self, layer: int, frames: int) -> None:
        """Sends for what the next layer keeps in main memory, unless it is going to change before it is read."""
        if layer < len(self._rings) and self._rings[layer] is not None and layer not in self._unopened:
            self._rings[layer].fetch(frames)

    def _present(self) -> list[tuple[int, Ring]]:
        return [(index, ring) for index, ring in enumerate(self._rings) if ring is not None]

    def _always(self, first: int, frames: int) -> list[tuple[int, int]]:
        """Places that every query sees under sparse attention: the sink, the last committed frame, the block."""
        layout, tokens = self.layout, self.layout.tokens
        pinned = min(first + frames, layout.sink)
        slots = {*range(pinned), *(layout.slot(frame) for frame in range(max(first - 1, 0), first + frames))}
        return [(start * tokens, end * tokens) for start, end in _runs(sorted(slots))]


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found
