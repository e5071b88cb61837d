"""One run: signal -> policy -> hold, predict or forward -> correct -> record, for one guided model call at a time.

What is skipped is skipped outside the model, in velocity space (in x0 space where the sampler re-noises). The engine
never counts steps: everything it needs is in the ``Call``. A ``Run`` is made when sampling starts and dropped when it
ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .auto import AutoConfig, AutoPolicy
from .call import Call, Decision, Family, Kind
from .correct import CorrectionConfig, ResidualCorrection, is_scene_cut
from .history import VelocityHistory
from .policy import FixedPolicy, Policy, ThresholdPolicy, TriModalConfig, TriModalPolicy
from .predict import Guards, hold, predict
from .signals import HOST_SIGNALS, SIGNALS, SignalMeter, level_step, remember_levels, resolve_history_signal
from .timeline import Timeline


class Denoiser(Protocol):
    """What a model has to offer. Latents are ``[B, C, T, H, W]``; a guided call runs every CFG branch.

    Attributes:
        branches: CFG branches of a guided call, 1 or 2.
        shares_time: whether history tokens carry the time embedding of the frames being denoised (FramePack).
        recomputes_history: whether clean history frames are part of the window (False where a K/V store holds them).
    """

    branches: int
    shares_time: bool
    recomputes_history: bool

    def velocity(self, call: Call, x: Tensor) -> Tensor:
        """Guided velocity of the window ``x``."""
        ...

    def feature(self, kind: str, call: Call, x: Tensor) -> Tensor:
        """What a signal looks at, ``[B, T, ...]`` one entry a latent frame; kinds as in ``signals.SIGNALS``."""
        ...

    def flops(self, call: Call, frames: int) -> int:
        """Cost of this call for a window of ``frames`` latent frames, all branches (``flops.CONVENTION``)."""
        ...

    def feature_flops(self, kind: str, call: Call, frames: int) -> int:
        """Cost of ``feature``."""
        ...


@dataclass(frozen=True, slots=True)
class HistoryGuidedConfig:
    """History-Guided Cache (ARCache): hold while the accumulated change of the history tokens stays within ``delta``.

    Attributes:
        delta: threshold >= 0 on the accumulated relative L1; 0 is off.
        signal: ``auto``, ``mod``, ``block0`` or ``current`` (methods as in ``signals.resolve_history_signal``).
        max_skip: most skips in a row.
        warmup: first solver steps of every chunk that are always computed; 2 gives the correction its two points.
    """

    delta: float = 0.10
    signal: str = "auto"
    max_skip: int | None = 5
    warmup: int = 2

    def __post_init__(self) -> None:
        ThresholdPolicy(self.delta, self.max_skip)
        if self.signal not in ("auto", "mod", "block0", "current"):
            raise ValueError(
                f"History-Guided Cache: signal is {self.signal!r}; use auto, mod, block0 or current "
                "(auto picks by model)."
            )
        _check_warmup("History-Guided Cache", self.warmup)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Tri-Modal Scheduler (SCOPE): hold, predict or compute by two thresholds on one signal.

    Attributes:
        thresholds: SCOPE's tau_cache, tau_predict, decay and cap, in units of ``signal``.
        signal: a key of ``signals.HOST_SIGNALS`` (from the noise levels alone) or of ``signals.SIGNALS``.
        order: of the prediction: 1, 2 (SCOPE eq. 7), ``newton2`` or ``auto``.
        guards: clipping of predictions.
        reach: a prediction further ahead than this many times the distance of the last two computed noise levels
            (``D / D0`` of SCOPE's stability check) is computed instead; None never is.
        warmup: first solver steps of every chunk that are always computed.
        quality: PSNR in dB to hold, or a level of ``auto.QUALITIES``: the run finds its own thresholds from the errors
            it measures, and of ``thresholds`` only ``max_skip`` counts. None takes ``thresholds`` as they are.

    The defaults are the row "balanced" of ``make bench`` (``tiny-df``, 3.5 times fewer FLOPs).
    """

    thresholds: TriModalConfig = TriModalConfig(0.0, 3.0, decay=1.0, max_skip=4)
    signal: str = "log-signal"
    order: int | str = 1
    guards: Guards = field(default_factory=Guards)
    warmup: int = 1
    reach: float | None = 1.5
    quality: float | str | None = None

    def __post_init__(self) -> None:
        if self.quality is not None:
            AutoConfig(self.quality)
        known = (*HOST_SIGNALS, *SIGNALS)
        if self.signal not in known:
            raise ValueError(f"Tri-Modal Scheduler: signal is {self.signal!r}; use one of {', '.join(known)}.")
        if self.order not in (1, 2, "newton2", "auto"):
            raise ValueError(f"Tri-Modal Scheduler: order is {self.order!r}; use 1, 2, newton2 or auto.")
        if self.reach is not None and not self.reach > 0:
            raise ValueError(f"Tri-Modal Scheduler: reach is {self.reach}; use a number above 0, or None for no limit.")
        _check_warmup("Tri-Modal Scheduler", self.warmup)


@dataclass(frozen=True, slots=True)
class Acceleration:
    """Everything the acceleration nodes describe; all None computes every call of the full window.

    Attributes:
        history_guided: History-Guided Cache. scheduler: Tri-Modal Scheduler. With both, a call is skipped only where
            both agree, and the scheduler says how.
        correction: Residual Correction, replaces the held velocity on CACHE.
        suffix_window: Active Frame Window: latent frames that have not started are left out of the forward (SCOPE eq.
            8-9).
        replay: decisions to take instead of any policy, one list for the whole run.
        compute_last: whether the last call of a segment is always computed.
    """

    history_guided: HistoryGuidedConfig | None = None
    scheduler: SchedulerConfig | None = None
    correction: CorrectionConfig | None = None
    suffix_window: bool = False
    replay: tuple[Decision, ...] | None = None
    compute_last: bool = True

    @property
    def skips(self) -> bool:
        """Whether any call can be skipped at all."""
        return self.history_guided is not None or self.scheduler is not None or self.replay is not None

    @property
    def warmup(self) -> int:
        return max((config.warmup for config in (self.history_guided, self.scheduler) if config is not None), default=0)


class Run:
    """State of one sampling run. ``begin_segment`` before the first call of each segment, then ``step`` for every
    call."""

    def __init__(self, acceleration: Acceleration, denoiser: Denoiser, timeline: Timeline) -> None:
        self.acceleration, self.denoiser, self.timeline = acceleration, denoiser, timeline
        timeline.branches = denoiser.branches
        self._frames = 0
        self._history: VelocityHistory | None = None
        self._correction = ResidualCorrection(acceleration.correction) if acceleration.correction else None
        self._policies: list[tuple[Policy, str | None]] = []
        self._replay = FixedPolicy(acceleration.replay, rewind=False) if acceleration.replay is not None else None
        self._auto = _auto_policy(acceleration)
        self._meter: SignalMeter | None = None
        self._checks: Tensor | None = None
        self._checked = 0
        self._openings: dict[str, list[float]] = {}

    def begin_segment(self, segment: int, frames: int, prefix: int) -> None:
        """Forgets step state: a segment of ``frames`` latent frames starts, of which ``prefix`` are clean history."""
        if self._history is None or self._history.frames != frames:
            self._history = VelocityHistory(frames, depth=3)
        self._history.clear()
        self._frames, self._checks = frames, None
        self._levels: dict[int, float] = {}
        self._watching = self._correction is not None
        self._policies = self._make_policies(prefix > 0)
        for policy, _ in self._policies:
            policy.reset()
        names = [name for _, name in self._policies if name in SIGNALS]
        self._meter = SignalMeter(names, frames) if names else None

    def step(self, call: Call, x: Tensor) -> tuple[Tensor, bool]:
        """Velocity of the window ``x`` ``[B, C, T, H, W]`` and whether it is true (computed, not held or predicted)."""
        started = time.perf_counter()
        if call.kind is not Kind.DENOISE:
            velocity = self.denoiser.velocity(call, x)
            self._record(call, None, started, flops=self.denoiser.flops(call, x.shape[2]))
            return velocity, True
        measured, cost = self._measure(call, x)
        self._watch_for_cut(call, measured)
        forced = self._forced(call)
        decision, told = self._decide(call, measured, forced)
        fields = told | {"flops": cost}
        if decision is Decision.RECOMPUTE:
            velocity = self.denoiser.velocity(call, x)
            fields["flops"] += self.denoiser.flops(call, x.shape[2])
            self._remember(call, x, velocity)
        else:
            velocity, extra = self._skip(call, x, decision)
            fields |= extra
        self._record(call, decision, started, **fields)
        return velocity, decision is Decision.RECOMPUTE

    @property
    def state_bytes(self) -> int:
        """Bytes of everything kept between calls."""
        parts = (self._history, self._meter, self._correction, self._auto)
        return sum(part.nbytes for part in parts if part is not None)

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

    def _measure(self, call: Call, x: Tensor) -> tuple[dict[str, float], int]:
        """Increment of every signal since the last call, in one readback, and what the measuring cost."""
        if not self._policies or self._replay is not None:
            return {}, 0
        measured = {name: level_step(name, self._levels, call) for _, name in self._policies if name in HOST_SIGNALS}
        remember_levels(self._levels, call)
        cost, pending = 0, []
        if self._meter is not None:
            features = {}
            for kind in self._meter.kinds:
                features[kind] = self.denoiser.feature(kind, call, x)
                cost += self.denoiser.feature_flops(kind, call, x.shape[2])
            pending.append(self._meter.measure(features, call))
        checked = self._checks is not None
        if checked:
            pending.append(self._checks)
            self._checks = None
        values = torch.cat(pending).tolist() if pending else []
        finite = True
        if checked:
            error, finite = values.pop(), values.pop() == 1.0
            self.timeline.told_error(self._checked, error)
            if self._auto is not None:
                split = len(self._meter.names) if self._meter is not None else 0
                values, learned = values[:split], values[split:]
                self._auto.told(learned)
                self.timeline.settings["auto"] = self._auto.note()
        if self._meter is not None:
            measured |= dict(zip(self._meter.names, values, strict=True))
        return (measured if finite else dict.fromkeys(measured, float("nan"))), cost

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
        if forced is not None:
            for policy, _ in self._policies:
                policy.force()
            increment = next(iter(measured.values()), None)
            return Decision.RECOMPUTE, {"forced": None if forced == "off" else forced, "increment": increment}
        counts = self._history.count(call.active_frames)
        can_predict = max(counts) >= 2 and call.family is not Family.RENOISE
        answers = []
        for policy, name in self._policies:
            value = measured.get(name, 0.0) if name is not None else 0.0
            decision = policy.decide(value, can_cache=True, can_predict=can_predict)
            if decision is Decision.PREDICT and self._too_far(call):
                policy.force()
                decision, policy.reason = Decision.RECOMPUTE, "reach"
            answers.append((decision, policy, value))
        severity = (Decision.CACHE, Decision.PREDICT, Decision.RECOMPUTE)
        decision, policy, value = max(answers, key=lambda answer: severity.index(answer[0]))
        told = {"discrepancy": policy.accumulated, "threshold": policy.threshold, "increment": value, "forced": None}
        if decision is Decision.RECOMPUTE:
            told["forced"] = policy.reason if policy.reason not in (None, "threshold") else None
            if call.family is Family.RENOISE and (told["forced"] == "no history" or self._only_predicts):
                told["forced"] = "fresh noise"
            for other in self._policies:
                if other[0] is not policy:
                    other[0].force()
        return decision, told

    @property
    def _only_predicts(self) -> bool:
        """Whether the thresholds never hold a velocity, so that where none can be predicted every call is computed."""
        scheduler = self.acceleration.scheduler
        return self._replay is None and scheduler is not None and scheduler.thresholds.tau_cache == 0.0

    def _too_far(self, call: Call) -> bool:
        """Whether predicting this call would extrapolate some active frame beyond ``SchedulerConfig.reach``."""
        config = self.acceleration.scheduler
        if config is None or config.reach is None:
            return False
        frames = call.active_frames
        targets = call.sigmas[frames[0] - call.frames[0] : frames[1] - call.frames[0]]
        for target, levels in zip(targets, self._history.levels(frames), strict=True):
            if len(levels) > 1 and levels[0] - target > config.reach * (levels[1] - levels[0]):
                return True
        return False

    def _remember(self, call: Call, x: Tensor, velocity: Tensor) -> None:
        """True velocities (x0 where the sampler re-noises) of the active frames enter the history."""
        if not self._policies:
            return
        kept = velocity
        if call.family is Family.RENOISE:
            kept = x.float() - _per_frame(call.sigmas, x) * velocity.float()
        expected, learned = self._expected(call, kept)
        self._history.push(call.frames, call.sigmas, kept, call.active)
        if self._correction is not None:
            self._correction.record(call.segment, call.frames, call.sigmas, velocity, call.active)
        self._checks = torch.cat((*learned, torch.stack((torch.isfinite(velocity).all().float(), expected))))
        self._checked = len(self.timeline.records)

    def _expected(self, call: Call, kept: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Relative L2 error of what a skip would have answered in place of ``kept`` (the window's true velocity, or
        x0), over the active frames; NaN where there was nothing to answer with for one of them. Beside it what the
        quality target learns from the same comparison. Both stay on the device: they are read with the next signal."""
        (start, end), nothing = call.active_frames, torch.full((), math.nan, device=kept.device)
        counts = self._history.count((start, end)) if end > start else ()
        known = counts.index(0) if 0 in counts else len(counts)
        if known == 0:
            return nothing, []
        frames, first = (start, start + known), start - call.frames[0]
        config, true = self.acceleration.scheduler, kept[:, :, first : first + known].float()
        if config is None or call.family is Family.RENOISE or max(counts) < 2:
            answer = hold(self._history, frames)
        else:
            targets = call.sigmas[first : first + known]
            answer = predict(self._history, frames, targets, config.order, config.guards)
        missed = answer - true
        learned = [self._auto.learn(frames, missed, self._frames)] if self._auto is not None else []
        return missed.norm() / true.norm() if known == len(counts) else nothing, learned

    def _skip(self, call: Call, x: Tensor, decision: Decision) -> tuple[Tensor, dict]:
        frames = call.active_frames
        first, last = frames[0] - call.frames[0], frames[1] - call.frames[0]
        targets = call.sigmas[first:last]
        fields: dict = {}
        if call.family is Family.RENOISE:
            window = x[:, :, first:last].float()
            part = (window - hold(self._history, frames)) / _per_frame(targets, window)
        elif decision is Decision.PREDICT:
            config = self.acceleration.scheduler
            order = config.order if config is not None else 1
            part = predict(self._history, frames, targets, order, config.guards if config is not None else Guards())
            fields["order"] = order
        elif self._correction is not None:
            part, fields["corrected"] = self._correction.apply(self._history, call.segment, frames, targets)
            if self._correction.note:
                self.timeline.settings["correction"] = self._correction.note
        else:
            part = hold(self._history, frames)
        if (first, last) == (0, x.shape[2]):
            return part, fields
        velocity = torch.zeros(x.shape, dtype=part.dtype, device=part.device)
        velocity[:, :, first:last] = part
        return velocity, fields

    def _record(self, call: Call, decision: Decision | None, started: float, **fields) -> None:
        width = self._frames if call.kind is Kind.DENOISE else call.frames[1] - call.frames[0]
        self.timeline.flops_full += self.denoiser.flops(call, width)
        self.timeline.state_bytes = max(self.timeline.state_bytes or 0, self.state_bytes)
        self.timeline.record(call, decision, seconds=time.perf_counter() - started, **fields)


def _per_frame(sigmas: Iterable[float], x: Tensor) -> Tensor:
    return torch.tensor(tuple(sigmas), dtype=torch.float32, device=x.device)[None, None, :, None, None]


def _auto_policy(acceleration: Acceleration) -> AutoPolicy | None:
    """The policy of a quality target, where one is set and no decisions are replayed."""
    config = acceleration.scheduler
    if config is None or config.quality is None or acceleration.replay is not None:
        return None
    return AutoPolicy(AutoConfig(config.quality), config.thresholds.max_skip)


def _check_warmup(node: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{node}: warm-up is {value!r}; at least 1 step of every chunk must be computed.")
