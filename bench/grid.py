"""The measurements of one model: full runs, knobs, rows and times, each stored when it is finished."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from accel.presets import digest
from demo.codec import WEIGHTS
from demo.judge import PATH as JUDGE

from .knobs import probe, turn
from .methods import FULL, METHODS
from .runs import Reference, row
from .scenes import Scene
from .store import Store


@lru_cache
def _measuring() -> str:
    return digest(WEIGHTS / "tiny-codec.safetensors") + digest(JUDGE)


@dataclass(frozen=True, slots=True)
class Task:
    """A row of the table for one clip; ``setting`` is the knob's, None where there is none."""

    method: str
    budget: float | None
    setting: Any
    seed: int


@dataclass(frozen=True, slots=True)
class Grid:
    """Measures one scene into a folder; every method returns what is stored where that is so, and only that where the
    grid is ``closed``."""

    scene: Scene
    folder: Path
    closed: bool = False

    @property
    def store(self) -> Store:
        """The folder's measurements."""
        return Store(self.folder, self.closed)

    def path(self, what: str, method: str, **parts: Any) -> Path:
        """File of a measurement, hashed with plan, weights, codec and judge, and the method's whole configuration."""
        told = {"plan": asdict(self.scene.plan), "weights": self.scene.weights, "measuring": _measuring()}
        if "setting" in parts:
            told["options"] = {
                key: value
                for key, value in METHODS[method].build(parts["setting"], self.scene).items()
                if not callable(value)
            }
        return self.store.path(f"{self.scene.kind}-{what}-{method}", told | parts)

    def full(self, seed: int) -> dict[str, Any]:
        """Row of the run that computes every call; its latents are stored beside it."""
        store, path = self.store, self.path("row", FULL, seed=seed)

        def make() -> dict[str, Any]:
            run = self.scene.run(seed)
            store.write_latents(path, run.latents)
            return row(self.scene, FULL, False, None, seed, Reference.of(run), run)

        return store.get(path, make)

    def reference(self, seed: int) -> Reference:
        """The full run of a clip."""
        figures = self.full(seed)
        latents = self.store.latents(self.path("row", FULL, seed=seed), lambda: self.scene.run(seed).latents)
        return Reference(latents, figures["flops"], figures["seconds"])

    def settings(self, name: str, budgets: tuple[float | None, ...]) -> list[Any]:
        """Where the knob stands for each budget; None where the method does not reach it, or has no knob."""
        method = METHODS[name]

        @cache
        def ratio(setting: Any) -> float:
            if method.rehearsed:
                return probe(method, self.scene, setting)
            path = self.path("probe", name, setting=setting)
            return self.store.get(path, lambda: probe(method, self.scene, setting))

        return [turn(method, budget, ratio) if method.has_budget else None for budget in budgets]

    def row_path(self, task: Task) -> Path:
        return self.path("row", task.method, setting=task.setting, budget=task.budget, seed=task.seed)

    def row(self, task: Task) -> dict[str, Any]:
        """Row of one clip."""
        method = METHODS[task.method]

        def make() -> dict[str, Any]:
            run = self.scene.run(task.seed, **method.build(task.setting, self.scene))
            return row(self.scene, method.name, method.ours, task.budget, task.seed, self.reference(task.seed), run)

        return self.store.get(self.row_path(task), make)

    def time_path(self, task: Task, pairs: int) -> Path:
        return self.path("time", task.method, setting=task.setting, seed=task.seed, pairs=pairs)

    def time(self, task: Task, pairs: int) -> dict[str, float]:
        """Medians of ``time_ratio`` and ``realised`` over interleaved pairs of the full run and the method's.

        One segment that continues clean history, process seconds; the FLOP ratio is that of the same segment.
        """
        scene, method = self.scene.timed(), METHODS[task.method]

        def make() -> dict[str, float]:
            options = method.build(task.setting, scene)
            history = self.reference(task.seed).latents[:, :, : scene.plan.block]
            ratios = []
            for _ in range(pairs):
                full, run = scene.run(task.seed, history), scene.run(task.seed, history, **options)
                flops = full.timeline.totals()["flops"] / run.timeline.totals()["flops"]
                ratios.append((full.seconds / run.seconds, full.seconds / run.seconds / flops))
            times, realised = zip(*ratios, strict=True)
            return {"time_ratio": median(times), "realised": median(realised)}

        return self.store.get(self.time_path(task, pairs), make)
