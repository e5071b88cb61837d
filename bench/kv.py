"""``python -m bench.kv``: what a bounded K/V store costs, saves and does to the video, on ``tiny-causal`` and counted.

Parts: ``growth`` (bytes and FLOPs of a block as a video grows, and at full size), ``endless`` (10,000 latent frames:
resident memory and seconds a block), ``speed`` (against unbounded K/V), ``quality`` (see ``bench.kv_quality``) and
``append`` (bytes written for a block). Writes ``bench/results/kv.json`` and ``kv.md``, with ``--quick`` into ``quick``.
What is finished is stored in ``rows`` and found again, so a run that was stopped goes on. What must hold is checked,
and stops the command with an AssertionError: bounded means that bytes and FLOPs stay within the budget, the same for
ever where nothing depends on the video, and that memory and time of an endless run do not grow.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .kv_growth import appended, budgets, counted, overheads, summed_up, watched
from .kv_quality import Clips, measure, summary
from .kv_speed import check_endless, compared, endless
from .kv_table import markdown
from .scenes import CAUSAL, Scene
from .store import Store

RESULTS = Path(__file__).with_name("results")
SEED = 1
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured; lengths in latent frames.

    Attributes:
        budget: of growth, endless and speed. watched: length of the rollouts whose growth is watched. endless: of the
            one that does not end. histories: at which blocks are timed. rounds: blocks timed of each strategy.
        clips: of quality, whose budget is a quarter of their length.
    """

    budget: int
    watched: int
    endless: int
    histories: tuple[int, ...]
    rounds: int
    clips: Clips


WHOLE = Extent(16, 400, 10_000, (100, 500, 2500), 12, Clips(8, 64, 8))
QUICK = Extent(12, 24, 60, (20,), 2, Clips(1, 16, 4))


class Measurement:
    """The parts, each from what is stored where that is so.

    Args:
        extent: how much. rows: where finished measurements lie. report: takes a line about what was just done.
    """

    def __init__(self, extent: Extent, rows: Path, report: Report) -> None:
        self.extent, self.report, self._store = extent, report, Store(rows)
        self._weights = {"weights": Scene(CAUSAL, None).weights}

    def growth(self) -> dict[str, Any]:
        """Rollouts of every strategy, and full-size counts."""
        rows = []
        for name, config in budgets(self.extent.budget).items():
            parts = {"config": repr(config), "latents": self.extent.watched, "seed": SEED}
            make = partial(watched, name, config, self.extent.watched, SEED)
            rows.append(summed_up(self._get(f"growth-{name}", parts, make)))
        return {"watched": rows, "counted": counted(), "overheads": overheads()}

    def endless(self) -> dict[str, Any]:
        """One rollout without an end."""
        parts = {"latents": self.extent.endless, "budget": self.extent.budget, "seed": SEED}
        return self._get("endless", parts, partial(endless, *parts.values(), self.report))

    def speed(self) -> list[dict[str, Any]]:
        """Blocks timed at every length of history."""
        rows = []
        for history in self.extent.histories:
            parts = {"history": history, "budget": self.extent.budget, "rounds": self.extent.rounds, "seed": SEED}
            rows.append(self._get("speed", parts, partial(compared, *parts.values())))
        return rows

    def quality(self) -> dict[str, Any]:
        """Every strategy on every clip."""
        return summary(measure(self.extent.clips, self._get), self.extent.clips)

    def append(self) -> dict[str, Any]:
        """Bytes written for a block."""
        return appended()

    def _get(self, name: str, parts: dict[str, Any], make: Callable[[], Any]) -> Any:
        path = self._store.path(f"kv-{name.replace(' ', '-')}", parts | self._weights)
        told = self._store.get(path, make)
        self.report(f"{name}: {', '.join(f'{key} {value}' for key, value in parts.items() if key != 'config')}")
        return told


PARTS = ("growth", "endless", "speed", "quality", "append")


def conditions() -> str:
    """When and on what this was measured."""
    return f"{date.today()}, {platform.machine()} CPU, one thread, torch {torch.__version__.split('+')[0]}"


def run(extent: Extent, parts: tuple[str, ...], folder: Path, rows: Path, report: Report) -> dict[str, Any]:
    """Measures ``parts`` and writes them into ``folder`` beside those that are there, one after the other."""
    measurement, path = Measurement(extent, rows, report), folder / "kv.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        told[part] = getattr(measurement, part)()
        told.setdefault("conditions", {})[part] = conditions()
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        (folder / "kv.md").write_text(markdown(told) + "\n", encoding="utf-8")
    if "endless" in parts:
        check_endless(told["endless"])
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)} (all of them)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument("--output", type=Path, help="where the tables go; stored rows are always shared")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
    torch.set_num_threads(1)
    extent = QUICK if arguments.quick else WHOLE
    folder = arguments.output or RESULTS / ("quick" if arguments.quick else "")
    parts = tuple(arguments.parts) or PARTS
    told = run(extent, parts, folder, RESULTS / "rows", lambda line: print(line, flush=True))
    print(markdown(told))


if __name__ == "__main__":
    main()
