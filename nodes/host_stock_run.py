"""State of one run of a core sampler: every guided call through the engine, a velocity per CFG branch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ..accel.acceleration import Acceleration
from ..accel.call import Call, Decision, Kind
from ..accel.history import SAME_SIGMA
from ..accel.timeline import Timeline
from .host_branches import Branches, Stream, as_video, inside_of
from .host_conditions import shown_branches, signature
from .host_live import Audience
from .job import told_settings
from .stock import CAUSAL, SamplerKind, steps_taken, with_signals


class StockRun:
    """One run of a core sampler. Its two methods are core's wrappers of the same names.

    Args:
        acceleration: what the nodes set. kind: the sampler. table: its noise levels, read before it has them. shape: of
            the latents. options: of the sampler. guider: core's.
    """

    def __init__(
        self, acceleration: Acceleration, kind: SamplerKind, table: list[float], shape: Sequence[int],
        options: Mapping[str, Any], guider: Any,
    ) -> None:  # fmt: skip
        self.acceleration, self.kind, self.table, self.guider = acceleration, kind, table, guider
        self.timeline = _timeline(acceleration, kind, table, shape, options)
        self.audience: Audience | None = None
        self._streams: dict[int, Stream] = {}
        self._place, self._segment, self._iteration, self._start = 0, 0, 0, None
        self._sigma, self._decision = math.inf, Decision.RECOMPUTE

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One guided call; what it asks of the model comes through ``calc_cond_batch``."""
        self._place = 0
        out = executor(*args, **kwargs)
        self.audience.tell()
        return out

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> list[Tensor]:
        """Outputs of the conditionings: from core, or from what is stored. The first of a guided call leads, others
        (context windows, passes of a guidance function) follow."""
        levels = timestep.flatten().tolist()
        shown, forwards = shown_branches(conds, levels[0])
        forward = partial(executor, model, conds, x, timestep, model_options)
        if not shown:
            return forward()
        place, self._place = self._place, self._place + 1
        state = model_options.get("transformer_options", {}).get("ar_state")
        told = (tuple(x.shape), *signature(model, conds, shown, levels[0], model_options))
        given = as_video(x)
        stream = self._streams.get(place)
        if stream is None:
            stream = self._streams[place] = self._stream(place, model, x, model_options, state is not None)
        call = self._call(given.shape[2], levels, state)
        if place == 0:
            self._check_target(len(shown))
            self._lead(stream, call, told)
        elif stream.told != told:
            stream.begin(call, told, self.table)
        stream.denoiser.begin(forward, shown, forwards)
        answer, true = stream.answer(call, given, conds, x, self._decision if place else None)
        if place == 0:
            self._decision = Decision.RECOMPUTE if true else Decision(self.timeline.records[-1].decision)
        if state is not None and not true:
            _advance(state["kv_caches"], x, model.diffusion_model.patch_size)
        return answer

    def finish(self) -> None:
        """The run ended well."""
        total = sum(stream.run.state_bytes for stream in self._streams.values())
        self.timeline.state_bytes = max(self.timeline.state_bytes or 0, total)

    def drop(self) -> None:
        """Lets go of all tensors."""
        self._streams.clear()
        self.guider = None

    def _lead(self, stream: Stream, call: Call, told: tuple) -> None:
        """Before a leading call: the timeline's branches, and a fresh start where stored velocities cannot serve."""
        self._iteration += 1
        self.timeline.branches = max(self.timeline.branches, len(told[2]))
        if call.kind is not Kind.DENOISE:
            return
        sigma = call.sigmas[0]
        changed = stream.told is not None and stream.told[1:] != told[1:]
        if changed:
            self.timeline.settings["conditioning"] = (
                f"it changed at noise level {sigma:.3g} last; what was stored before a change was dropped"
            )
        if stream.told != told or sigma > self._sigma + SAME_SIGMA or stream.segment != call.segment:
            stream.begin(call, told, self.table)
            for follower in self._streams.values():
                follower.told = follower.told if follower is stream else None
        self._sigma = sigma

    def _call(self, frames: int, levels: list[float], state: Mapping[str, Any] | None) -> Call:
        """The guided call that is being made."""
        sigma, steps = levels[0], len(self.table) - 1
        usable = sigma > 0 and max(levels) - min(levels) < SAME_SIGMA
        kind, offset, step = Kind.DENOISE, 0, steps_taken(sigma, self.table)
        if state is not None:
            offset = state["start_frame"]
            begun = self._start == offset
            if sigma == 0.0:
                kind, step = (Kind.COMMIT if begun else Kind.PREFILL), steps + 1
            elif not begun:
                self._segment += self._start is not None
                self._start, self._iteration, self._sigma = offset, 0, math.inf
        return Call(
            kind, self._segment, self._iteration, (0, frames), (sigma,) * frames, (step,) * frames, (usable,) * frames,
            offset, self.kind.family, steps,
        )  # fmt: skip

    def _stream(self, place: int, model: Any, x: Tensor, model_options: dict[str, Any], causal: bool) -> Stream:
        inside = inside_of(self.guider, model, model_options, x, causal)
        network = None if inside is not None else type(model.diffusion_model).__name__
        acceleration, note = with_signals(self.acceleration, network)
        if note and place == 0:
            self.timeline.settings["signal"] = note
        if place and acceleration.scheduler is not None:
            acceleration = replace(acceleration, scheduler=replace(acceleration.scheduler, quality=None))
        told = self.timeline.branches
        stream = Stream(acceleration, Branches(inside), self.timeline)
        self.timeline.branches = told
        return stream

    def _check_target(self, branches: int) -> None:
        scheduler = self.acceleration.scheduler
        if branches > 1 and scheduler is not None and scheduler.quality is not None:
            raise ValueError(
                f"Accelerate AR Video: quality target measures the guided video's error, which {self.kind.name} shows "
                f"at cfg 1 only, and this run has {branches} guidance branches; use high, balanced or fast, cfg 1, or "
                "AR Segment Sampler."
            )


def _advance(kv_caches: Sequence[dict[str, Any]], x: Tensor, patch: Sequence[int]) -> None:
    """Moves the end of core's K/V store as a forward of ``x`` ``[B, C, T, H, W]`` would have."""
    frames, height, width = x.shape[2:]
    for cache in kv_caches:
        cache["end"] += frames * -(-height // patch[1]) * -(-width // patch[2])


def _timeline(
    acceleration: Acceleration, kind: SamplerKind, table: list[float], shape: Sequence[int], options: Mapping[str, Any]
) -> Timeline:
    """An empty timeline that says what was asked for."""
    frames, steps = shape[2] if len(shape) == 5 else 1, len(table) - 1
    block = min(options.get("num_frame_per_block", frames), frames) if kind.name == CAUSAL else frames
    rows = -(-frames // block)
    notes = {"sampler": kind.note} if kind.note else {}
    return Timeline(
        rows=rows, row_unit="chunk", frames_per_row=block, columns=rows * (steps + 1) if kind.name == CAUSAL else steps,
        title=f"{kind.name}, {frames} latent frame{'s' * (frames > 1)}",
        schedule={
            "mode": "core's sampler", "sampler": kind.name, "latent frames": frames, "steps": steps,
            "sigmas": [round(level, 4) for level in table],
        },
        settings=told_settings(acceleration) | notes,
    )  # fmt: skip
