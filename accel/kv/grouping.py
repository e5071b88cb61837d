"""Head groups at work: a layer's one ring becomes two, in the memory it has, once it is known which heads look back.

The first block that pushes a latent frame out of the ring is measured, at its first forward, on what is stored; when it
is committed, every layer with near heads is divided. Near heads go on with the latest frames and their block, without
the sink, as Dummy Forcing's do (its sink heads, a third group, are full heads here). The others have the rest of the
layer as their ring and grow into it. Their ring is never longer than what the model was trained to look back
(``Layout.span``, less the sink): what is left then is given back to the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..readback import on_device
from .head_groups import HeadGroups, HeadGroupsConfig, classify, part_masses, ring_frames
from .ring import Layout, Ring
from .slots import PlainSlots


class HeadGrouping:
    """Which heads of one store are near heads, from when on, and the division of its rings.

    Args:
        config: see there. layers: transformer blocks. block: most latent frames denoised together. tile: most logits
            held at once while attention is measured.

    Attributes:
        groups: None until they are known. since: latent frames that were committed then.
    """

    def __init__(self, config: HeadGroupsConfig, layers: int, block: int, tile: int) -> None:
        self.config, self.groups, self.since = config, None, 0
        self._block, self._tile = block, tile
        self._masses: list[Tensor | None] = [None] * layers

    def measure(self, layer: int, layout: Layout, first: int, frames: int, queries: Tensor, keys: Tensor) -> None:
        """Remembers how much attention each head of the block ``[first, first + frames)`` gives to which part, if the
        block is the one to be measured.

        Args:
            queries: ``[B, n, heads, head_dim]``. keys: ``[B, places, heads, head_dim]``, all that is stored.
        """
        if self.groups is None and self.config.share > 0 and layout.pushed_out(first, frames):
            sides = queries.transpose(1, 2), keys.transpose(1, 2)
            parts = measured_parts(layout, first, frames)
            self._masses[layer] = part_masses(*sides, parts, self.config.sample, self._tile)

    def decide(self, committed: int) -> bool:
        """Whether all layers have been measured, so that ``groups`` are known from now on; one read from the device."""
        if self.groups is not None or any(masses is None for masses in self._masses):
            return False
        self.groups, self.since = classify(torch.stack(self._masses), self.config), committed
        self._masses = [None] * len(self._masses)
        return True

    def divide(self, layer: int, ring: Ring) -> list[Ring]:
        """The layer's rings, that of full heads first, in the memory of ``ring``, which is spent; ``ring`` itself where
        the layer has no near heads."""
        near, full = self.groups.near[layer], self.groups.full[layer]
        if not near:
            return [ring]
        layouts = group_layouts(ring.layout, len(near), len(full), self.config.near, self._block, self.since)
        heads = [on_device(group, ring.slots.keys.device, torch.int64) for group in (full, near)]
        parts = _moved(ring, layouts, heads, self.since)
        return [
            ring.part(layout, group, slots) for layout, group, slots in zip(layouts, heads, parts, strict=True)
            if len(group)
        ]  # fmt: skip

    def numbers(self) -> dict[str, Any] | None:
        """What ``load`` wants; None while nothing is known."""
        return None if self.groups is None else {"near": self.groups.near, "full": self.groups.full, "at": self.since}

    def load(self, numbers: Mapping[str, Any] | None) -> None:
        """Takes over what ``numbers`` gave."""
        if numbers is not None:
            near, full = (tuple(map(tuple, numbers[name])) for name in ("near", "full"))
            self.groups, self.since = HeadGroups(near, full), int(numbers["at"])


def measured_parts(layout: Layout, first: int, frames: int) -> list[list[tuple[int, int]]]:
    """Sink (the oldest latent frame where none is pinned), rest of history and block of a full ring, each as intervals
    of places in tokens."""
    block = {layout.slot(frame) for frame in range(first, first + frames)}
    sink = (set(range(layout.sink)) or {layout.slot(first + frames - layout.ring)}) - block
    middle = set(range(layout.whole_frames)) - sink - block
    return [layout.intervals(part) for part in (sink, middle, block)]


def group_layouts(layout: Layout, near_heads: int, full_heads: int, near: int, block: int, since: int) -> list[Layout]:
    """Rooms of a layer's full and near heads, together no more than its heads had in ``layout``.

    Args:
        near: committed latent frames near heads see. block: most frames of a block. since: frames committed so far, of
            which the rings begin with the latest.
    """
    tokens, sink, span = layout.tokens, layout.sink, layout.span
    room, latest = min(near + block, layout.ring), min(near, layout.ring)
    frames = ring_frames(layout.whole_frames, near_heads + full_heads, near_heads, 0, room)
    ring = min(frames, max(span, layout.whole_frames)) - sink
    return [
        Layout(tokens, sink, ring, 0, span, gone=since - sink - layout.ring),
        Layout(tokens, 0, room, 0, span, gone=since - latest),
    ]


def _moved(ring: Ring, layouts: Sequence[Layout], heads: Sequence[Tensor], since: int) -> list[PlainSlots]:
    """The keys and values of full and near heads as two pieces of the layer's own allocation, ``ring`` being spent."""
    sides, ring.slots = [ring.slots.keys, ring.slots.values], None
    width = sides[0].shape[3]
    shapes = [(layout.places, len(group), width) for layout, group in zip(layouts, heads, strict=True)]
    edge, end = math.prod(shapes[0]), math.prod(shapes[0]) + math.prod(shapes[1])
    flats = [_packed(sides, ring.layout, shapes[0], heads, since, since - layouts[1].gone, end) for _ in range(2)]
    full = [flat[:, :edge].unflatten(1, shapes[0]) for flat in flats]
    near = [flat[:, edge:end].unflatten(1, shapes[1]) for flat in flats]
    spare = sum(flat.nbytes for flat in flats) - sum(piece.nbytes for piece in (*full, *near))
    return [PlainSlots.of(*full), PlainSlots.of(*near, spare)]


def _packed(
    sides: list[Tensor], old: Layout, shape: tuple[int, int, int], heads: Sequence[Tensor], since: int, latest: int,
    end: int,
) -> Tensor:  # fmt: skip
    """Takes the first of ``sides`` and gives it back as ``[B, numbers]``: those of the full heads ``shape``, then those
    of the near ones, used up to ``end``.

    The ring is turned until its oldest frame comes first; the ``latest`` frames of near heads are set aside; then the
    full heads' tokens move together, frame by frame, towards the start, so that none is overwritten before it has
    moved. This takes no more beside the allocation than the larger of a latent frame and what near heads keep. What
    the rings leave is freed by way of main memory, so that the device never holds old and new.
    """
    (full, near), tokens, side = heads, old.tokens, sides.pop(0)
    _rotate(side.unflatten(1, (-1, tokens))[:, old.sink :], old.slot(since - old.ring) - old.sink)
    kept = side[:, (old.whole_frames - latest) * tokens :].index_select(2, near).flatten(1)
    flat, edge = side.flatten(1), math.prod(shape)
    into = flat[:, :edge].unflatten(1, shape)
    for start in range(0, old.places, tokens):
        places = slice(start, start + tokens)
        into[:, places] = side[:, places].index_select(2, full)
    flat[:, edge : edge + kept.shape[1]] = kept
    least = max(len(full), 1) * tokens * side.shape[3]
    if flat.shape[1] - end < least:
        return flat
    device, held = flat.device, flat[:, :end].to("cpu", copy=True)
    del side, flat, into
    return held.to(device)


def _rotate(x: Tensor, by: int) -> None:
    """``x[:, i]`` becomes what ``x[:, (i + by) % n]`` was, in place, with one item set aside."""
    count, held = x.shape[1], torch.empty_like(x[:, 0])
    for start in range(math.gcd(by, count) if by else 0):
        held.copy_(x[:, start])
        place = start
        while (source := (place + by) % count) != start:
            x[:, place] = x[:, source]
            place = source
        x[:, place] = held
