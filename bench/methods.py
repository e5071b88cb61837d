"""What is compared: every method, its one knob, and how its setting becomes a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from accel.chunks import ChunkConfig
from accel.correct import CorrectionConfig
from accel.engine import Acceleration, HistoryGuidedConfig, SchedulerConfig
from accel.kv.frozen import FrozenConfig
from accel.policy import TriModalConfig
from accel.presets import PRESETS, quality_target
from demo.generate import fewer_steps as shorter

from .peers import PEERS
from .peers.base import Peer
from .rehearsal import rehearse
from .scenes import CAUSAL, PLANS, Scene

FULL, FEWER_STEPS = "full", "fewer-steps"
FLOOR, CEILING = 0.93, 1.15  # FLOP ratios that count as a budget's, as parts of it
FRAME_MODELS = tuple(kind for kind in PLANS if kind != CAUSAL)
STAIRCASE_MODELS = ("tiny-df",)  # the schedules in which latent frames wait for their turn
VIDEO_FREE_PEERS = ("fixed interval", "random schedule", "TaylorSeer-lite", "SCOPE momentum", "SCOPE auto")
PUBLISHED = {
    "slow": (0.12, 0.30),
    "fast": (0.18, 0.42),
}  # SCOPE on SkyReels-V2 (arXiv 2604.02979), tau_cache, tau_predict


@dataclass(frozen=True, slots=True)
class Method:
    """One row, or one row a budget.

    Attributes:
        name: as in the table.
        build: keyword arguments of ``Scene.run`` for a setting of the knob.
        ours: whether it is a setting of this project, not a rival.
        models: the embedded models it applies to.
        main: whether it is measured at every budget instead of a few.
        settings: values of the knob, mildest first; empty where there is no knob and one row without a budget.
        rehearsed: whether decisions follow from noise levels alone, so that the knob can be turned without a model.
        rival: whether its knob is the budget itself, and it gets no fewer FLOPs than any run of that budget.
    """

    name: str
    build: Callable[[Any, Scene], dict[str, Any]]
    ours: bool = False
    models: tuple[str, ...] = tuple(PLANS)
    main: bool = False
    settings: tuple[Any, ...] = ()
    rehearsed: bool = False
    rival: bool = False

    @property
    def has_budget(self) -> bool:
        return self.rival or bool(self.settings)


def geometric(low: float, high: float, count: int) -> tuple[float, ...]:
    """``count`` numbers from ``low`` to ``high`` in equal ratios, rounded to four digits."""
    return tuple(float(f"{low * (high / low) ** (index / (count - 1)):.4g}") for index in range(count))


def fewer_steps(budget: float, scene: Scene) -> dict[str, Any]:
    """The fewest solver steps that cost at least what any run of the budget may (``demo.generate.fewer_steps``)."""
    plan, records = scene.plan, rehearse(scene).records
    allowed = sum(record.flops for record in records) / (FLOOR * budget)
    if scene.kind != CAUSAL:
        return {"plan": shorter(plan, int(allowed), records[0].flops)}
    committed = sum(record.flops for record in records if record.decision == "commit")
    per_step = sum(record.flops for record in records if record.decision == "recompute") / plan.steps
    return {"plan": replace(plan, steps=min(plan.steps, max(1, ceil((allowed - committed) / per_step))))}


def history_guided(source: str | None) -> Callable[[float, Scene], dict[str, Any]]:
    """History-Guided Cache at a threshold, with Residual Correction from ``source`` or without."""
    correction = CorrectionConfig(source) if source else None
    return lambda delta, scene: {"acceleration": Acceleration(HistoryGuidedConfig(delta), correction=correction)}


def tri_modal(order: int | str) -> Callable[[tuple, Scene], dict[str, Any]]:
    """Tri-Modal Scheduler on ``log-signal``; a setting is (most skips in a row, tau_predict, reach), or ``FAR`` for the
    reach of the model's preset "fast"."""

    def build(setting: tuple[int, float, float | str], scene: Scene) -> dict[str, Any]:
        skips, tau, reach = setting
        reach = _of_preset("fast", scene).scheduler.reach if reach == FAR else reach
        thresholds = TriModalConfig(0.0, tau, decay=1.0, max_skip=skips)
        return {"acceleration": Acceleration(scheduler=SchedulerConfig(thresholds, order=order, reach=reach))}

    return build


def scope(window: bool, thresholds: tuple[float, float] = PUBLISHED["fast"]) -> Callable[[float | None, Scene], dict]:
    """SCOPE as published: timestep signal, order 2, decay 0.75, at most 5 skips; a setting scales both thresholds."""

    def build(scale: float | None, scene: Scene) -> dict[str, Any]:
        cache, predict = (value * (scale or 1.0) for value in thresholds)
        scheduler = SchedulerConfig(TriModalConfig(cache, predict), signal="timestep", order=2, reach=None)
        return {"acceleration": Acceleration(scheduler=scheduler, suffix_window=window)}

    return build


def chunk_cache(refresh: float) -> Callable[[tuple, Scene], dict[str, Any]]:
    """Chunk Cache on ``log-signal``, its kept K/V renewed above ``refresh``; settings as of ``tri_modal``."""

    def build(setting: tuple[int, float, float], scene: Scene) -> dict[str, Any]:
        skips, tau, reach = setting
        chunks = ChunkConfig(TriModalConfig(0.0, tau, decay=1.0, max_skip=skips), reach=reach)
        return {"acceleration": Acceleration(chunks=chunks, frozen_window=FrozenConfig(refresh))}

    return build


def flowcache(threshold: float, scene: Scene) -> dict[str, Any]:
    """FlowCache as published for SkyReels-V2 (arXiv 2602.10825): every chunk holds by its own timestep embedding, five
    warm-up steps, K/V never renewed; attention sees the whole window, as the model was trained."""
    rule = ChunkConfig(TriModalConfig(threshold, threshold, max_skip=None), "timestep", reach=None, warmup=5)
    return {"acceleration": Acceleration(chunks=rule, frozen_window=FrozenConfig(commit=False))}


def frozen(setting: tuple[int, float, float | str], scene: Scene) -> dict[str, Any]:
    """Tri-Modal Scheduler and Active Frame Window with frozen K/V; settings as of ``tri_modal``."""
    acceleration = tri_modal(2)(setting, scene)["acceleration"]
    return {"acceleration": replace(acceleration, frozen_window=FrozenConfig(REFRESH))}


def auto(decibels: float, scene: Scene) -> dict[str, Any]:
    """The quality target of Accelerate AR Video, in dB."""
    return {"acceleration": quality_target(decibels)}


def _preset(name: str, **window: Any) -> Callable[[None, Scene], dict[str, Any]]:
    return lambda _, scene: {"acceleration": replace(_of_preset(name, scene), **window)}


def _of_preset(name: str, scene: Scene) -> Acceleration:
    return PRESETS.find(name, scene.kind, "causal" if scene.kind == CAUSAL else "frames").acceleration


def _peers() -> Iterator[Method]:
    """Every peer that takes the plan as it is; fewer steps have a row of their own."""
    for peer in (peer for peer in PEERS.values() if peer.steps is None):
        yield Method(
            peer.name, _from_peer(peer), models=peer.regimes, settings=_finer(peer.settings),
            rehearsed=peer.name in VIDEO_FREE_PEERS,
        )  # fmt: skip


def _from_peer(peer: Peer) -> Callable[[Any, Scene], dict[str, Any]]:
    return lambda setting, scene: {"make_run": peer.make(setting)}


def _finer(settings: tuple[Any, ...]) -> tuple[Any, ...]:
    """A continuous knob in 40 equal ratios over its range; one that counts calls as it is."""
    if all(isinstance(setting, float) for setting in settings):
        return geometric(settings[0], settings[-1], 40)
    return settings


REFRESH = 1.0  # of kept K/V, the default of the node
WINDOWS = {
    "suffix-window": {"suffix_window": True},
    "frozen-kv": {"frozen_window": FrozenConfig(REFRESH)},
    "frozen-kv-never-renewed": {"frozen_window": FrozenConfig()},
    "shared-prefix": {"shared_prefix": FrozenConfig(REFRESH)},
}
DECIBELS = tuple(float(value) for value in range(60, 17, -1))
DELTAS = geometric(0.01, 3.0, 40)
SCALES = geometric(0.02, 5.0, 50)
FAR = "far"
PATH = (  # from preset "high" (first) over "balanced" (fourth) past "fast"
    (1, 1.5, 1.5), (2, 2.0, 1.5), (3, 3.0, 1.5), (4, 3.0, 1.5), (4, 9.0, FAR), (5, 9.0, FAR), (6, 9.0, FAR),
    (7, 9.0, FAR), (8, 9.0, FAR), (9, 9.0, FAR),
)  # fmt: skip
CHUNK_PATH = (
    (1, 1.5, 1.5), (2, 2.0, 1.5), (3, 3.0, 1.5), (4, 3.0, 1.5), (5, 4.0, 2.0), (6, 6.0, 2.0), (7, 6.0, 2.5),
    (8, 9.0, 2.5), (9, 9.0, 3.0),
)  # fmt: skip


def _preset_rows() -> Iterator[Method]:
    for name in dict.fromkeys(preset.name for preset in PRESETS):
        models = tuple(preset.model for preset in PRESETS if preset.name == name)
        yield Method(name, _preset(name), ours=True, models=models)
    for name in ("balanced", "fast"):
        for window, parts in WINDOWS.items():
            yield Method(f"{name}-{window}", _preset(name, **parts), ours=True, models=STAIRCASE_MODELS)


def _scope_rows() -> Iterator[Method]:
    yield Method("scope", scope(False), main=True, settings=SCALES, rehearsed=True)
    for name, thresholds in PUBLISHED.items():
        yield Method(f"scope-{name}", scope(False, thresholds))
        yield Method(f"scope-{name}-suffix-window", scope(True, thresholds), models=STAIRCASE_MODELS)


def all_methods() -> dict[str, Method]:
    """Every row of the table but ``full``, by name."""
    rows = [
        Method(FEWER_STEPS, fewer_steps, main=True, rival=True),
        *_peers(),
        *_scope_rows(),
        Method("history-guided-cache", history_guided(None), True, main=True, settings=DELTAS),
        Method("history-guided-sigma-linear", history_guided("sigma_linear"), True, main=True, settings=DELTAS),
        Method("history-guided-seg1-l1", history_guided("seg1_l1"), True, settings=DELTAS),
        Method("tri-modal", tri_modal(2), True, main=True, settings=PATH, rehearsed=True),
        *(
            Method(f"tri-modal-order-{order}", tri_modal(order), True, settings=PATH, rehearsed=True)
            for order in (1, "newton2", "auto")
        ),
        Method("frozen-kv", frozen, True, STAIRCASE_MODELS, main=True, settings=PATH, rehearsed=True),
        Method("chunk-cache", chunk_cache(2.0), True, STAIRCASE_MODELS, main=True, settings=CHUNK_PATH, rehearsed=True),
        Method("flowcache", flowcache, False, STAIRCASE_MODELS, main=True, settings=SCALES, rehearsed=True),
        Method("auto", auto, True, main=True, settings=DECIBELS),
        *_preset_rows(),
    ]
    return {method.name: method for method in rows}


METHODS = all_methods()
