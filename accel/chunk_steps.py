"""The part of a run that decides chunk by chunk (see ``chunks``)."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from .call import Call, Decision, Kind
from .chunks import ChunkDecision, active_chunks
from .signals import HOST_SIGNALS, level_step, planned_changes, remember_levels


class ChunkSteps:
    """Steps of a ``Run`` with a decision for each active chunk; the run's own members do the rest."""

    def _step_chunks(self, call: Call, x: Tensor, started: float) -> tuple[Tensor, list[bool]]:
        """``step`` with a decision for each active chunk; whether the velocity is true is said per latent frame."""
        changes, cost = self._chunk_changes(call, x)
        if self._frozen is not None:
            self._frozen.look(call, changes)
        plan = self._chunks.decide(call, changes, self._history.count, lambda frames: self._too_far(call, frames))
        if self._frozen is not None and self._frozen.due:
            self._chunks.compute_all(plan, "refresh")
        wanted = [chunk.frames for chunk in plan if chunk.decision is Decision.RECOMPUTE]
        velocity, told = self._forward(call, x, wanted) if wanted else (None, {"flops": 0})
        if velocity is not None and len(wanted) < len(plan):
            velocity = velocity.clone()
        for chunk in plan:
            if chunk.decision is Decision.RECOMPUTE:
                continue
            part, fields = self._answer(call, x, chunk.decision, chunk.frames)
            chunk.told |= fields
            if velocity is None:
                velocity = torch.zeros(x.shape, dtype=part.dtype, device=part.device)
            velocity[:, :, chunk.frames[0] - call.frames[0] : chunk.frames[1] - call.frames[0]] = part
        true = [any(start <= frame < end for start, end in wanted) for frame in range(*call.frames)]
        if wanted:
            self._remember(call, x, velocity, true, wanted)
        self._record_chunks(call, plan, told | {"flops": told["flops"] + cost}, started)
        return velocity, true

    def _chunk_changes(self, call: Call, x: Tensor) -> tuple[dict, float]:
        """Change of every active chunk (by its first latent frame) since the call before, in at most one readback, and
        what the measuring cost; also the change of the signal that renews frozen K/V, by its name."""
        config, chunks = self.acceleration.chunks, active_chunks(call, self._chunks.size)
        changes: dict = {}
        cost = 0
        if config.signal in HOST_SIGNALS:
            for frames in chunks:
                part = _only(call, frames)
                changes[frames[0]] = level_step(config.signal, self._levels, part)
            remember_levels(self._levels, call)
        elif config.signal == "timestep":
            table, cost = self._plan(call, x)
            for frames in chunks:
                part = _only(call, frames)
                step = next(step for step, flag in zip(part.steps, part.active, strict=True) if flag)
                changes[frames[0]] = table[step - 1]
        names: list = list(self._meter.names) if self._meter is not None else []
        by_chunk = config.signal in names
        if by_chunk:
            names[:1] = [frames[0] for frames in chunks]
        values, finite, metered = self._metered(call, x)
        changes |= dict(zip(names, values, strict=True))
        cost += metered
        return (changes if finite else dict.fromkeys(changes, math.nan)), cost

    def _plan(self, call: Call, x: Tensor) -> tuple[list[float], int]:
        """Change of the timestep embedding at every step of a chunk, and what it cost now: it is planned once a run."""
        known = self._planned.get(self._table)
        if known is not None:
            return known, 0
        one = x[:, :, :1]

        def at(sigma: float) -> Call:
            return Call(Kind.DENOISE, call.segment, 0, (0, 1), (sigma,), (1,), (True,), call.offset, call.family, 1)

        levels = self._table[:-1]
        known = planned_changes(lambda sigma: self.denoiser.feature("timestep", at(sigma), one), levels)
        self._planned[self._table] = known
        return known, sum(self.denoiser.feature_flops("timestep", at(sigma), 1) for sigma in levels)

    def _record_chunks(self, call: Call, plan: list[ChunkDecision], told: dict, started: float) -> None:
        """One record a chunk; a forward's cost and time are shared by the chunks it computed, by their length."""
        computed = [chunk for chunk in plan if chunk.decision is Decision.RECOMPUTE] or plan
        self._note_full(call)
        width = sum(chunk.frames[1] - chunk.frames[0] for chunk in computed)
        flops, seconds = told.pop("flops"), time.perf_counter() - started
        for chunk in plan:
            fields = dict(chunk.told)
            if any(chunk is one for one in computed):
                share = chunk.frames[1] - chunk.frames[0]
                fields |= {"flops": flops * share // width, "seconds": seconds * share / width} | told
                flops, seconds, width = flops - fields["flops"], seconds - fields["seconds"], width - share
            self.timeline.record(call, chunk.decision, chunk.frames, **fields)
            if chunk.decision is Decision.RECOMPUTE:
                self._checked.append(len(self.timeline.records) - 1)


def _only(call: Call, frames: tuple[int, int]) -> Call:
    """The part of a call that is about some of its latent frames."""
    part = slice(frames[0] - call.frames[0], frames[1] - call.frames[0])
    return replace(
        call, frames=frames, sigmas=call.sigmas[part], steps=call.steps[part], active=call.active[part], queries=None
    )
