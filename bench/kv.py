"""``python -m bench.kv [--quick] [parts ...]``: what bounding the K/V of a causal rollout costs and buys.

Parts: ``growth`` (bytes and FLOPs of a block at any length), ``append`` (bytes moved by appending a block, and what a
store takes beside keys and values), ``speed`` (blocks timed against the unbounded store), ``endless`` (memory and
block times of 10,000 latent frames), ``quality`` (every store against the unbounded one and the simulation).

Everything runs on the embedded ``tiny-causal`` in four steps with fresh noise after each, as it is meant to be used;
full-size figures are counted. What must be equal is asserted: a measurement that contradicts it stops. Finished parts,
and in ``quality`` finished clips, lie in ``rows/`` and are not measured again. Writes ``kv.json``, ``kv.md`` and
``kv-*.svg``.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from accel.kv.memory import make_memory

from .kv_counts import append, growth
from .kv_quality import measure
from .kv_report import write
from .kv_rollout import BLOCK, QUICK, WHOLE, Extent, compared, tiny_shape
from .kv_speed import endless, speed
from .scenes import CAUSAL, Scene
from .store import Store

RESULTS = Path(__file__).with_name("results")
Say = Callable[[str], None]


def quality(extent: Extent, store: Store, say: Say) -> dict[str, Any]:
    """Rows of every store on every clip, clip by clip."""
    stores, rows = compared(extent.budget, extent.frames), []
    for seed in range(1, extent.clips + 1):
        for one in stores:
            parts = _depends(extent) | {"store": one, "seed": seed}
            path = store.path(f"kv-quality-{seed}-{one.name.replace(' ', '-')}", parts)
            rows.append(store.get(path, lambda one=one, seed=seed: measure(one, stores[0], seed, extent.frames)))
            say(f"quality: clip {seed}, {one.name}")
    shape = tiny_shape()
    planned = {
        one.name: make_memory(one.config, shape, 1, BLOCK, extent.frames, one.ann).planned_bytes for one in stores
    }
    return {"clips": extent.clips, "frames": extent.frames, "planned_bytes": planned, "rows": rows}


PARTS: dict[str, Callable[[Extent, Store, Say], dict[str, Any]]] = {
    "growth": lambda extent, store, say: growth(extent, say),
    "append": lambda extent, store, say: append(),
    "speed": lambda extent, store, say: speed(extent, say),
    "endless": lambda extent, store, say: endless(extent, say),
    "quality": quality,
}


def run(extent: Extent, parts: list[str], folder: Path, say: Say = print) -> dict[str, Any]:
    """Measures ``parts`` and writes all that is known into ``folder``; returns it."""
    torch.set_num_threads(1)
    store = Store(folder / "rows")
    paths = {name: _path(store, name, extent) for name in PARTS}
    for name in parts:
        store.get(paths[name], lambda name=name: PARTS[name](extent, store, say) | conditions())
        say(f"{name}: finished")
    told = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
    say(write(folder, told, extent))
    return told


def conditions() -> dict[str, str]:
    """When and on what a part was measured."""
    return {
        "date": date.today().isoformat(),
        "conditions": f"{platform.machine()} CPU, one thread, torch {torch.__version__.partition('+')[0]}, float32; "
        f"tiny-causal {Scene(CAUSAL, None).weights}",
    }


def _path(store: Store, name: str, extent: Extent) -> Path:
    """Where a finished part lies; how many clips there are concerns ``quality`` alone."""
    told = extent if name == "quality" else replace(extent, clips=0)
    return store.path(f"kv-{name}", _depends(extent) | {"extent": told})


def _depends(extent: Extent) -> dict[str, Any]:
    return {"weights": Scene(CAUSAL, None).weights, "budget": extent.budget, "frames": extent.frames}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS) + "; all where none is named")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into results/quick")
    parser.add_argument("--clips", type=int, help="clips of the quality part")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
    extent = QUICK if arguments.quick else WHOLE
    if arguments.clips:
        extent = replace(extent, clips=arguments.clips)
    folder = arguments.output or (RESULTS / "quick" if arguments.quick else RESULTS)
    run(extent, arguments.parts or list(PARTS), folder, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
