"""What to do to a run: the parts that the acceleration nodes describe, frozen and checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from .attention.ann import AnnConfig
from .attention.prompt import PromptConfig
from .auto import AutoConfig
from .call import Decision
from .chunks import ChunkConfig
from .correct import CorrectionConfig
from .kv.budget import KVBudgetConfig
from .kv.frozen import FrozenConfig
from .late import EXACT, check_when
from .policy import ThresholdPolicy, TriModalConfig, check_warmup
from .predict import Guards, check_prediction
from .signals import HOST_SIGNALS, SIGNALS


@dataclass(frozen=True, slots=True)
class HistoryGuidedConfig:
    """History-Guided Cache (ARCache): hold while the accumulated change of the history tokens stays within ``delta``.

    Attributes:
        delta: threshold >= 0 on the accumulated relative L1; 0 is off.
        signal: ``auto``, ``mod``, ``block0`` or ``current`` (methods as in ``signals.resolve_history_signal``).
        max_skip: most skips in a row.
        warmup: first solver steps of every chunk that are always computed; 2 gives the correction its two points.
        decision: ``exact``, or ``one step late``: with the change of the call before and its trend, so that the host
            never waits for the device (see ``late``); it takes effect where every measured signal's config says so.
    """

    delta: float = 0.10
    signal: str = "auto"
    max_skip: int | None = 5
    warmup: int = 2
    decision: str = EXACT

    def __post_init__(self) -> None:
        ThresholdPolicy(self.delta, self.max_skip)
        check_when("History-Guided Cache", self.decision)
        if self.signal not in ("auto", "mod", "block0", "current"):
            raise ValueError(
                f"History-Guided Cache: signal is {self.signal!r}; use auto, mod, block0 or current "
                "(auto picks by model)."
            )
        check_warmup("History-Guided Cache", self.warmup)


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
        decision: as in ``HistoryGuidedConfig``; signals of the noise levels are known in time either way.

    The defaults are the row "balanced" of ``make bench`` (``tiny-df``, 3.5 times fewer FLOPs).
    """

    thresholds: TriModalConfig = TriModalConfig(0.0, 3.0, decay=1.0, max_skip=4)
    signal: str = "log-signal"
    order: int | str = 2
    guards: Guards = field(default_factory=Guards)
    warmup: int = 1
    reach: float | None = 1.5
    quality: float | str | None = None
    decision: str = EXACT

    def __post_init__(self) -> None:
        check_when("Tri-Modal Scheduler", self.decision)
        if self.quality is not None and self.decision != EXACT:
            raise ValueError(
                f"Tri-Modal Scheduler: decision is {self.decision!r}, but a quality target needs the errors of the "
                f"call before; use {EXACT}, or thresholds in place of the target."
            )
        if self.quality is not None:
            AutoConfig(self.quality)
        known = (*HOST_SIGNALS, *SIGNALS)
        if self.signal not in known:
            raise ValueError(f"Tri-Modal Scheduler: signal is {self.signal!r}; use one of {', '.join(known)}.")
        check_prediction("Tri-Modal Scheduler", self.order, self.reach)
        check_warmup("Tri-Modal Scheduler", self.warmup)


@dataclass(frozen=True, slots=True)
class Acceleration:
    """Everything the acceleration nodes describe; all None computes every call of the full window.

    Attributes:
        history_guided: History-Guided Cache. scheduler: Tri-Modal Scheduler. With both, a call is skipped only where
            both agree, and the scheduler says how.
        correction: Residual Correction, replaces the held velocity on CACHE.
        suffix_window: Active Frame Window: latent frames that have not started are left out of the forward (SCOPE eq.
            8-9).
        frozen_window: Active Frame Window: only latent frames that advance are forwarded; all others answer with the
            K/V of their last forward.
        shared_prefix: Shared Prefix Cache (Ca2-VDM): the history of a segment is forwarded once and answers with kept
            K/V from then on.
        chunks: Chunk Cache: decisions chunk by chunk, in place of ``history_guided`` and ``scheduler``.
        kv_budget: KV Cache Budget: how much K/V a causal model keeps.
        ann: ANN Attention: how much of the kept K/V a query reads. prompt: which prompt tokens it reads.
        replay: decisions to take instead of any policy, one list for the whole run.
        compute_last: whether the last call of a segment is always computed.
    """

    history_guided: HistoryGuidedConfig | None = None
    scheduler: SchedulerConfig | None = None
    correction: CorrectionConfig | None = None
    suffix_window: bool = False
    frozen_window: FrozenConfig | None = None
    shared_prefix: FrozenConfig | None = None
    chunks: ChunkConfig | None = None
    kv_budget: KVBudgetConfig | None = None
    ann: AnnConfig | None = None
    prompt: PromptConfig | None = None
    replay: tuple[Decision, ...] | None = None
    compute_last: bool = True

    def __post_init__(self) -> None:
        others = {"History-Guided Cache": self.history_guided, "Tri-Modal Scheduler": self.scheduler}
        others["a list of decisions"] = self.replay
        other = next((name for name, part in others.items() if part is not None), None)
        if self.chunks is not None and other is not None:
            raise ValueError(
                f"Chunk Cache: decides chunk by chunk, {other} for the whole window; use one of the two on a model."
            )

    @property
    def warmup(self) -> int:
        return max((config.warmup for config in (self.history_guided, self.scheduler) if config is not None), default=0)
