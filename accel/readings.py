"""The part of a run that reads from the device: one small vector a call, and no waiting where nothing needs it.

A vector holds the signals of a call (all groups, measured on one CFG branch) and what the forward before it has to say
of itself. It is sent as soon as the input of the call is known, that is right after the solver's update, and waited for
when the call's decision needs it.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from .call import Call, Kind
from .chunks import active_chunks
from .late import LATE
from .readback import Label
from .signals import HOST_SIGNALS, SIGNALS, level_step, remember_levels


class Readings:
    """What a ``Run`` knows of the device; the run's own members do the rest."""

    def ahead(self, call: Call, x: Tensor) -> None:
        """Measures the call that comes next: its numbers are on their way while the host does other things. ``step``
        then has to be given the same call and the same tensor."""
        if call.kind is Kind.DENOISE:
            started = time.perf_counter()
            self._looked = (call, x, self._look(call, x))
            self._ahead_seconds = time.perf_counter() - started

    def end_segment(self) -> None:
        """The last call of a segment was made."""
        if self._late is not None:
            self._late.arrived(self._increments(*self._read(0)))

    @property
    def _decides_late(self) -> bool:
        """Whether there are decisions on numbers from the device, and all of them may be taken one step late."""
        configs = [part for part in (self.acceleration.scheduler, self.acceleration.history_guided) if part is not None]
        pairs = zip(configs, self._policies, strict=True) if self._replay is None else ()
        measured = [config for config, (_, name) in pairs if name in SIGNALS]
        needed = self._frozen is not None and self._frozen.signal in SIGNALS
        return bool(measured) and not needed and all(config.decision == LATE for config in measured)

    def _measure(self, call: Call, x: Tensor) -> tuple[dict[str, float], int]:
        """Increment of every signal since the last call, and what the measuring cost; where decisions are late, those
        from the device are of the call before, and none at the first."""
        if (not self._policies or self._replay is not None) and self._meter is None:
            return {}, 0
        known = {name: level_step(name, self._levels, call) for _, name in self._policies if name in HOST_SIGNALS}
        remember_levels(self._levels, call)
        values, finite, cost = self._metered(call, x)
        measured = self._increments(values, finite)
        if self._late is not None:
            self._late.arrived(measured)
        return (known if finite else dict.fromkeys(known, math.nan)) | measured, cost

    def _increments(self, values: list[float], finite: bool) -> dict[str, float]:
        """What a vector says of each signal; NaN where a forward before it was not finite."""
        if self._meter is None or not values:
            return {}
        return dict(zip(self._meter.names, values if finite else [math.nan] * len(values), strict=True))

    def _metered(self, call: Call, x: Tensor) -> tuple[list[float], bool, int]:
        """What the meter says (see ``SignalMeter.measure``), whether the forwards known by now were finite, and what
        the measuring cost."""
        looked, self._looked = self._looked, None
        cost = looked[2] if looked is not None and looked[0] == call and looked[1] is x else self._look(call, x)
        if self._late is not None:
            return *self._read(1), cost
        waits = self._meter is not None or self._auto is not None
        return *self._read(0 if waits else None), cost

    def _look(self, call: Call, x: Tensor) -> int:
        """Sends the vector of a call, if there is anything to send; returns what the measuring cost."""
        parts, label, cost = [], Label(), 0
        if self._meter is not None:
            by_chunk = self._chunks is not None and self.acceleration.chunks.signal in self._meter.names
            groups = active_chunks(call, self._chunks.size) if by_chunk else None
            features = {kind: self.denoiser.feature(kind, call, x) for kind in self._meter.kinds}
            cost = sum(self.denoiser.feature_flops(kind, call, x.shape[2]) for kind in self._meter.kinds)
            parts.append(self._meter.measure(features, call, groups))
            label.signals = len(parts[0])
        if self._unsent is not None:
            parts.append(self._unsent)
            label.checked = self._checked
            self._unsent = None
        if parts:
            self._readback.send(torch.cat(parts), label)
        return cost

    def _forwards_were_finite(self) -> bool:
        """Whether the forwards known by now were, for a call that is decided without being measured."""
        if self._unsent is not None:
            self._readback.send(self._unsent, Label(checked=self._checked))
            self._unsent = None
        return self._read(None)[1]

    def _read(self, leave: int | None) -> tuple[list[float], bool]:
        """Signals of the last vector that is there, and whether the forwards told of were finite; their skip errors go
        into the timeline. ``leave`` as of ``Readback.arrived``."""
        signals, finite = [], True
        for values, label in self._readback.arrived(leave):
            signals, (ok, *numbers) = values[: label.signals], values[label.signals :] or [1.0]
            finite = finite and ok == 1.0
            for index, error in zip(label.checked, numbers, strict=False):
                self.timeline.told_error(index, error)
            if self._auto is not None and label.checked:
                self._auto.told(numbers[len(label.checked) :])
                self.timeline.settings["auto"] = self._auto.note()
        return signals, finite
