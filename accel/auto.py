"""Thresholds that set themselves: skip as often as a quality target allows, from the errors that the run measures.

SCOPE and FlowCache name thresholds set by hand as their limitation. Here a computed call says what a skip in its place
would have been wrong by (``Run._remember``), which rides on the next readback, and the noise levels say how far every
skip reaches. What follows is ours; the constants were read off the three tiny models together, none is per model.

1.  A skipped step of length ``|ds|`` leaves ``|ds| (v^ - v)`` in the latent. With ``x = (1 - s) x0 + s noise`` an error
    in ``x`` looks like ``1 / (1 - s)`` times as much signal, and where the conditional distribution has many modes the
    model keeps it, so a step is charged ``|ds| / (1 - s) (v^ - v)``.
2.  ``v^ - v = m g / g*``: at the next computed call the miss ``m`` is a known vector, so every skip since the computed
    call before is known too, and their sum ``E`` is kept as a vector per latent frame: errors that cancel are seen to.
3.  Ahead, ``|v^ - v| = k g`` with ``g = (D (D + D0) / (1 - s)^2)^(p/2)`` for a line through two velocities (``D`` the
    distance from the newest, ``D0`` between them), ``g = (D / (1 - s))^(p/2)`` for one; ``p`` is 1.5 where smooth
    velocities would give 2. ``k`` is learned per latent frame and per band of noise levels; later segments keep the
    bands. A prediction of order 2 is charged as one of order 1, whose ``k`` it makes smaller where it is better.
4.  With ``g`` of order 2 an interval of length ``h`` between computed calls costs about ``k h^3 / (1 - s)^3``, and the
    calls number ``integral ds / h``: the fewest for a given sum, or sum of squares, have the same error in every
    interval. So what is left of the budget is divided by the intervals still expected, which thin out halfway between
    equal steps of ``log(1 - s)`` (a constant ``k``) and equal solver steps (``k`` rises towards the end).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .call import Call, Decision, Family
from .history import VelocityHistory
from .policy import Answers
from .skip_cost import POWER, SkipCost

QUALITIES = {"high": 48.0, "balanced": 42.0, "fast": 34.0}
PIXEL_DB = 17.5  # PSNR of a video whose latents are off by E of RMS 1
PRIOR = {1: 1.0, 2: 0.5}  # k before anything was measured, by points used
PRIOR_WEIGHT, MEMORY = 1, 32  # measurements that the prior counts for, and that a band remembers
LEAST_SHARE = 0.25  # of the budget that is always handed out again, however much was spent
INTERVALS = 12.0  # between computed calls of a latent frame, at the quality "balanced"


@dataclass(frozen=True, slots=True)
class AutoConfig:
    """A quality target.

    Attributes:
        quality: PSNR in dB that the decoded video should have against the full run of the same seed, or a key of
            ``QUALITIES``; infinite computes every call. It is ``PIXEL_DB - 20 log10(rms E)`` over all latent frames,
            for latents of unit variance: what a latent error is in pixels, and what becomes of it on its way through
            the rest of the run, is one constant that was measured on the tiny models and their codec, on two segments.
            What later segments make of the errors of earlier ones is not in it.

    Raises:
        ValueError: a name that does not exist, or a number that is not above 0.
    """

    quality: float | str = "balanced"

    def __post_init__(self) -> None:
        known = isinstance(self.quality, str) and self.quality in QUALITIES
        if not known and (isinstance(self.quality, str) or not self.quality > 0.0):
            raise ValueError(
                f"Quality target: quality is {self.quality!r}; use a number of dB above 0, or {', '.join(QUALITIES)}."
            )

    @property
    def decibels(self) -> float:
        """The target as a number."""
        return QUALITIES[self.quality] if isinstance(self.quality, str) else float(self.quality)

    @property
    def intervals(self) -> float:
        """Computed calls that a latent frame is expected to need: point 4 with ``p`` for the order."""
        return INTERVALS * 10.0 ** ((self.decibels - QUALITIES["balanced"]) / 20.0 / (1.0 + POWER))

    @property
    def budget(self) -> float:
        """Mean square of ``E`` that a latent frame may end with."""
        return 10.0 ** ((PIXEL_DB - self.decibels) / 10.0)


class AutoPolicy(Answers):
    """Predicts while what the skips since the last computed call will have brought in stays within what is left.

    One object a run: ``look`` before every ``decide`` or ``force``, ``learn`` with every computed velocity, ``told``
    with the numbers that ``learn`` left on the device. ``accumulated`` is the predicted error of the skips since the
    last computed call, ``threshold`` the allowance; both are RMS over the latent frames of that noise level, of those
    that are active, where least is left.

    Args:
        config: the target. max_skip: most skips in a row, None for no cap.
    """

    def __init__(self, config: AutoConfig, max_skip: int | None = None) -> None:
        self.config = config
        self._bands: dict[tuple[int, int], tuple[float, int]] = {}
        self._table: dict[int, float] = {}
        self._finished: list[float] = []
        self._spent: dict[int, float] = {}
        self.measured = 0
        super().__init__(max_skip)

    def reset(self) -> None:
        """A new segment starts: what was spent is forgotten, what was learned is not."""
        super().reset()
        self._finished += self._spent.values()
        self._spent = {}
        self._error: Tensor | None = None
        self._ahead: dict[int, SkipCost] = {}
        self._progress: dict[int, float] = {}
        self._run: dict[int, list[tuple[float, float]]] = {}
        self._own: dict[int, tuple[float, int]] = {}
        self._asked: list[SkipCost] = []
        self._broken = self._fresh = False

    def state(self) -> dict[str, Any]:
        """What was learned and spent so far, as plain JSON; what a segment keeps to itself is not in it."""
        return {
            "bands": [[*band, *learned] for band, learned in self._bands.items()],
            "table": [list(entry) for entry in self._table.items()],
            "finished": [*self._finished, *self._spent.values()],
            "measured": self.measured,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state`` of the same run gave."""
        self.reset()
        self._bands = {(points, band): (mean, count) for points, band, mean, count in state["bands"]}
        self._table = {step: sigma for step, sigma in state["table"]}
        self._finished, self.measured = list(state["finished"]), state["measured"]

    @property
    def nbytes(self) -> int:
        """Bytes of the accumulated error."""
        return 0 if self._error is None else self._error.nbytes

    @property
    def predicted(self) -> float | None:
        """Quality in dB that the errors so far amount to; None where none was measured."""
        spent = [*self._finished, *self._spent.values()]
        mean = sum(spent) / len(spent) if spent else 0.0
        return PIXEL_DB - 10.0 * math.log10(mean) if mean > 0.0 else None

    def note(self) -> str:
        """What it did, for people to read."""
        reached = "no error yet" if self.predicted is None else f"predicted {self.predicted:.1f} dB"
        return f"quality target {self.config.decibels:g} dB: {reached}, from {self.measured} measured errors"

    def look(self, call: Call, history: VelocityHistory) -> None:
        """Reads off a call what a skip would cost every active latent frame."""
        self._table.update((step, sigma) for step, sigma in zip(call.steps, call.sigmas, strict=True))
        self._ahead, self._fresh = {}, call.family is Family.RENOISE
        levels = history.levels(call.frames)
        for offset, frame in enumerate(range(*call.frames)):
            if call.active[offset] and levels[offset]:
                sigma, step = call.sigmas[offset], call.steps[offset]
                before = self._table.get(step - 1, sigma)
                after = 0.0 if step == call.total_steps else self._table.get(step + 1, max(2 * sigma - before, 0.0))
                self._ahead[frame] = SkipCost(frame, sigma, after, levels[offset], step / max(call.total_steps, 1))

    def decide(self, discrepancy: float = 0.0, can_cache: bool = True, can_predict: bool = True) -> Decision:
        """Answer for the call looked at; ``discrepancy`` only has to be finite."""
        if not math.isfinite(discrepancy) or self._broken:
            return self._recompute("non-finite")
        if math.isinf(self.config.decibels):
            return self._recompute("off")
        if not self._ahead or self._fresh:
            return self._recompute("no history")
        chunks: dict[float, list[tuple[float, float]]] = {}
        for frame in self._ahead.values():
            chunks.setdefault(frame.sigma, []).append((self._pending(frame), self._allowance(frame)))
        means = [tuple(sum(column) / len(chunk) for column in zip(*chunk, strict=True)) for chunk in chunks.values()]
        pending, allowed = max(means, key=lambda mean: mean[0] / mean[1])
        self.accumulated, self.threshold = math.sqrt(pending), math.sqrt(allowed)
        if not self.accumulated <= self.threshold:
            return self._recompute("threshold")
        if self._capped:
            return self._recompute("cap")
        if not (can_cache or can_predict):
            return self._recompute("no history")
        for frame in self._ahead.values():
            self._run.setdefault(frame.frame, []).append((frame.charge, frame.gain))
        return self._skip(Decision.PREDICT if can_predict else Decision.CACHE, 0.0)

    def learn(self, frames: tuple[int, int], missed: Tensor, total: int) -> Tensor:
        """A call was computed.

        Args:
            frames: active interval ``[start, end)`` in latent frames of the segment.
            missed: ``[B, C, T, H, W]`` of them, what a skip would have answered less the truth.
            total: latent frames of the segment.

        Returns:
            fp32 ``[2 T]`` on the device, for ``told``: RMS of ``missed`` and of ``E`` of every latent frame.
        """
        if self._error is None:
            batch, channels, _, height, width = missed.shape
            self._error = missed.new_zeros((batch, channels, total, height, width), dtype=torch.float32)
        self._progress.update((number, frame.progress) for number, frame in self._ahead.items())
        self._asked = [self._ahead[frame] for frame in range(*frames) if frame in self._ahead]
        weights = [
            sum(charge * gain for charge, gain in self._run.pop(frame, ())) / self._ahead[frame].gain
            if frame in self._ahead and self._ahead[frame].gain > 0.0
            else 0.0
            for frame in range(*frames)
        ]
        error = self._error[:, :, frames[0] : frames[1]]
        if any(weights):
            scale = torch.tensor(weights, dtype=torch.float32).to(missed.device, non_blocking=True)
            error.addcmul_(missed, scale[None, None, :, None, None])
        self._first = frames[0]
        return torch.cat([value.float().pow(2).mean((0, 1, 3, 4)).sqrt() for value in (missed, error)])

    def told(self, values: list[float]) -> None:
        """The numbers of the last ``learn``, read back."""
        width = len(values) // 2
        self._broken = False
        for frame in self._asked:
            place = frame.frame - self._first
            miss, spent = values[place], values[width + place]
            if not (math.isfinite(miss) and math.isfinite(spent)):
                self._broken = True
                continue
            self._spent[frame.frame] = spent**2
            if frame.gain > 0.0 and miss > 0.0:
                key, rate = (frame.points, frame.band), (miss / frame.gain) ** 2
                mean, count = self._bands.get(key, (PRIOR[frame.points] ** 2, PRIOR_WEIGHT))
                self._bands[key] = (mean + (rate - mean) / (count + 1), min(count + 1, MEMORY))
                self._own[frame.frame] = (rate, frame.points)
                self.measured += 1

    def _pending(self, frame: SkipCost) -> float:
        """Square of what the skips since the last computed call and one more would add to ``E``."""
        skips = sum(charge * gain for charge, gain in self._run.get(frame.frame, ())) + frame.charge * frame.gain
        return (self._rate(frame) * skips) ** 2

    def _allowance(self, frame: SkipCost) -> float:
        """Square of what the interval may add."""
        budget = self.config.budget
        left = max(budget - self._spent.get(frame.frame, 0.0), LEAST_SHARE * budget)
        return left / max(self.config.intervals * (1.0 - self._progress.get(frame.frame, 0.0)), 1.0)

    def _rate(self, frame: SkipCost) -> float:
        """``k``: the quadratic mean of the frame's last measured one and of its band's."""
        band = self._bands.get((frame.points, frame.band), (PRIOR[frame.points] ** 2,))[0]
        own, points = self._own.get(frame.frame, (band, frame.points))
        return math.sqrt(0.5 * (own + band) if points == frame.points else band)
