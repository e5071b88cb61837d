"""Everything that is measured: which rows, in which order, by how many processes, and about how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .grid import Grid, Task
from .methods import METHODS, Method
from .rehearsal import rehearse
from .scenes import PLANS, QUICK_PLANS, Scene
from .store import NotMeasured


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured.

    Attributes:
        plans: by model. main: budgets (target FLOP ratios) of main rows. rest: of the others. clips: seeds.
        pairs: timed pairs. rest_models: models on which the other rows are measured.
    """

    plans: dict[str, Any]
    main: tuple[float, ...]
    rest: tuple[float, ...]
    clips: int
    pairs: int
    rest_models: tuple[str, ...] = tuple(PLANS)

    def budgets(self, kind: str, method: Method) -> tuple[float | None, ...]:
        """Budgets of a method on a model; None is the one row of a method without a knob."""
        if kind not in method.models:
            return ()
        if not method.has_budget:
            return (None,)
        if method.main:
            return self.main
        return self.rest if kind in self.rest_models else ()


WHOLE = Extent(PLANS, (2.0, 2.5, 3.0, 4.0, 5.0), (2.5, 4.0), clips=16, pairs=3)
QUICK = Extent(QUICK_PLANS, (1.5, 2.0), (2.0,), clips=2, pairs=1, rest_models=("tiny-df",))
GUESS, PROBES = 3.0, 3  # for the estimate: FLOP ratio of a method without a budget, and runs that turn a knob once


def one_thread() -> None:
    """What every process of a measurement starts with."""
    torch.set_num_threads(1)


def _call(job: tuple[Grid, str, tuple]) -> Any:
    """What the grid has; None where it is closed and this was not measured."""
    grid, name, arguments = job
    try:
        return getattr(grid, name)(*arguments)
    except NotMeasured:
        return None


def _each(jobs: list[tuple[Grid, str, tuple]], workers: int) -> Iterable[Any]:
    """Results of ``getattr(grid, name)(*arguments)``, in order."""
    if workers == 1:
        yield from map(_call, jobs)
        return
    with ProcessPoolExecutor(workers, initializer=one_thread) as pool:
        yield from pool.map(_call, jobs)


class Bench:
    """The measurements of the chosen models and methods.

    Args:
        rows: folder of what is finished. workers: processes, one thread each. closed: measure nothing; ``run`` leaves
            out what is not finished.
    """

    def __init__(
        self, extent: Extent, models: list[str], methods: list[str], rows: Path, workers: int, closed: bool = False
    ) -> None:
        self.extent, self.workers = extent, workers
        self.grids = {kind: Grid(Scene(kind, extent.plans[kind]), rows, closed) for kind in models}
        self.methods = [METHODS[name] for name in methods]
        self.seeds = list(range(1, extent.clips + 1))

    def wanted(self, kind: str) -> list[tuple[Method, tuple[float | None, ...]]]:
        """Methods of one model and their budgets."""
        pairs = ((method, self.extent.budgets(kind, method)) for method in self.methods)
        return [(method, budgets) for method, budgets in pairs if budgets]

    def work(self, kind: str) -> float:
        """About how many full runs of a model its measurements amount to, when nothing is stored yet."""
        grid, wanted = self.grids[kind], self.wanted(kind)
        shares = [1 / (budget or GUESS) for _, budgets in wanted for budget in budgets]
        segment = rehearse(grid.scene.timed()).totals()["flops"] / rehearse(grid.scene).totals()["flops"]
        timed = segment * self.extent.pairs * (len(shares) + sum(shares))
        probed = sum(len(budgets) for method, budgets in wanted if method.settings and not method.rehearsed)
        return len(self.seeds) * (1 + sum(shares)) + timed + probed * PROBES / GUESS

    def estimate(self) -> str:
        """Core-minutes of everything, from one timed run of each model."""
        minutes = {
            kind: grid.full(self.seeds[0])["seconds"] / 60 * self.work(kind) for kind, grid in self.grids.items()
        }
        parts = ", ".join(f"{kind} {value:.0f}" for kind, value in minutes.items())
        total = sum(minutes.values())
        return f"about {total:.0f} core-minutes if nothing is stored yet ({parts}), {self.workers} at a time"

    def run(self, say: Callable[[str], Any] = print) -> tuple[list[dict[str, Any]], dict[str, dict[str, list[float]]]]:
        """All rows, and by model which budgets each method does not reach."""
        rows, missing = [], {}
        for kind, grid in self.grids.items():
            full = list(_each([(grid, "full", (seed,)) for seed in self.seeds], self.workers))
            if None in full:
                say(f"{kind} not measured")
                continue
            rows += [figures | {"time_ratio": 1.0} for figures in full]
            wanted = self.wanted(kind)
            found = _each([(grid, "settings", (method.name, budgets)) for method, budgets in wanted], self.workers)
            reached, missing[kind] = [], {}
            for (method, budgets), settings in zip(wanted, found, strict=True):
                if settings is None:
                    say(f"{kind} {method.name} not measured")
                    continue
                for budget, setting in zip(budgets, settings, strict=True):
                    if setting is None and method.has_budget:
                        missing[kind].setdefault(method.name, []).append(budget)
                    else:
                        reached.append((method.name, budget, setting))
            rows += self._measure(kind, grid, reached, say)
        return rows, missing

    def _measure(self, kind: str, grid: Grid, reached: list[tuple], say: Callable[[str], Any]) -> list[dict[str, Any]]:
        timing = [(grid, "time", (Task(*entry, self.seeds[0]), self.extent.pairs)) for entry in reached]
        tasks = [Task(*entry, seed) for entry in reached for seed in self.seeds]
        times = dict(zip(reached, _each(timing, self.workers), strict=True))
        results, rows = _each([(grid, "row", (task,)) for task in tasks], self.workers), []
        for method, budget, setting in reached:
            figures, time = list(islice(results, len(self.seeds))), times[method, budget, setting]
            known = time is not None and None not in figures
            rows += [one | time for one in figures] if known else []
            level = "" if budget is None else f" {budget:g}x"
            say(f"{kind} {method}{level} {'done' if known else 'not measured'}")
        return rows
