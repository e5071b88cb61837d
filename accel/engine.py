"""One run: signal -> policy -> hold, predict or forward -> correct -> record, for one guided model call at a time.

What is skipped is skipped outside the model, in velocity space (in x0 space where the sampler re-noises). The engine
never counts steps: everything it needs is in the ``Call``. A ``Run`` is made when sampling starts and dropped when it
ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .acceleration import Acceleration, HistoryGuidedConfig, SchedulerConfig
from .auto import AutoConfig, AutoPolicy
from .call import Call, Decision, Family, Kind
from .chunk_steps import ChunkSteps
from .chunks import REFRESH, ChunkConfig, ChunkPolicies
from .correct import ResidualCorrection, is_scene_cut
from .denoiser import Denoiser
from .followers import Followers
from .graphs import keep_outside
from .history import VelocityHistory
from .kernels.choose import Usage
from .kv.frozen import FrozenConfig, FrozenWindow
from .late import UNMEASURED, LateDecisions
from .policy import FixedPolicy, Policy, ThresholdPolicy, TriModalPolicy, ask, told_reason
from .predict import Guards, hold, predict
from .readback import Readback, on_device
from .readings import Readings
from .run_state import Resumable
from .signals import SIGNALS, SignalMeter, resolve_history_signal
from .timeline import Timeline

__all__ = ["Acceleration", "Denoiser", "HistoryGuidedConfig", "Run", "SchedulerConfig"]


class Run(ChunkSteps, Followers, Readings, Resumable):
    """State of one sampling run: ``begin_segment``, ``step`` for every call, ``end_segment``. Between two calls
    ``ahead`` may be told of the next one, so that what its decision needs is on its way to the host early."""

    def __init__(self, acceleration: Acceleration, denoiser: Denoiser, timeline: Timeline) -> None:
        keep_outside()
        self.acceleration, self.denoiser, self.timeline = acceleration, denoiser, timeline
        timeline.branches = denoiser.branches
        self._kernels = Usage()
        self._frames = 0
        self._history: VelocityHistory | None = None
        self._correction = ResidualCorrection(acceleration.correction) if acceleration.correction else None
        self._policies: list[tuple[Policy, str | None]] = []
        self._replay = FixedPolicy(acceleration.replay, rewind=False) if acceleration.replay is not None else None
        self._auto = _auto_policy(acceleration)
        self._meter: SignalMeter | None = None
        self._readback = Readback()
        self._checked: list[int] = []
        self._unsent: Tensor | None = None
        self._looked: tuple[Call, Tensor, int] | None = None
        self._ahead_seconds = 0.0
        self._late: LateDecisions | None = None
        self._openings: dict[str, list[float]] = {}
        self._frozen: FrozenWindow | None = None
        self._chunks: ChunkPolicies | None = None
        self._planned: dict[tuple[float, ...], list[float]] = {}

    def begin_segment(
        self, segment: int, frames: int, prefix: int, chunk: int = 1, table: Sequence[float] = ()
    ) -> None:
        """Forgets step state: a segment of ``frames`` latent frames starts, of which ``prefix`` are clean history.

        ``chunk`` latent frames are denoised together, each along the noise levels ``table``."""
        if self._history is None or self._history.frames != frames:
            self._history = VelocityHistory(frames, depth=3)
        self._history.clear()
        self._frames, self._readback, self._checked = frames, Readback(), []
        self._unsent = self._looked = None
        self._levels: dict[int, float] = {}
        self._watching = self._correction is not None
        self._policies = self._make_policies(prefix > 0)
        for policy, _ in self._policies:
            policy.reset()
        self._frozen = self._freeze(frames, prefix)
        config = self.acceleration.chunks
        self._chunks = ChunkPolicies(config, frames, chunk) if config is not None else None
        self._table = tuple(float(level) for level in table)
        names = [name for _, name in self._policies if name in SIGNALS]
        if config is not None and config.signal in ("current", "latent"):
            names.append(config.signal)
        if self._frozen is not None and self._frozen.signal in SIGNALS:
            names.append(self._frozen.signal)
        self._meter = SignalMeter(names, frames) if names else None
        self._late = LateDecisions(self.timeline) if self._decides_late else None

    def step(self, call: Call, x: Tensor) -> tuple[Tensor, bool]:
        """Velocity of the window ``x`` ``[B, C, T, H, W]`` and whether it is true (computed, not held or predicted)."""
        started, self._ahead_seconds = time.perf_counter() - self._ahead_seconds, 0.0
        if call.kind is not Kind.DENOISE:
            velocity = self.denoiser.velocity(call, x)
            self._record(call, None, started, flops=self.denoiser.flops(call, x.shape[2]))
            return velocity, True
        if self._chunks is not None:
            return self._step_chunks(call, x, started)
        measured, cost = self._measure(call, x)
        if self._frozen is not None:
            self._frozen.look(call, measured)
        self._watch_for_cut(call, measured)
        forced = self._forced(call)
        decision, told = self._decide(call, measured, forced)
        fields = told | {"flops": cost}
        if decision is Decision.RECOMPUTE:
            velocity, extra = self._forward(call, x)
            fields |= extra | {"flops": cost + extra["flops"]}
            self._remember(call, x, velocity)
        else:
            velocity, extra = self._skip(call, x, decision)
            fields |= extra
        self._record(call, decision, started, **fields)
        return velocity, decision is Decision.RECOMPUTE

    @property
    def state_bytes(self) -> int:
        """Bytes of everything kept between calls, without frozen K/V."""
        parts = (self._history, self._meter, self._correction, self._auto)
        return sum(part.nbytes for part in parts if part is not None)

    def _freeze(self, frames: int, prefix: int) -> FrozenWindow | None:
        """What is kept of this segment's K/V; a causal model's store holds its history already."""
        window, shared = self.acceleration.frozen_window, self.acceleration.shared_prefix
        if self.acceleration.chunks is not None and window is None:
            window = FrozenConfig(REFRESH if shared is None else 0.0)
        if (window is None and shared is None) or not self.denoiser.recomputes_history:
            return None
        config = window or shared
        if window is not None and shared is not None:
            config = min((window, shared), key=lambda one: one.refresh or math.inf)
        signal = config.signal
        if signal == "history":
            signal = self._history_reading("auto", prefix > 0)
        refusal = self.denoiser.keep(frames)
        if refusal is not None:
            self.timeline.settings["frozen K/V"] = refusal
            return None
        return FrozenWindow(config.refresh, signal, frames, prefix, window is not None, config.commit)

    def _forward(self, call: Call, x: Tensor, chunks: Sequence[tuple[int, int]] | None = None) -> tuple[Tensor, dict]:
        """Velocity of the window from the model, and what is told of it; where K/V are kept, the velocity of latent
        frames that were not forwarded is 0. ``chunks`` are those to compute, where decisions are made per chunk."""
        if self._frozen is None:
            return self.denoiser.velocity(call, x), {"flops": self.denoiser.flops(call, x.shape[2])}
        asked = self._frozen.queries(call, chunks)
        velocity, flops = None, 0
        for first, last in asked:
            part = replace(call, queries=(first, last))
            answer = self.denoiser.velocity(part, x)
            flops += self.denoiser.flops(part, last - first)
            if (first, last) == call.frames:
                velocity = answer
                continue
            if velocity is None:
                velocity = torch.zeros(x.shape, dtype=answer.dtype, device=answer.device)
            velocity[:, :, first - call.frames[0] : last - call.frames[0]] = answer
        told = [(call.offset + first, call.offset + last) for first, last in asked]
        return velocity, {"flops": flops, "queries": tuple(told)}

    def _make_policies(self, has_history: bool) -> list[tuple[Policy, str | None]]:
        if self._replay is not None:
            return [(self._replay, None)]
        policies: list[tuple[Policy, str | None]] = []
        guided, scheduler = self.acceleration.history_guided, self.acceleration.scheduler
        if scheduler is not None:
            name = scheduler.signal
            if name.startswith("history-"):
                name = self._history_reading(name.removeprefix("history-"), has_history)
            policies.append((self._auto or TriModalPolicy(scheduler.thresholds), name))
        if guided is not None:
            name = self._history_reading(guided.signal, has_history)
            policies.append((ThresholdPolicy(guided.delta, guided.max_skip), name))
        return policies

    def _history_reading(self, choice: str, has_history: bool) -> str:
        """Signal that stands for the history in this segment; the timeline says where it is another one."""
        name, note = resolve_history_signal(
            choice, has_history, self.denoiser.shares_time, self.denoiser.recomputes_history
        )
        if note:
            self.timeline.settings["history signal"] = note
        return name

    def _watch_for_cut(self, call: Call, measured: dict[str, float]) -> None:
        """A segment whose first measured increment towers over those of the segments before it is a scene cut: the
        first segment's trajectory says nothing about it. Noise-level signals look the same in every scene."""
        for name, value in measured.items() if self._watching else ():
            if name in SIGNALS and math.isfinite(value):
                self._watching = False
                openings = self._openings.setdefault(name, [])
                if is_scene_cut(value, openings):
                    self._correction.mark_scene_cut(call.segment)
                else:
                    openings.append(value)

    def _forced(self, call: Call) -> str | None:
        """Why this call must be computed whatever the policy would say."""
        if not self._policies:
            return "off"
        active = [step for step, flag in zip(call.steps, call.active, strict=True) if flag]
        if not active or min(self._history.count(call.active_frames)) == 0:
            return "new frames"
        if min(active) <= self.acceleration.warmup and self._replay is None:
            return "warm-up"
        if self.acceleration.compute_last and min(active) == call.total_steps and self._replay is None:
            return "last"
        return None

    def _decide(self, call: Call, measured: dict[str, float], forced: str | None) -> tuple[Decision, dict]:
        if self._auto is not None:
            self._auto.look(call, self._history)
        if forced is None and self._late is not None and not self._late.ready:
            forced = UNMEASURED
        if forced is not None:
            for policy, _ in self._policies:
                policy.force()
            increment = next(iter(measured.values()), None)
            return Decision.RECOMPUTE, {"forced": None if forced == "off" else forced, "increment": increment}
        can_predict = max(self._history.count(call.active_frames)) >= 2 and call.family is not Family.RENOISE
        if self._late is not None:
            decision, policy, value = self._late.ask(self._policies, measured, can_predict, self._too_far(call))
        else:
            read = [(policy, measured.get(name, 0.0) if name is not None else 0.0) for policy, name in self._policies]
            decision, policy, value = ask(read, can_predict, self._too_far(call))
        told = {"discrepancy": policy.accumulated, "threshold": policy.threshold, "increment": value, "forced": None}
        if decision is Decision.RECOMPUTE:
            told["forced"] = told_reason(policy.reason, call.family is Family.RENOISE, self._holds)
        return decision, told

    @property
    def _holds(self) -> bool:
        """Whether the decisions ever hold a velocity."""
        scheduler = self.acceleration.scheduler
        return self._replay is not None or scheduler is None or scheduler.thresholds.tau_cache > 0.0

    def _too_far(self, call: Call, frames: tuple[int, int] | None = None) -> bool:
        """Whether predicting this call would extrapolate some frame of the interval (default: the active ones) beyond
        the ``reach`` of the configuration."""
        config = self._predictor
        if config is None or config.reach is None:
            return False
        frames = frames or call.active_frames
        targets = call.sigmas[frames[0] - call.frames[0] : frames[1] - call.frames[0]]
        for target, levels in zip(targets, self._history.levels(frames), strict=True):
            if len(levels) > 1 and levels[0] - target > config.reach * (levels[1] - levels[0]):
                return True
        return False

    @property
    def _predictor(self) -> ChunkConfig | SchedulerConfig | None:
        """The configuration that says how a velocity is predicted."""
        return self.acceleration.chunks or self.acceleration.scheduler

    def _remember(
        self,
        call: Call,
        x: Tensor,
        velocity: Tensor,
        true: Sequence[bool] | None = None,
        groups: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """True velocities (x0 where the sampler re-noises) of the active frames enter the history.

        Args:
            true: latent frames of the window whose velocity was computed; None for the active ones.
            groups: intervals whose skip errors are told, one timeline record each; None for the active ones.
        """
        if not self._policies and self._chunks is None:
            return
        kept = velocity
        if call.family is Family.RENOISE:
            kept = x.float() - _per_frame(call.sigmas, x) * velocity.float()
        groups = groups or [call.active_frames]
        expected, learned = zip(*(self._expected(call, kept, frames) for frames in groups), strict=True)
        mask = call.active if true is None else [a and t for a, t in zip(call.active, true, strict=True)]
        self._history.push(call.frames, call.sigmas, kept, mask)
        if self._correction is not None:
            self._correction.record(call.segment, call.frames, call.sigmas, velocity, mask)
        parts = [velocity[:, :, first - call.frames[0] : last - call.frames[0]] for first, last in groups]
        finite = torch.stack([torch.isfinite(part).all() for part in parts]).all().float()
        self._checked = []
        self._unsent = torch.cat((torch.stack((finite, *expected)), *sum(learned, [])))

    def _expected(self, call: Call, kept: Tensor, frames: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
        """Relative L2 error of what a skip would have answered in place of ``kept`` (the window's true velocity, or
        x0), over an interval; NaN where there was nothing to answer with for one of its frames. Beside it what the
        quality target learns from the same comparison. Both stay on the device: they are read with the next signal."""
        (start, end), nothing = frames, torch.full((), math.nan, device=kept.device)
        counts = self._history.count(frames) if end > start else ()
        known = counts.index(0) if 0 in counts else len(counts)
        if known == 0:
            return nothing, []
        part, first = (start, start + known), start - call.frames[0]
        config, true = self._predictor, kept[:, :, first : first + known].float()
        if config is None or call.family is Family.RENOISE or max(counts) < 2:
            answer = hold(self._history, part)
        else:
            targets = call.sigmas[first : first + known]
            answer = predict(self._history, part, targets, config.order, config.guards)
        missed = answer - true
        learned = [self._auto.learn(part, missed, self._frames)] if self._auto is not None else []
        return missed.norm() / true.norm() if known == len(counts) else nothing, learned

    def _skip(self, call: Call, x: Tensor, decision: Decision) -> tuple[Tensor, dict]:
        """Velocity of the window without the model; 0 for latent frames that do not move."""
        frames = call.active_frames
        part, fields = self._answer(call, x, decision, frames)
        first, last = frames[0] - call.frames[0], frames[1] - call.frames[0]
        if (first, last) == (0, x.shape[2]):
            return part, fields
        velocity = torch.zeros(x.shape, dtype=part.dtype, device=part.device)
        velocity[:, :, first:last] = part
        return velocity, fields

    def _answer(self, call: Call, x: Tensor, decision: Decision, frames: tuple[int, int]) -> tuple[Tensor, dict]:
        """Velocity of an interval without the model, and what is told of it."""
        first, last = frames[0] - call.frames[0], frames[1] - call.frames[0]
        targets = call.sigmas[first:last]
        fields: dict = {}
        if call.family is Family.RENOISE:
            window = x[:, :, first:last].float()
            return (window - hold(self._history, frames)) / _per_frame(targets, window), fields
        if decision is Decision.PREDICT:
            config = self._predictor
            fields["order"] = config.order if config is not None else 1
            guards = config.guards if config is not None else Guards()
            return predict(self._history, frames, targets, fields["order"], guards), fields
        if self._correction is not None:
            part, fields["corrected"] = self._correction.apply(self._history, call.segment, frames, targets)
            if self._correction.note:
                self.timeline.settings["correction"] = self._correction.note
            return part, fields
        return hold(self._history, frames), fields

    def _record(self, call: Call, decision: Decision | None, started: float, **fields) -> None:
        self._note_full(call)
        self.timeline.record(call, decision, seconds=time.perf_counter() - started, **fields)
        if decision is Decision.RECOMPUTE:
            self._checked.append(len(self.timeline.records) - 1)

    def _note_full(self, call: Call) -> None:
        """Adds what an unaccelerated run computes at this call, the state it would not have, and the kernels used."""
        width = self._frames if call.kind is Kind.DENOISE else call.frames[1] - call.frames[0]
        self.timeline.flops_full += self.denoiser.full_flops(call, width)
        kernels = self._kernels.line()
        if kernels:
            self.timeline.settings["kernels"] = kernels
        self.timeline.state_bytes = max(self.timeline.state_bytes or 0, self.state_bytes)
        if self._frozen is not None or self.denoiser.kept_bytes:
            self.timeline.kv_bytes = max(self.timeline.kv_bytes or 0, self.denoiser.kept_bytes)


def _per_frame(sigmas: Iterable[float], x: Tensor) -> Tensor:
    return on_device(tuple(sigmas), x.device, torch.float32)[None, None, :, None, None]


def _auto_policy(acceleration: Acceleration) -> AutoPolicy | None:
    """The policy of a quality target, where one is set and no decisions are replayed."""
    config = acceleration.scheduler
    if config is None or config.quality is None or acceleration.replay is not None:
        return None
    return AutoPolicy(AutoConfig(config.quality), config.thresholds.max_skip)
