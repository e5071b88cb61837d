"""How much changed since the last look: the discrepancy a policy accumulates.

A signal is what it looks at (a feature of the denoiser, one row per latent frame) and whose rows it pools (all frames
of the window, those being denoised, or the history before them). Rows are remembered by the latent frame of the
segment, so a window that moves or grows is compared on the frames seen before and on no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from .call import Call
from .kernels.relative_l1 import Look, group_relative_l1

EPSILON = 1e-8
SIGMA_MARGIN = 1e-3
HISTORY_CHOICES = ("auto", "mod", "block0", "current")


@dataclass(frozen=True, slots=True)
class Signal:
    """One reading.

    Attributes:
        kind: feature asked of the denoiser: ``timestep`` (embedding), ``modulated`` (input of the first block after its
            modulation), ``block0`` (output of the first block), ``latent``.
        group: latent frames pooled: ``window`` (all), ``active`` (taking a solver step) or ``history`` (those before
            the first active one, and rows a denoiser gives for history outside the window).
    """

    kind: str
    group: str


SIGNALS: Mapping[str, Signal] = MappingProxyType(
    {
        "timestep": Signal("timestep", "active"),
        "input": Signal("modulated", "window"),
        "current": Signal("modulated", "active"),
        "history-mod": Signal("modulated", "history"),
        "history-block0": Signal("block0", "history"),
        "latent": Signal("latent", "active"),
    }
)
"""TeaCache's signal is ``input`` (ARCache's IGC), FlowCache's on SkyReels-V2 ``timestep``, on MAGI-1 ``latent``;
ARCache's
ablation calls ``current`` CGC and the two on history HGC."""


def relative_l1(now: Tensor, before: Tensor, eps: float = EPSILON) -> Tensor:
    """``mean|now - before| / (mean|before| + eps)`` in fp32, a scalar tensor; NaN for empty tensors."""
    before = before.float()
    return (now.float() - before).abs().mean() / (before.abs().mean() + eps)


def timestep_discrepancy(now: Tensor, before: Tensor) -> float:
    """Relative L1 of timestep embeddings, for planning before sampling.

    The signal of TeaCache and FlowCache on SkyReels-V2 depends on noise levels alone, so their whole decision list can
    be known before the first call. Give host tensors: the answer is a host number.

    Args:
        now: embeddings of the active frames ``[T, D]`` (any shape).
        before: those of the same frames at the previous call.
    """
    return float(relative_l1(now, before))


def planned_changes(embedded: Callable[[float], Tensor], levels: Sequence[float]) -> list[float]:
    """``timestep_discrepancy`` of every noise level from the one before it, in one readback.

    Args:
        embedded: the embedding of a latent frame at a noise level. levels: in the order they are visited.

    Returns:
        One number a level; NaN for the first, which nothing comes before.
    """
    rows = [embedded(level) for level in levels]
    changes = [relative_l1(now, before) for before, now in pairwise(rows)]
    return [math.nan, *(torch.stack(changes).tolist() if changes else [])]


def _bounded(sigma: float) -> float:
    return min(max(sigma, SIGMA_MARGIN), 1.0 - SIGMA_MARGIN) if math.isfinite(sigma) else math.nan


def log_snr(sigma: float) -> float:
    """``log((1 - sigma) / sigma)``, finite: noise levels are kept 1e-3 away from 0 and 1."""
    return math.log1p(-_bounded(sigma)) - math.log(_bounded(sigma))


def log_signal(sigma: float) -> float:
    """``log(1 - sigma)``, finite: it moves fast while the first signal rises out of the noise, slowly afterwards."""
    return math.log1p(-_bounded(sigma))


HOST_SIGNALS: Mapping[str, Callable[[float], float]] = MappingProxyType({"log-snr": log_snr, "log-signal": log_signal})
"""Signals of the noise level alone: known before the first call, without a model, latents or a device read."""


def level_step(name: str, levels: dict[int, float], call: Call) -> float:
    """Mean change of a host signal over the active frames seen before.

    Args:
        name: key of ``HOST_SIGNALS``.
        levels: noise level of every latent frame of the segment at the last look (see ``remember_levels``).
        call: the call looked at.

    Returns:
        The increment; NaN where no active frame was seen before.
    """
    measure, changes = HOST_SIGNALS[name], []
    for frame, (sigma, active) in enumerate(zip(call.sigmas, call.active, strict=True), call.frames[0]):
        if active and frame in levels:
            changes.append(abs(measure(sigma) - measure(levels[frame])))
    return sum(changes) / len(changes) if changes else math.nan


def remember_levels(levels: dict[int, float], call: Call) -> None:
    """Writes down the noise level of every latent frame of the window for the next look."""
    levels.update(enumerate(call.sigmas, call.frames[0]))


def resolve_history_signal(
    choice: str, has_history: bool, history_shares_time: bool, recomputed_history: bool
) -> tuple[str, str | None]:
    """Which reading of ARCache's history signal a run can use.

    Args:
        choice: ``mod`` (modulated input of the history tokens), ``block0`` (first block's output at them, one block of
            a forward), ``current`` (modulated input of the frames being denoised), or ``auto``: the first that can tell
            calls apart.
        has_history: whether this segment is conditioned on history frames.
        history_shares_time: whether history tokens carry the time embedding of the frames being denoised; with a noise
            level of their own, their modulated input never changes.
        recomputed_history: whether history tokens pass through every forward; a K/V store shows no change at all.

    Returns:
        Key of ``SIGNALS``, and a sentence for the timeline where the choice had to give way, else None.

    Raises:
        ValueError: unknown choice.
    """
    if choice not in HISTORY_CHOICES:
        raise ValueError(
            f"History-Guided Cache: history signal {choice!r} is not known; use one of {', '.join(HISTORY_CHOICES)}."
        )
    if choice == "current":
        return "current", None
    if not has_history:
        return "current", "This segment has no history frames, so the frames being denoised are measured."
    if not recomputed_history:
        return (
            "current",
            "History comes from the K/V store and never changes, so the frames being denoised are measured.",
        )
    if choice == "block0":
        return "history-block0", None
    if history_shares_time:
        return "history-mod", None
    return (
        "history-block0",
        "History has a noise level of its own and its modulated input never changes, so block 0's output is measured.",
    )


class SignalMeter:
    """Measures several signals in one pass and one small tensor, so that a step needs one readback.

    Numerators and denominators are summed per latent frame, then pooled over the frames of each signal's group that
    were seen before (``kernels.relative_l1``). What is seen now is remembered for the next look, whatever the policy
    decides (as TeaCache does).

    Args:
        names: keys of ``SIGNALS``.
        frames: F, latent frames of the segment.
        sketch: most scalars compared and remembered per latent frame and batch entry, taken at an even stride; None for
            all.

    Raises:
        ValueError: unknown name, ``frames`` or ``sketch`` below 1.
    """

    def __init__(self, names: Sequence[str], frames: int, sketch: int | None = 4096) -> None:
        unknown = [name for name in names if name not in SIGNALS]
        if unknown:
            raise ValueError(f"SignalMeter: signal {unknown[0]!r} is not known; use one of {', '.join(SIGNALS)}.")
        if frames < 1 or (sketch is not None and sketch < 1):
            raise ValueError(f"SignalMeter: {frames} frames and sketch {sketch} must both be 1 or more.")
        self.names = tuple(dict.fromkeys(names))
        self.kinds = tuple(dict.fromkeys(SIGNALS[name].kind for name in self.names))
        self._seen = {kind: _Rows(frames, sketch) for kind in self.kinds}

    def reset(self) -> None:
        """Forget everything: a new segment starts."""
        for rows in self._seen.values():
            rows.forget()

    @property
    def nbytes(self) -> int:
        """Bytes of the remembered rows."""
        return sum(rows.nbytes for rows in self._seen.values())

    def measure(
        self, features: Mapping[str, Tensor], call: Call, parts: Sequence[tuple[int, int]] | None = None
    ) -> Tensor:
        """Increment of every signal since the last look; of the first one over parts of the window where asked.

        Args:
            features: for every kind in ``kinds`` a tensor ``[B, T, ...]`` of one CFG branch, one row per latent frame
                of the window, all on one device. Rows beyond the window's come first and are history outside it.
            call: whose window and active frames these are.
            parts: intervals ``[start, end)`` of latent frames of the segment over which the first signal is pooled,
                one number each, instead of over its group.

        Returns:
            fp32 ``[len(names)]`` on the features' device, in the order of ``names``, the first
            in ``len(parts)`` numbers where asked; NaN where nothing was seen before.

        Raises:
            ValueError: a feature is missing or has fewer rows than the window.
        """
        looks, columns, width = [], {}, 0
        for kind in self.kinds:
            if kind not in features:
                raise ValueError(f"SignalMeter: feature {kind!r} is missing, got {', '.join(features) or 'none'}.")
            look, known, scalars = self._seen[kind].look(features[kind], call.frames)
            looks.append(look)
            columns[kind] = (width, known, scalars)
            width += len(known)
        table = []
        for kind, group in self._groups(call, columns, parts):
            offset, known, scalars = columns[kind]
            pooled = [float(seen and member) for seen, member in zip(known, group, strict=True)]
            row = [0.0] * offset + pooled + [0.0] * (width - offset - len(pooled))
            table.append([*row, EPSILON * scalars * sum(pooled)])
        return group_relative_l1(looks, table)

    def _groups(self, call: Call, columns: Mapping[str, tuple], parts) -> list[tuple[str, list[bool]]]:
        """Feature and pooled rows of every number to give."""
        extra = {kind: len(known) - len(call.active) for kind, (_, known, _) in columns.items()}
        signals = [SIGNALS[name] for name in self.names]
        groups = [(signal.kind, _members(signal.group, call, extra[signal.kind])) for signal in signals]
        if parts is not None:
            kind, frames = self.kinds[0], range(*call.frames)
            outside = [False] * extra[kind]
            groups[:1] = [(kind, outside + [start <= frame < end for frame in frames]) for start, end in parts]
        return groups


def _members(group: str, call: Call, extra: int) -> list[bool]:
    """Which rows a group pools: ``extra`` rows of history outside the window, then the window's latent frames."""
    if group == "window":
        return [True] * (extra + len(call.active))
    if group == "active":
        return [False] * extra + list(call.active)
    before = call.active_frames[0] - call.frames[0]
    return [True] * (extra + before) + [False] * (len(call.active) - before)


class _Rows:
    """What one feature looked like at the last look, one row per latent frame."""

    def __init__(self, frames: int, sketch: int | None) -> None:
        self.frames = frames
        self.sketch = sketch
        self._rows: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        self._known: list[bool] = []

    @property
    def nbytes(self) -> int:
        return 0 if self._rows is None else self._rows.nbytes

    def look(self, feature: Tensor, window: tuple[int, int]) -> tuple[Look, list[bool], int]:
        """What is to be compared and then remembered, whether each row was seen before, and scalars in a row."""
        start, end = window
        extra = feature.shape[1] - (end - start)
        if extra < 0 or end > self.frames:
            raise ValueError(
                f"SignalMeter: window [{start}, {end}) of {self.frames} latent frames needs a feature "
                f"[B, {end - start} or more, ...], got {tuple(feature.shape)}."
            )
        now = self._sketch(feature)
        rows = self._rows_for(now, extra)
        spans = [(0, extra + end)] if start == 0 else [(0, extra), (extra + start, extra + end)]
        spans = [(first, last) for first, last in spans if last > first]
        known = [flag for first, last in spans for flag in self._known[first:last]]
        for first, last in spans:
            self._known[first:last] = [True] * (last - first)
        return Look(now, rows, tuple(spans)), known, now.shape[0] * now.shape[2]

    def _sketch(self, feature: Tensor) -> Tensor:
        """``[B, T, n]``, every k-th scalar of a row; k shares no factor with any axis, so all channels take part."""
        flat = feature.detach().reshape(*feature.shape[:2], -1)
        if self.sketch is None or flat.shape[2] <= self.sketch:
            return flat
        stride = math.ceil(flat.shape[2] / self.sketch)
        while any(math.gcd(stride, axis) > 1 for axis in feature.shape[2:]):
            stride += 1
        return flat[:, :, ::stride]

    def _rows_for(self, now: Tensor, extra: int) -> Tensor:
        """The remembered rows; made anew, and all forgotten, when the feature changes its shape, dtype or device."""
        shape = (now.shape[0], extra + self.frames, now.shape[2])
        rows = self._rows
        if rows is None or rows.shape != shape or rows.dtype != now.dtype or rows.device != now.device:
            self._rows = now.new_zeros(shape)
            self._known = []
        if not self._known:
            self._known = [False] * shape[1]
        return self._rows
