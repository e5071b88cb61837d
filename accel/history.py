"""The last true velocities of every latent frame, and the noise levels they belong to.

Windows move and, in asynchronous schedules, frames start at different rows, so everything is keyed by the latent frame
of the segment, never by a position in the window. Noise levels live on the host; velocities live in one ring on the
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.multistep import linear_step

SAME_SIGMA = 1e-6


class VelocityHistory:
    """Bounded per-frame memory of true (never predicted) velocities, newest first.

    Storage is one fp32 ring ``[depth, B, C, F, H, W]`` made at the first push: extrapolating from 16-bit stored
    velocities would multiply their rounding. A frame fills its part of the ring backwards, so its entries, newest
    first, are consecutive slots and frames pushed together can be read as one view.

    Args:
        frames: F, latent frames of the segment.
        depth: velocities kept per frame; order p of a prediction needs p + 1.

    Raises:
        ValueError: ``frames`` or ``depth`` below 1.
    """

    def __init__(self, frames: int, depth: int = 3) -> None:
        if frames < 1 or depth < 1:
            raise ValueError(f"VelocityHistory: {frames} frames and depth {depth} must both be 1 or more.")
        self.frames = frames
        self.depth = depth
        self._ring: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forget all entries (new segment, new run); the memory is kept for velocities of the same shape."""
        self._sigmas: list[list[float]] = [[] for _ in range(self.frames)]
        self._heads = [0] * self.frames

    @property
    def nbytes(self) -> int:
        """Bytes of the ring; 0 before the first push."""
        return 0 if self._ring is None else self._ring.nbytes

    def push(
        self,
        frames: tuple[int, int],
        sigmas: Sequence[float],
        velocity: Tensor,
        mask: Sequence[bool] | None = None,
    ) -> None:
        """Record the velocity a forward gave for a window.

        A frame at the noise level of its newest entry (within 1e-6) replaces that entry. A frame whose noise level rose
        is on a new trajectory: its older entries are dropped first.

        Args:
            frames: window ``[start, end)`` in latent frames of the segment.
            sigmas: noise level of each latent frame of the window, host numbers.
            velocity: ``[B, C, T, H, W]``, any floating dtype; copied, never kept.
            mask: which frames of the window to record; all when None. Host values.

        Raises:
            ValueError: window outside the segment, counts that disagree, a recorded sigma that is not finite, or a
                velocity whose shape or device differs from what is stored.
        """
        start, end = self._window(frames)
        width = end - start
        mask = [True] * width if mask is None else mask
        if velocity.ndim != 5 or velocity.shape[2] != width or len(sigmas) != width or len(mask) != width:
            raise ValueError(
                f"VelocityHistory: window [{start}, {end}) needs {width} sigmas and mask entries and a velocity "
                f"[B, C, {width}, H, W], got {len(sigmas)}, {len(mask)} and {tuple(velocity.shape)}."
            )
        recorded = [offset for offset in range(width) if mask[offset]]
        for offset in recorded:
            if not math.isfinite(sigmas[offset]):
                raise ValueError(f"VelocityHistory: sigma {sigmas[offset]} of frame {start + offset} is not finite.")
        if not recorded:
            return
        ring = self._ring_for(velocity)
        slots = self._enter(start, recorded, sigmas)
        source = velocity.detach()
        for first, last, slot in _runs(recorded, slots):
            ring[slot, :, :, start + first : start + last].copy_(source[:, :, first:last])

    def count(self, frames: tuple[int, int]) -> tuple[int, ...]:
        """Entries of each latent frame of the window."""
        start, end = self._window(frames)
        return tuple(len(entries) for entries in self._sigmas[start:end])

    def levels(self, frames: tuple[int, int]) -> tuple[tuple[float, ...], ...]:
        """Noise levels of the entries of each latent frame of the window, newest first; host numbers, no rounding."""
        start, end = self._window(frames)
        return tuple(tuple(entries) for entries in self._sigmas[start:end])

    def points(self, frames: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """All entries of a window, newest first.

        Returns:
            ``sigmas`` ``[n, T]`` fp32 on the ring's device, ``velocities`` ``[n, B, C, T, H, W]`` fp32 and the entries
            of each frame. n is the largest count; a frame with fewer entries repeats its oldest sigma (NaN if it has
            none) beside undefined velocities, which ``predict.extrapolate`` reads as a lower order. The velocities are
            a view of the ring where its layout allows: read only, valid until the next push.

        Raises:
            ValueError: no frame of the window has an entry.
        """
        counts = self.count(frames)
        depth = max(counts)
        if depth == 0:
            raise ValueError(f"VelocityHistory: no velocity is stored for frames [{frames[0]}, {frames[1]}).")
        padded = [(entries + (entries or (math.nan,))[-1:] * depth)[:depth] for entries in self.levels(frames)]
        velocities = self._gather(frames, depth)
        sigmas = torch.tensor(padded, dtype=torch.float32).T.contiguous()
        return sigmas.to(velocities.device, non_blocking=True), velocities, counts

    def newest(self, frames: tuple[int, int]) -> Tensor:
        """Newest velocity of every latent frame of the window, fp32 ``[B, C, T, H, W]``.

        A view of the ring where its layout allows: read only, valid until the next push.

        Raises:
            ValueError: a frame of the window has no entry.
        """
        self._require(frames)
        return self._gather(frames, 1)[0]

    def combine(self, frames: tuple[int, int], weights: Tensor) -> Tensor:
        """Weighted sum of the entries of each latent frame, read in place.

        Args:
            frames: window ``[start, end)``; every frame must have an entry.
            weights: ``[n, T]`` on the host, newest entry first; weights of entries a frame does not have must be 0.

        Returns:
            fp32 ``[B, C, T, H, W]``, a new tensor.

        Raises:
            ValueError: a frame without an entry, weights on the device or of another shape.
        """
        self._require(frames)
        start, end = frames
        if weights.device.type != "cpu" or weights.shape != (len(weights), end - start) or len(weights) > self.depth:
            raise ValueError(
                f"VelocityHistory: weights {tuple(weights.shape)} on {weights.device} must be a host tensor "
                f"[1..{self.depth}, {end - start}]."
            )
        table = torch.zeros(self.depth, end - start, dtype=torch.float32)
        table.scatter_(0, self._slots(frames, len(weights)), weights.float())
        return linear_step(self._ring[:, :, :, start:end], table)

    def _enter(self, start: int, recorded: list[int], sigmas: Sequence[float]) -> list[int]:
        """Books the new sigmas and says which slot each recorded frame writes to."""
        entered = []
        for offset in recorded:
            frame, sigma = start + offset, float(sigmas[offset])
            entries = self._sigmas[frame]
            if entries and sigma - entries[0] >= SAME_SIGMA:
                entries.clear()
            if entries and abs(sigma - entries[0]) < SAME_SIGMA:
                entries[0] = sigma
                continue
            if entries:
                self._heads[frame] = (self._heads[frame] - 1) % self.depth
            else:
                entered.append(frame)
            entries.insert(0, sigma)
            del entries[self.depth :]
        seasoned = [start + offset for offset in recorded if start + offset not in entered]
        shared = self._heads[seasoned[-1]] if seasoned else self.depth - 1
        for frame in entered:
            self._heads[frame] = shared
        return [self._heads[start + offset] for offset in recorded]

    def _ring_for(self, velocity: Tensor) -> Tensor:
        """The ring, made for this shape; refused while entries of another shape are stored."""
        batch, channels, _, height, width = velocity.shape
        shape = (self.depth, batch, channels, self.frames, height, width)
        ring = self._ring
        if ring is None or ring.shape != shape or ring.device != velocity.device:
            if ring is not None and any(self._sigmas):
                raise ValueError(
                    f"VelocityHistory: velocity {tuple(velocity.shape)} on {velocity.device} does not fit the stored "
                    f"{tuple(ring.shape[1:])} on {ring.device}; clear the history when the latent changes."
                )
            self._ring = torch.zeros(shape, dtype=torch.float32, device=velocity.device)
        return self._ring

    def _slots(self, frames: tuple[int, int], depth: int) -> Tensor:
        """Ring slot of entry k of each frame, int64 ``[depth, T]``."""
        heads = torch.tensor(self._heads[frames[0] : frames[1]])
        return (heads + torch.arange(depth)[:, None]) % self.depth

    def _gather(self, frames: tuple[int, int], depth: int) -> Tensor:
        """Newest ``depth`` entries of each frame, a view where all frames agree and their slots do not wrap."""
        start, end = frames
        window = self._ring[:, :, :, start:end]
        heads = set(self._heads[start:end])
        if len(heads) == 1 and (head := heads.pop()) + depth <= self.depth:
            return window[head : head + depth]
        slots = self._slots(frames, depth).to(window.device, non_blocking=True)
        return window.gather(0, slots[:, None, None, :, None, None].expand(-1, *window.shape[1:]))

    def _window(self, frames: tuple[int, int]) -> tuple[int, int]:
        start, end = frames
        if not 0 <= start < end <= self.frames:
            raise ValueError(
                f"VelocityHistory: window [{start}, {end}) is not inside the segment's {self.frames} frames."
            )
        return start, end

    def _require(self, frames: tuple[int, int]) -> None:
        for offset, count in enumerate(self.count(frames)):
            if count == 0:
                raise ValueError(
                    f"VelocityHistory: no velocity is stored for frame {frames[0] + offset}; compute the call instead."
                )


def _runs(offsets: list[int], slots: list[int]) -> list[tuple[int, int, int]]:
    """Neighbouring offsets with one slot as ``(first, last + 1, slot)``: one copy each."""
    runs: list[tuple[int, int, int]] = []
    for offset, slot in zip(offsets, slots, strict=True):
        if runs and runs[-1][1] == offset and runs[-1][2] == slot:
            runs[-1] = (runs[-1][0], offset + 1, slot)
        else:
            runs.append((offset, offset + 1, slot))
    return runs
