"""One layer's K/V of a rollout of any length: pinned first frames, a ring of the latest, a compressed middle.

The places of a layer lie in one allocation, ``[sink | ring | middle]``, and fill from the start, so attention always
reads one contiguous piece. A block being denoised writes where the frames it pushes out lay; nothing is ever moved.
Keys carry their rotations, so their order does not matter.

Frames far behind would stand further back in time than the model was trained to see. Those of the sink and the middle
are therefore turned anew for each block, from their unturned time channels, so that none is more than ``span`` latent
frames older than the newest; frames of the ring are within it anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .frozen import runs
from .rotary import TimeRotary
from .slots import Slots
from .tokens import Middle, Tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """What a layer has room for.

    Attributes:
        tokens: of a latent frame. sink, ring: latent frames. middle: tokens. span: latent frames, the oldest distance.
        gone: latent frames after the sink that were dropped before this ring began; those after them are its first.
    """

    tokens: int
    sink: int
    ring: int
    middle: int
    span: int
    gone: int = 0

    def __post_init__(self) -> None:
        if min(self.tokens, self.ring, self.span) < 1 or min(self.sink, self.middle, self.gone) < 0:
            raise ValueError(f"Layout: tokens, ring and span must be 1 or more, all else 0 or more, got {self}.")

    @property
    def whole_frames(self) -> int:
        return self.sink + self.ring

    @property
    def places(self) -> int:
        """Tokens there is room for."""
        return self.whole_frames * self.tokens + self.middle

    def slot(self, frame: int) -> int:
        """Place, in latent frames, of a latent frame of the video."""
        return frame if frame < self.sink else self.sink + (frame - self.sink - self.gone) % self.ring

    def held(self, frames: int) -> int:
        """Latent frames stored once ``frames`` of the video have been written; they take the first places."""
        return min(frames, self.sink) + min(max(frames - self.sink - self.gone, 0), self.ring)

    def pushed_out(self, first: int, frames: int) -> list[int]:
        """Latent frames whose places a block ``[first, first + frames)`` takes, oldest first."""
        oldest = max(first - self.ring, self.sink + self.gone)
        return list(range(oldest, first + frames - self.ring))

    def always(self, first: int, frames: int) -> list[tuple[int, int]]:
        """Places, in tokens, that every query of a block sees under sparse attention: the sink, the last committed
        frame, the block."""
        latest = range(max(first - 1, self.sink + self.gone), first + frames)
        return self.intervals({*range(min(first + frames, self.sink)), *map(self.slot, latest)})

    def intervals(self, slots: Iterable[int]) -> list[tuple[int, int]]:
        """Places in latent frames as intervals ``[start, end)`` of tokens, in order, neighbours joined."""
        return [(start * self.tokens, end * self.tokens) for start, end in runs(slots)]

    def position(self, frames: Tensor, newest: int) -> Tensor:
        """Where latent frames stand while ``newest`` is the last of the block: nobody further back than ``span``."""
        edge = newest + 1 - self.span
        return torch.where(frames < self.sink, frames.clamp_min(edge + frames), frames.clamp_min(edge + self.sink))


class Ring:
    """The keys and values of one layer, one CFG branch, for some of its heads.

    Args:
        layout: room. like: keys of a block ``[B, n, heads, head_dim]``, for shapes, dtype and device. make: makes the
            allocation for that many tokens. rotary: how time turns keys. middle: rule for what leaves the ring; None
            forgets it.

    Attributes:
        heads: which ones of the layer, int64 on the device; None for all. width: how many.
    """

    def __init__(
        self, layout: Layout, like: Tensor, make: Callable[[Tensor, int], Slots], rotary: TimeRotary,
        middle: Middle | None,
    ) -> None:  # fmt: skip
        self.layout, self._rotary, self._rule, self._make = layout, rotary, middle, make
        self.slots, self.heads, self.width = make(like, layout.places), None, like.shape[2]
        far = layout.sink * layout.tokens + layout.middle
        batch, _, heads, _ = like.shape
        self._plain = like.new_zeros((batch, far, heads, rotary.channels)) if rotary.channels else None
        self._frames = torch.zeros((layout.middle, heads), dtype=torch.int32, device=like.device)
        self._counts = torch.ones(layout.middle, device=like.device)
        self._bias = torch.zeros(layout.places, device=like.device) if layout.middle else None
        self.kept = 0  # tokens of the middle
        self._weighted = self._per_head = False
        self._since = 0  # oldest latent frame behind the sink that the ring still has
        self._stands = (0, 0)  # base and edge that sink and middle are turned for

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept, less the numbers of the heads."""
        extra = (self._plain, self._bias, self._frames, self._counts)
        return self.slots.nbytes + sum(tensor.nbytes for tensor in extra if tensor is not None)

    def filled(self, frames: int) -> int:
        """Tokens stored once ``frames`` latent frames of the video have been written."""
        return self.layout.held(frames) * self.layout.tokens + self.kept

    def part(self, layout: Layout, heads: Tensor, slots: Slots) -> Ring:
        """The ring of some of the heads, with another room, whose keys and values lie in ``slots`` already."""
        ring = Ring(layout, slots.part(0, 0)[0], lambda like, tokens: slots, self._rotary, None)
        ring.heads, ring._stands = heads, self._stands
        if ring._plain is not None:
            ring._plain.copy_(self._plain[:, : ring._plain.shape[1], heads])
        return ring

    def open(self, layer: int, first: int, frames: int, base: int, queries: Tensor) -> None:
        """Makes room for the block ``[first, first + frames)``: what lies far is turned to where it stands now, what is
        pushed out goes through the rule of the middle.

        Args:
            base: latent frame at position 0. queries: of the block, rotated, ``[B, n, heads, head_dim]``.
        """
        gone = [frame for frame in self.layout.pushed_out(first, frames) if frame >= self._since]
        self._turn_far(first, first + frames - 1, base)
        if gone and self._rule is not None and self.layout.middle:
            self._keep(self._rule.absorb(layer, self._middle(), self._leaving(gone, base), queries, self.layout.middle))

    def write(self, first: int, keys: Tensor, values: Tensor) -> None:
        """Puts a block's latent frames from ``first`` on at their places."""
        tokens, start = self.layout.tokens, 0
        frames = keys.shape[1] // tokens
        while start < frames:
            slot, end = self.layout.slot(first + start), start + 1
            while end < frames and self.layout.slot(first + end) == slot + end - start:
                end += 1
            part = slice(start * tokens, end * tokens)
            self.slots.write(slot * tokens, keys[:, part], values[:, part])
            start = end

    def remember_sink(self, first: int, frames: int, base: int) -> None:
        """Takes the unturned time channels of the pinned frames among ``[first, first + frames)``, now clean."""
        tokens, last = self.layout.tokens, min(first + frames, self.layout.sink)
        if self._plain is None or first >= last:
            return
        places = slice(first * tokens, last * tokens)
        keys, _ = self.slots.part(places.start, places.stop)
        positions = torch.arange(first, last, device=keys.device).repeat_interleave(tokens) - base
        self._plain[:, places] = self._rotary.turn(keys[..., : self._rotary.channels], -positions)

    def shift(self, frames: int, positions: int) -> None:
        """Turns the ring of a video of ``frames`` latent frames back by ``positions``."""
        if not self._rotary.channels:
            return
        tokens, sink = self.layout.tokens, self.layout.sink
        end = self.layout.held(frames) * tokens
        keys, _ = self.slots.part(sink * tokens, end)
        turned = self._rotary.turn(
            keys[..., : self._rotary.channels], torch.full((keys.shape[1],), -positions, device=keys.device)
        )
        self.slots.write_time(sink * tokens, turned)

    def read(self, frames: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and bias (``ln counts``; None where every token is itself) of a video of ``frames`` so far."""
        end = self.filled(frames)
        keys, values = self.slots.read(end)
        return keys, values, self._bias[:end] if self._weighted else None

    def fetch(self, frames: int) -> None:
        """A read of a video of ``frames`` so far is about to come, after one of another layer."""
        self.slots.fetch(self.filled(frames))

    def shrink(self, layout: Layout, frames: int, block: int) -> None:
        """Moves to a smaller ring in a new allocation, of a video of ``frames`` committed latent frames, of which it
        keeps those that leave room for a ``block``. The middle stays as far as the new layout has room for it."""
        old, tokens = self.layout, self.layout.tokens
        slots, keep = self._make(self.slots.part(0, 0)[0], layout.places), []
        oldest = max(layout.sink, frames - layout.ring + block)
        for frame in (*range(min(frames, layout.sink)), *range(oldest, frames)):
            keep.append((old.slot(frame) * tokens, layout.slot(frame) * tokens, tokens))
        self.kept = min(self.kept, layout.middle)
        keep.append((old.whole_frames * tokens, layout.whole_frames * tokens, self.kept))
        for source, target, count in keep:
            slots.write(target, *self.slots.part(source, source + count))
        far = layout.sink * tokens + layout.middle
        self._plain = None if self._plain is None else self._plain[:, :far].clone()
        self._frames, self._counts = self._frames[: layout.middle].clone(), self._counts[: layout.middle].clone()
        if self._bias is not None:
            self._bias = self._bias.new_zeros(layout.places)
            start = layout.whole_frames * tokens
            self._bias[start : start + self.kept] = self._counts[: self.kept].log()
        self.slots, self.layout, self._since = slots, layout, oldest

    def tensors(self) -> dict[str, Tensor]:
        """Everything kept, by name, as it is."""
        named = {"plain": self._plain, "frames": self._frames, "bias": self._bias, "counts": self._counts}
        return self.slots.tensors() | {key: value for key, value in named.items() if value is not None}

    def numbers(self) -> dict[str, int]:
        flags = {"weighted": int(self._weighted), "per_head": int(self._per_head)}
        stands = {"base": self._stands[0], "edge": self._stands[1], "since": self._since}
        return {"kept": self.kept} | stands | flags

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Puts back what ``tensors`` and ``numbers`` gave."""
        for key, value in self.tensors().items():
            value.copy_(tensors[key])
        self.kept, self._weighted = int(numbers["kept"]), bool(numbers["weighted"])
        self._per_head, self._since = bool(numbers["per_head"]), int(numbers["since"])
        self._stands = (int(numbers["base"]), int(numbers["edge"]))

    def _turn_far(self, first: int, newest: int, base: int) -> None:
        """Turns sink and middle to where they stand when ``newest`` is the last frame."""
        layout, tokens = self.layout, self.layout.tokens
        stands = (base, max(newest + 1 - layout.span, 0))
        if self._plain is None or first == 0 or stands == self._stands:
            return
        self._stands = stands
        pinned = min(first, layout.sink) * tokens
        if pinned:
            frames = torch.arange(pinned // tokens, device=self._plain.device).repeat_interleave(tokens)
            turned = self._rotary.turn(self._plain[:, :pinned], layout.position(frames, newest) - base)
            self.slots.write_time(0, turned)
        if self.kept:
            start, places = layout.sink * tokens, slice(layout.sink * tokens, layout.sink * tokens + self.kept)
            positions = layout.position(self._frames[: self.kept].long(), newest) - base
            turned = self._rotary.turn(self._plain[:, places], positions)
            self.slots.write_time(start + layout.ring * tokens, turned)

    def _middle(self) -> Tokens | None:
        if not self.kept:
            return None
        start = self.layout.whole_frames * self.layout.tokens
        far = self.layout.sink * self.layout.tokens
        keys, values = self.slots.part(start, start + self.kept)
        plain = None if self._plain is None else self._plain[:, far : far + self.kept]
        counts = self._counts[: self.kept] if self._weighted else None
        frames = self._frames[: self.kept].long()
        return Tokens(keys, values, frames if self._per_head else frames[:, 0], plain, counts)

    def _leaving(self, frames: list[int], base: int) -> Tokens:
        tokens = self.layout.tokens
        parts = [self.slots.part(self.layout.slot(f) * tokens, (self.layout.slot(f) + 1) * tokens) for f in frames]
        keys, values = (torch.cat(side, 1) for side in zip(*parts, strict=True))
        stand = torch.arange(frames[0], frames[-1] + 1, device=keys.device).repeat_interleave(tokens)
        plain = None
        if self._plain is not None:
            plain = self._rotary.turn(keys[..., : self._rotary.channels], base - stand)
        return Tokens(keys, values, stand, plain)

    def _keep(self, middle: Tokens) -> None:
        layout, count = self.layout, len(middle)
        start, far = layout.whole_frames * layout.tokens, layout.sink * layout.tokens
        self.slots.write(start, middle.keys, middle.values)
        if self._plain is not None:
            self._plain[:, far : far + count] = middle.plain
        self._per_head = middle.frames.ndim == 2
        frames = middle.frames if self._per_head else middle.frames[:, None]
        self._frames[:count] = frames.expand(count, self._frames.shape[1])
        self._weighted = middle.counts is not None
        if self._weighted:
            self._counts[:count] = middle.counts
            self._bias[start : start + count] = middle.counts.log()
        self.kept = count
