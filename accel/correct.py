"""Enhanced Residual Correction: how far the first segment moved tells later segments how far to move (ARCache, CVPR
2026).

A held velocity is replaced by ``v_t = v_b + lambda_t (v_a - v_b)``, where a is the most recent recompute and b the one
before it: lambda 1 holds, above 1 extrapolates. The paper states it on hidden residuals; here it acts on velocities,
where holding is the same thing and the memory is two latents. Where lambda comes from:

    hold            1
    sigma_linear    (sigma_t - sigma_b) / (sigma_a - sigma_b)
    seg1_l1         |z(sigma_t) - z(sigma_b)|_1 / |z(sigma_a) - z(sigma_b)|_1     the paper's ratio on segment 1

z(sigma) is the trajectory of the first segment, piecewise linear through its recomputed calls. It is kept per latent
frame and by noise level, so other decisions, other schedules and asynchronous frames need no further rule, and as a
fixed random subset of coordinates, because a ratio of L1 norms needs no more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from .history import SAME_SIGMA, VelocityHistory

SOURCES = ("sigma_linear", "hold", "seg1_l1")


@dataclass(frozen=True, slots=True)
class CorrectionConfig:
    """How a held velocity is corrected.

    Attributes:
        source: where lambda comes from: ``sigma_linear``, ``hold`` or ``seg1_l1`` (the paper's).
        clamp: smallest and largest lambda; the range holds 1.
        sketch: coordinates kept of one recomputed call, shared out among its latent frames.
        min_denominator: below this part of ``|z(sigma_b)|_1`` the denominator says nothing and lambda is 1.
        segment0: ``sigma_linear`` or ``hold``, what ``seg1_l1`` does in the first segment, whose truth is not known
        yet.

    Raises:
        ValueError: unknown source, a clamp without 1 in it, ``sketch`` below 1, ``min_denominator`` negative.
    """

    source: str = "sigma_linear"
    clamp: tuple[float, float] = (0.5, 3.0)
    sketch: int = 16384
    min_denominator: float = 1e-3
    segment0: str = "sigma_linear"

    def __post_init__(self) -> None:
        low, high = self.clamp
        if self.source not in SOURCES:
            raise ValueError(f"CorrectionConfig: source {self.source!r} is not known; use one of {', '.join(SOURCES)}.")
        if self.segment0 not in SOURCES[:2]:
            raise ValueError(f"CorrectionConfig: segment0 {self.segment0!r} must be {' or '.join(SOURCES[:2])}.")
        if not (math.isfinite(low) and math.isfinite(high) and 0.0 <= low <= 1.0 <= high):
            raise ValueError(f"CorrectionConfig: clamp {self.clamp} must be two finite numbers around 1; try (0.5, 3).")
        if self.sketch < 1:
            raise ValueError(f"CorrectionConfig: sketch {self.sketch} must be 1 or more; 16384 estimates within 1%.")
        if not (math.isfinite(self.min_denominator) and self.min_denominator >= 0.0):
            raise ValueError(f"CorrectionConfig: min_denominator {self.min_denominator} must be a finite number >= 0.")


class ResidualCorrection:
    """State of one run: the first segment's trajectory, and lambda for every held call.

    Nothing is read back from the device while the first segment runs; its sketches come to the host in one copy when a
    later segment first needs them.

    Attributes:
        scales: lambda of each latent frame at the last ``scale`` or ``apply``.
        note: a sentence for the timeline where the trajectory could not serve at that call and the velocity was held,
            else None.
    """

    def __init__(self, config: CorrectionConfig) -> None:
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new run starts."""
        self.scales: tuple[float, ...] = ()
        self.note: str | None = None
        self._cuts: set[int] = set()
        self._share = 0
        self._places: dict[tuple, tuple[Tensor, ...]] = {}
        self._waiting: list[tuple[int, tuple[float, ...], tuple[bool, ...], Tensor]] = []
        self._knots: dict[int, list[tuple[float, Tensor]]] = defaultdict(list)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The first segment's trajectory, knots ``[n, ...]`` fp64 of every latent frame, and marks as plain JSON."""
        self._settle()
        knots = {str(frame): torch.stack([sketch for _, sketch in known]) for frame, known in self._knots.items()}
        levels = {str(frame): [sigma for sigma, _ in known] for frame, known in self._knots.items()}
        return knots, {"levels": levels, "cuts": sorted(self._cuts), "share": self._share}

    def load(self, knots: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Takes over what ``state`` of the same run gave."""
        self.reset()
        self._cuts, self._share = set(facts["cuts"]), facts["share"]
        for frame, levels in facts["levels"].items():
            self._knots[int(frame)] = list(zip(levels, knots[frame].unbind(0), strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the sketches: fp32 on the device while the first segment runs, fp64 on the host afterwards."""
        waiting = sum(sample.nbytes for *_, sample in self._waiting)
        return waiting + sum(sketch.nbytes for knots in self._knots.values() for _, sketch in knots)

    def record(
        self,
        segment: int,
        frames: tuple[int, int],
        sigmas: Sequence[float],
        velocity: Tensor,
        mask: Sequence[bool] | None = None,
    ) -> None:
        """A call was recomputed: its velocity is a knot of the trajectory if the segment is the first.

        Args:
            segment: index of the segment, from 0.
            frames: window ``[start, end)`` in latent frames of the segment.
            sigmas: noise level of each latent frame of the window, host numbers.
            velocity: ``[B, C, T, H, W]``; sampled, never kept.
            mask: which frames of the window to record; all when None.
        """
        if self.config.source != "seg1_l1":
            return
        if segment > 0:
            self._settle()
            return
        width = velocity.shape[2]
        self._share = self._share or math.ceil(self.config.sketch / width)
        channels, rows, columns = self._coordinates(velocity)
        sample = velocity.detach()[:, channels, :, rows, columns].float()
        self._waiting.append((frames[0], tuple(sigmas), (True,) * width if mask is None else tuple(mask), sample))

    def mark_scene_cut(self, segment: int) -> None:
        """The content of ``segment`` has nothing to do with the first one: its held velocities are not corrected."""
        self._cuts.add(segment)

    def scale(
        self,
        segment: int,
        frames: tuple[int, int],
        sigma_t: Sequence[float],
        sigma_a: Sequence[float],
        sigma_b: Sequence[float | None],
    ) -> tuple[float, ...]:
        """Lambda of each latent frame of a window; frames at the same three noise levels share one, as in the paper.

        Lambda is 1 where there is no second recompute, in a segment marked as a scene cut, where the denominator is too
        small and where no trajectory is known.

        Args:
            segment: index of the segment, from 0.
            frames: window ``[start, end)`` in latent frames of the segment.
            sigma_t: noise level wanted, per latent frame; host numbers as all of these.
            sigma_a: noise level of the most recent recompute.
            sigma_b: noise level of the recompute before it, None where there is none.
        """
        self.note = None
        source = self.config.segment0 if segment == 0 and self.config.source == "seg1_l1" else self.config.source
        if segment in self._cuts:
            source, self.note = "hold", f"Segment {segment} begins with a scene cut; held velocities are not corrected."
        triples = list(zip(sigma_t, sigma_a, sigma_b, strict=True))
        groups: dict[tuple, list[int]] = defaultdict(list)
        for frame, triple in zip(range(*frames), triples, strict=True):
            groups[triple].append(frame)
        ratios = {triple: self._ratio(source, members, *triple) for triple, members in groups.items()}
        low, high = self.config.clamp
        bounded = {key: min(max(ratio, low), high) if math.isfinite(ratio) else 1.0 for key, ratio in ratios.items()}
        self.scales = tuple(bounded[triple] for triple in triples)
        return self.scales

    def apply(
        self, history: VelocityHistory, segment: int, frames: tuple[int, int], targets: Sequence[float]
    ) -> tuple[Tensor, float]:
        """Corrected velocity of a held window.

        Args:
            history: true velocities; its two newest entries of each latent frame are a and b.
            segment: index of the segment, from 0.
            frames: window ``[start, end)`` in latent frames of the segment.
            targets: noise level of each latent frame of the window, host numbers.

        Returns:
            fp32 ``[B, C, T, H, W]``, a new tensor, and the mean of lambda over the latent frames (``scales`` has them
            all).

        Raises:
            ValueError: a frame without a stored velocity, or targets that are not one per frame.
        """
        newest = history.newest(frames)
        levels = history.levels(frames)
        recent, earlier = [entries[0] for entries in levels], [(*entries, None)[1] for entries in levels]
        scales = self.scale(segment, frames, targets, recent, earlier)
        if all(scale == 1.0 for scale in scales):
            return newest.clone(), 1.0
        ahead = torch.tensor(scales, dtype=torch.float64) - 1.0
        change = history.combine(frames, torch.stack((ahead, -ahead)))
        return torch.where(change.isfinite(), newest + change, newest), fmean(scales)

    def _ratio(self, source: str, members: list[int], t: float, a: float, b: float | None) -> float:
        """Lambda before the clamp."""
        if source == "hold" or b is None or abs(a - b) < SAME_SIGMA:
            return 1.0
        if source == "sigma_linear":
            return (t - b) / (a - b)
        self._settle()
        known = [frame for frame in members if len(self._knots.get(frame, ())) >= 2]
        if len(known) < len(members):
            missing = ", ".join(str(frame) for frame in members if frame not in known)
            self.note = f"The first segment has no trajectory of latent frames {missing}; " + (
                "the others stand in for them." if known else "their velocity is held."
            )
        moved = reach = size = 0.0
        for frame in known:
            at_t, at_a, at_b = (_between(self._knots[frame], sigma) for sigma in (t, a, b))
            moved += torch.dist(at_t, at_b, 1).item()
            reach += torch.dist(at_a, at_b, 1).item()
            size += torch.linalg.vector_norm(at_b, 1).item()
        return moved / reach if reach > self.config.min_denominator * size else 1.0

    def _coordinates(self, velocity: Tensor) -> tuple[Tensor, ...]:
        """Channel, row and column of the sampled coordinates: the same at every call, from a generator of their own."""
        _, channels, _, height, width = velocity.shape
        key = (channels, height, width, velocity.device)
        if key not in self._places:
            generator = torch.Generator().manual_seed(0)
            order = torch.randperm(channels * height * width, generator=generator)[: self._share].sort().values
            places = (order // (height * width), order // width % height, order % width)
            self._places[key] = tuple(place.to(velocity.device, non_blocking=True) for place in places)
        return self._places[key]

    def _settle(self) -> None:
        """Brings the sketches to the host in one copy and sorts them into a trajectory per latent frame."""
        if not self._waiting:
            return
        host = torch.cat([sample.flatten() for *_, sample in self._waiting]).cpu().double()
        parts = host.split([sample.numel() for *_, sample in self._waiting])
        for (start, sigmas, mask, sample), part in zip(self._waiting, parts, strict=True):
            for offset, sketch in enumerate(part.reshape(sample.shape).unbind(2)):
                if mask[offset]:
                    _thread(self._knots[start + offset], sigmas[offset], sketch)
        self._waiting.clear()


def is_scene_cut(first: float, earlier: Sequence[float], factor: float = 5.0) -> bool:
    """Whether the first discrepancy of a segment lies above ``factor`` times the median of the earlier ones.

    Args:
        first: discrepancy at the first measured call of the segment.
        earlier: finite discrepancies measured before; with none, nothing is a cut.
    """
    return len(earlier) > 0 and first > factor * median(earlier)


def _thread(knots: list[tuple[float, Tensor]], sigma: float, sketch: Tensor) -> None:
    """Adds a knot: the same noise level replaces the last one, a higher one starts the trajectory again."""
    if knots and sigma - knots[-1][0] >= SAME_SIGMA:
        knots.clear()
    if knots and abs(sigma - knots[-1][0]) < SAME_SIGMA:
        knots.pop()
    knots.append((sigma, sketch))


def _between(knots: list[tuple[float, Tensor]], sigma: float) -> Tensor:
    """z(sigma), piecewise linear between knots of falling noise level, constant beyond the ends."""
    for (upper, before), (lower, after) in pairwise(knots):
        if sigma >= lower:
            share = min((upper - sigma) / (upper - lower), 1.0) if sigma < upper else 0.0
            return torch.lerp(before, after, share) if share > 0.0 else before
    return knots[-1][1]
