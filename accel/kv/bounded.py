"""A K/V store of fixed size for rollouts of any length, as a causal model's attention sees it.

A block's first forward makes room (what is pushed out goes to the rule of the middle); every forward of it writes the
block's keys and values and attends over what is stored; only a commit makes the block history. So a skipped forward
leaves the bookkeeping exactly as the forward would have. One store serves one CFG branch. A layer has one ring, or two
where its heads are grouped (``grouping``).

No layer reads from the device. Where a rule's outcome decides how many tokens a layer keeps (``EarlyMiddle``), all
layers make room before the block's first forward, and their numbers come in one read a block.

Positions: the model is told where a block starts (``begin``), a small number however long the video is: once it passes
``LONGEST_POSITION``, what is stored is turned back by as much as the video has moved on. The ring is shorter than the
distance between two such turns, so a latent frame lives through one at most.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..readback import on_device
from .grouping import HeadGrouping
from .ring import Layout, Ring
from .rotary import TimeRotary
from .slots import PlainSlots, Slots
from .tokens import EarlyMiddle, Middle

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
        middle: rule for what leaves the ring; None forgets it. make: makes an allocation. grouping: finds heads that
            need little history; it wants ``PlainSlots`` and no middle.
    """

    def __init__(
        self, layers: int, layout: Layout, rotary: TimeRotary, attention: Attention, middle: Middle | None = None,
        make: Callable[[Tensor, int], Slots] = PlainSlots, grouping: HeadGrouping | None = None,
    ) -> None:  # fmt: skip
        if layers < 1:
            raise ValueError(f"BoundedStore: {layers} layers; use 1 or more.")
        self.layout, self.frames, self._base = layout, 0, 0
        self._block: tuple[int, int] | None = None
        self._unopened: set[int] = set()
        self._rings: list[Ring | None] = [None] * layers
        self._near: dict[int, Ring] = {}  # of layers with two rings, the near heads'
        self._saved: dict[str, tuple[Mapping[str, Tensor], Mapping[str, int]]] = {}
        self._owed = 0  # positions that what is saved has yet to be turned back by
        self._rotary, self._attention, self._middle, self._make = rotary, attention, middle, make
        self._grouping, self._early = grouping, isinstance(middle, EarlyMiddle)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, bookkeeping included."""
        return sum(ring.nbytes for ring in self._present().values())

    @property
    def keys(self) -> float:
        """Tokens that a query of the open block reads, the mean over layers and heads."""
        frames = self.frames if self._block is None else sum(self._block)
        rings = self._present().values()
        if not rings:
            return float(self.layout.held(frames) * self.layout.tokens)
        return sum(ring.filled(frames) * ring.width for ring in rings) / sum(ring.width for ring in rings)

    @property
    def grouping(self) -> HeadGrouping | None:
        """Which heads keep what, where heads are grouped."""
        return self._grouping

    @property
    def full_frames(self) -> list[int]:
        """Latent frames that heads with all their history have room for, layer by layer; of layers that have run and
        have such heads."""
        groups = self._grouping and self._grouping.groups
        rings = [self._rings[layer] for layer in range(len(self._rings)) if groups is None or groups.full[layer]]
        return [ring.layout.whole_frames for ring in rings if ring is not None]

    def begin(self, first: int, frames: int) -> int:
        """A forward of the block ``[first, first + frames)`` follows; returns the position of its first latent frame.

        Raises:
            ValueError: the block is longer than the ring, or does not follow the committed frames.
        """
        if self._block == (first, frames):
            return first - self._base
        if first != self.frames:
            raise ValueError(f"K/V store: block starts at latent frame {first}, but {self.frames} are committed.")
        room = min((ring.layout.ring for ring in self._present().values()), default=self.layout.ring)
        if frames > room:
            raise ValueError(
                f"K/V store: a block of {frames} latent frames does not fit the {room} that the budget "
                "leaves beside the sink; use a larger K/V budget or smaller blocks."
            )
        self._block, self._unopened = (first, frames), set(range(len(self._rings)))
        if first + frames - self._base > max(LONGEST_POSITION, self.layout.span):
            moved = first + frames - self.layout.span - self._base
            for ring in self._present().values():
                ring.shift(self.frames, moved)
            self._base, self._owed = self._base + moved, self._owed + moved if self._saved else 0
        self._open_early(range(len(self._rings)))
        return first - self._base

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the block over what is stored and itself.

        Args:
            layer: index of the transformer block. queries, keys, values: ``[B, n, heads, head_dim]``, rotated.

        Returns:
            ``[B, n, heads, head_dim]``.
        """
        ring, fresh = self._ring(layer, keys), layer in self._unopened
        self._unopened.discard(layer)
        if layer not in self._near:
            return self._read(layer, ring, queries, keys, values, fresh)
        out = torch.empty_like(queries)
        for place, part in ((layer, ring), (layer + len(self._rings), self._near[layer])):
            sides = (side.index_select(2, part.heads) for side in (queries, keys, values))
            out.index_copy_(2, part.heads, self._read(place, part, *sides, fresh))
        return out

    def open(self) -> None:
        """Makes room for the block that was begun in all layers at once, instead of in each one's first ``attend``;
        only where nothing has to be known of its queries: no middle, no groups of heads, and every layer has run."""
        first, frames = self._block
        for layer in sorted(self._unopened):
            self._rings[layer].open(layer, first, frames, self._base, None)
        self._unopened.clear()

    def places(self, device: torch.device) -> Tensor:
        """Where the tokens of the block that was begun lie in every layer, int64 ``[n]``."""
        first, frames = self._block
        starts = [self.layout.slot(frame) * self.layout.tokens for frame in range(first, first + frames)]
        return (on_device(starts, device)[:, None] + torch.arange(self.layout.tokens, device=device)).flatten()

    def slots(self, layer: int) -> Slots | None:
        """The allocation of a layer; None before its first forward."""
        ring = self._rings[layer]
        return None if ring is None else ring.slots

    def commit(self) -> None:
        """The forward just made was of clean frames, which are history now."""
        first, frames = self._block
        for ring in self._present().values():
            ring.remember_sink(first, frames, self._base)
        self.frames, self._block = first + frames, None
        if self._grouping is not None and self._grouping.decide(self.frames):
            for layer in range(len(self._rings)):
                self._divide(layer)

    def shrink(self, layout: Layout, block: int) -> None:
        """Keeps less from now on; a block that was begun has to be begun anew. One layer is held twice for a moment."""
        self.layout, self._block = layout, None
        for ring in self._rings:
            if ring is not None:
                ring.shrink(layout, self.frames, block)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, between two blocks."""
        rings = self._present()
        named = {f"{name}.{key}": value for name, ring in rings.items() for key, value in ring.tensors().items()}
        numbers = {name: ring.numbers() for name, ring in rings.items()}
        told = {"frames": self.frames, "base": self._base, "rings": numbers}
        if self._grouping is not None:
            told["groups"] = self._grouping.numbers()
        if hasattr(self._middle, "state"):
            named |= {f"middle.{key}": value for key, value in self._middle.state().items()}
        return named | {"numbers": torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over, before the first forward, what ``state`` of a store with the same layout gave; host tensors will
        do: the first forward of a layer hands each its own."""
        told = json.loads(bytes(state["numbers"].cpu().tolist()))
        self.frames, self._base = int(told["frames"]), int(told["base"])
        self._saved = {
            name: (
                {key.split(".", 1)[1]: value for key, value in state.items() if key.startswith(f"{name}.")},
                numbers,
            )
            for name, numbers in told["rings"].items()
        }
        if self._grouping is not None:
            self._grouping.load(told["groups"])
        if hasattr(self._middle, "load"):
            own = {key.removeprefix("middle."): value for key, value in state.items() if key.startswith("middle.")}
            self._middle.load(own)

    def _ring(self, layer: int, like: Tensor) -> Ring:
        """The layer's, made at its first forward; after ``load`` all are, so that they can make room together."""
        if self._rings[layer] is None:
            made = {layer, *(int(name.split()[0]) for name in self._saved)}
            for one in sorted(made):
                self._make_ring(one, like)
            self._open_early(made)
        return self._rings[layer]

    def _make_ring(self, layer: int, like: Tensor) -> None:
        """The layer's ring or rings, as new or as they were saved."""
        self._rings[layer] = Ring(self.layout, like, self._make, self._rotary, self._middle)
        if self._grouping is not None and self._grouping.groups is not None:
            self._divide(layer)
        for name, ring in ((str(layer), self._rings[layer]), (f"{layer} near", self._near.get(layer))):
            if name in self._saved:
                ring.load(*self._saved.pop(name))
                if self._owed:
                    ring.shift(self.frames, self._owed)

    def _open_early(self, layers: Iterable[int]) -> None:
        """Makes room for the block in those of ``layers`` that have a ring, if the rule asks no queries."""
        if self._early:
            for layer in layers:
                if self._rings[layer] is not None:
                    self._rings[layer].open(layer, *self._block, self._base, None)

    def _divide(self, layer: int) -> None:
        """Gives the groups of a layer's heads a ring each."""
        self._rings[layer], *near = self._grouping.divide(layer, self._rings[layer])
        if near:
            self._near[layer] = near[0]

    def _read(self, place: int, ring: Ring, queries: Tensor, keys: Tensor, values: Tensor, fresh: bool) -> Tensor:
        """Attention of the heads of one ring; ``place`` tells it from all others."""
        first, frames = self._block
        if fresh and not self._early:
            ring.open(place, first, frames, self._base, queries)
        ring.write(first, keys, values)
        stored_keys, stored_values, bias = ring.read(first + frames)
        self._fetch(place + 1, first + frames)
        if fresh and self._grouping is not None:
            self._grouping.measure(place, ring.layout, first, frames, queries, stored_keys)
        return self._attention(
            place, queries, stored_keys, stored_values, bias, ring.layout.always(first, frames), fresh
        )  # fmt: skip

    def _fetch(self, layer: int, frames: int) -> None:
        """Sends for what the next layer keeps in main memory, unless it is going to change before it is read."""
        if layer < len(self._rings) and self._rings[layer] is not None and layer not in self._unopened:
            self._rings[layer].fetch(frames)

    def _present(self) -> dict[str, Ring]:
        """The rings there are, by name: a layer's number, with ``near`` for the second one."""
        rings = {str(layer): ring for layer, ring in enumerate(self._rings) if ring is not None}
        return rings | {f"{layer} near": ring for layer, ring in self._near.items()}
