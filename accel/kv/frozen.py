"""Frozen K/V: what idle latent frames answer with instead of a forward of their own.

While a segment is denoised, most of its latent frames do not change from one call to the next: history and finished
frames are clean, waiting ones have not started. Their keys and values are kept from their last forward, and only the
frames that advance are queries. Where attention is causal over chunks this is exact (Ca2-VDM's reason for one cache per
prefix); where it is bidirectional the kept ones go stale as the others move, so ``FrozenConfig.refresh`` renews them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..call import Call
from ..graphs import outside_graphs
from ..signals import HOST_SIGNALS, level_step, remember_levels

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class FrozenConfig:
    """When kept K/V are renewed by a forward of the whole window.

    Attributes:
        refresh: threshold >= 0 on the signal accumulated since the last whole forward; 0 never renews.
        signal: ``log-signal`` or ``log-snr`` (of the frames being denoised, free), or ``history`` (ARCache's history
            signal where the model has one, see ``signals.resolve_history_signal``).
        commit: whether a finished latent frame is forwarded once more, clean, along with the next forward; False keeps
            the K/V of its last step (FlowCache), which saves one forward a frame.

    Raises:
        ValueError: a threshold negative or not finite, or an unknown signal.
    """

    refresh: float = 0.0
    signal: str = "log-signal"
    commit: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.refresh) and self.refresh >= 0.0):
            raise ValueError(f"Frozen K/V: refresh is {self.refresh}; use a threshold of 0 (never) or more.")
        if self.signal not in ("log-signal", "log-snr", "history"):
            raise ValueError(f"Frozen K/V: signal is {self.signal!r}; use log-signal, log-snr or history.")


class FrozenWindow:
    """Says which latent frames of a window have to be forwarded, where the others can answer with kept K/V.

    A latent frame has to be forwarded when it advances, when nothing is kept of it, and (under ``everything``) when its
    noise level is no longer the one it was kept at, as that of a frame that has just been finished.

    Args:
        refresh: threshold on the accumulated signal above which the whole window is forwarded; 0 never.
        signal: key of ``HOST_SIGNALS``, or of what ``look`` is told.
        frames, prefix: latent frames of the segment, and how many of them are history.
        everything: keep every idle latent frame; False keeps the history alone and forwards all others.
        commit: as in ``FrozenConfig``.
    """

    def __init__(
        self, refresh: float, signal: str, frames: int, prefix: int, everything: bool, commit: bool = True
    ) -> None:
        self.signal, self._commit = signal, commit
        self._refresh, self._prefix, self._everything = refresh, prefix, everything
        self._kept_at: list[float | None] = [None] * frames
        self._levels: dict[int, float] = {}
        self._sum = 0.0

    def look(self, call: Call, measured: Mapping[str, float]) -> None:
        """Adds this call's change to what has come together since the last whole forward."""
        if self.signal in HOST_SIGNALS:
            increment = level_step(self.signal, self._levels, call)
            remember_levels(self._levels, call)
        else:
            increment = measured.get(self.signal, math.nan)
        if math.isfinite(increment):
            self._sum += increment

    @property
    def due(self) -> bool:
        """Whether the next forward is one of the whole window."""
        return 0.0 < self._refresh < self._sum

    def queries(self, call: Call, chunks: Sequence[Interval] | None = None) -> list[Interval]:
        """Intervals ``[start, end)`` of latent frames to forward at this call, which are then kept.

        Args:
            call: the call. chunks: the chunks that are to be computed, where the others of the active ones are not.
        """
        window = range(*call.frames)
        if self.due:
            asked = [call.frames]
        elif chunks is None:
            asked = hull([frame for frame in window if self._must_run(frame, call)])
        else:
            wanted = {frame for chunk in chunks for frame in range(*chunk)}
            idle = {frame for frame in window if self.absent(frame) or self._idle_and_stale(frame, call)}
            asked = runs(sorted(wanted | idle))
        if asked == [call.frames]:
            self._sum = 0.0
        self.computed(call, asked)
        return asked

    def computed(self, call: Call, asked: Sequence[Interval]) -> None:
        """Writes down that these latent frames were forwarded at the call's noise levels."""
        for start, end in asked:
            self._kept_at[start:end] = call.sigmas[start - call.frames[0] : end - call.frames[0]]

    def absent(self, frame: int) -> bool:
        """Whether nothing is kept of a latent frame."""
        return self._kept_at[frame] is None

    def stale(self, frame: int, call: Call) -> bool:
        """Whether what is kept of a latent frame of the window belongs to another noise level."""
        return self._kept_at[frame] != call.sigmas[frame - call.frames[0]]

    def _idle_and_stale(self, frame: int, call: Call) -> bool:
        return self._commit and not call.active[frame - call.frames[0]] and self.stale(frame, call)

    def _must_run(self, frame: int, call: Call) -> bool:
        if self._everything:
            return call.active[frame - call.frames[0]] or self.absent(frame) or self._idle_and_stale(frame, call)
        return frame >= self._prefix or self.absent(frame)


def hull(frames: Sequence[int]) -> list[Interval]:
    """The tightest interval around ``frames``, as a list of one; empty without frames."""
    return [(min(frames), max(frames) + 1)] if frames else []


def runs(frames: Iterable[int]) -> list[Interval]:
    """``frames`` as maximal intervals ``[start, end)``, in order."""
    found: list[Interval] = []
    for frame in sorted(set(frames)):
        if found and found[-1][1] == frame:
            found[-1] = (found[-1][0], frame + 1)
        else:
            found.append((frame, frame + 1))
    return found


class FrozenKV:
    """Rotated keys and plain values of a segment's latent frames, ``[B, tokens, heads, head_dim]`` a layer.

    Keys are rotated at their place in the segment, so nothing moves when a window does. Batch entries are the CFG
    branches times the clips, in the order the model is given.

    Args:
        layers: transformer blocks. frames: latent frames of the segment. tokens: tokens of a latent frame.
    """

    def __init__(self, layers: int, frames: int, tokens: int) -> None:
        if min(layers, frames, tokens) < 1:
            raise ValueError(f"FrozenKV: {layers} layers, {frames} frames and {tokens} tokens must all be 1 or more.")
        self.frames, self.tokens = frames, tokens
        self._slots: list[tuple[Tensor, Tensor] | None] = [None] * layers

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(key.nbytes + value.nbytes for key, value in (slot for slot in self._slots if slot is not None))

    def view(self, queries: Interval, window: Interval) -> FrozenView:
        """The store for a forward of the latent frames ``queries`` that attend to ``window``."""
        return FrozenView(self, queries, window)

    def exchange(
        self, layer: int, key: Tensor, value: Tensor, queries: Interval, window: Interval
    ) -> tuple[Tensor, Tensor]:
        """Keeps ``key`` and ``value`` ``[B, tokens, ...]`` of ``queries`` and returns those of ``window``, as views."""
        kept = self._slot(layer, key, value)
        first, last = queries[0] * self.tokens, queries[1] * self.tokens
        for store, new in zip(kept, (key, value), strict=True):
            store[:, first:last] = new
        return tuple(store[:, window[0] * self.tokens : window[1] * self.tokens] for store in kept)

    def _slot(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, made for tensors like these at first."""
        if self._slots[layer] is None:
            shape = (key.shape[0], self.frames * self.tokens, *key.shape[2:])
            self._slots[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        return self._slots[layer]


class FrozenView:
    """``FrozenKV`` as an attention block sees it for one forward."""

    def __init__(self, store: FrozenKV, queries: Interval, window: Interval) -> None:
        self._store, self._queries, self._window = store, queries, window

    @outside_graphs
    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole window, those just made among them."""
        return self._store.exchange(layer, key, value, self._queries, self._window)


def frozen_bytes(layers: int, tokens: int, width: int, branches: int, element_bytes: int) -> int:
    """Bytes of the keys and values of ``tokens`` tokens of ``width`` channels in all layers and branches."""
    return 2 * layers * tokens * width * branches * element_bytes
