"""Runs the AR Segment Sampler inside ComfyUI with faults thrown at it, for test_faults.py; facts go to the last line.

Arguments: what to run (a function below) and the folder with the checkpoints ``frames`` and ``causal``.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import comfy.ldm.wan.ar_model
import comfy.ldm.wan.model
import comfy.model_management
import torch
from run_in_comfy import pack_module

sys.path.append(str(Path(__file__).parent))
from fault_loops import LOOPS, Loop, accelerated, load, sample  # noqa: E402
from leftovers import Snapshot, Storages, census  # noqa: E402

FOLDER = str(Path(pack_module().__file__).parent)
BLOCKS = (comfy.ldm.wan.model.WanAttentionBlock, comfy.ldm.wan.ar_model.CausalWanAttentionBlock)
Progress = importlib.import_module(".nodes.host_progress", pack_module().__name__).Progress
facts: dict[str, Any] = {}


def stop() -> None:
    comfy.model_management.interrupt_current_processing()


def broken() -> None:
    raise RuntimeError("broken on purpose")


def full() -> None:
    raise torch.OutOfMemoryError("as a GPU would")


@contextmanager
def before_each(owners: tuple[type, ...], name: str, act: Callable[[], None]) -> Iterator[None]:
    """``act`` before every call of a method."""

    def acting(original: Callable) -> Callable:
        def method(*args: Any, **named: Any) -> Any:
            act()
            return original(*args, **named)

        return method

    originals = [vars(owner)[name] for owner in owners]
    for owner, original in zip(owners, originals, strict=True):
        setattr(owner, name, acting(original))
    try:
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            setattr(owner, name, original)


def at(number: int, fault: Callable[[], None], seen: list[int]) -> Callable[[], None]:
    """Counts in ``seen``, and does ``fault`` at the count of ``number``."""

    def act() -> None:
        seen[0] += 1
        if seen[0] == number:
            fault()

    return act


class Fixture:
    """One loop on one MODEL, and what it makes when nothing goes wrong."""

    def __init__(self, name: str) -> None:
        self.name, self.loop = name, LOOPS[name]
        self.loaded = load(self.loop)
        self.model = accelerated(self.loop, self.loaded)
        self.expected, self.settings = sample(self.loop, accelerated(self.loop, load(self.loop)))
        assert torch.isfinite(self.expected).all() and self.expected.std() > 0
        assert torch.equal(sample(self.loop, self.model, f"{name}/first")[0], self.expected)
        self.runs = 0

    def count(self, owners: tuple[type, ...], name: str) -> int:
        """Calls of a method in a whole run."""
        seen = [0]
        with before_each(owners, name, at(0, broken, seen)):
            sample(self.loop, self.model, f"{self.name}/counted")
        return seen[0]

    def places(self) -> Counter[str]:
        """Where the pack allocates in a whole run, and how often."""
        found: Counter[str] = Counter()
        with Storages(FOLDER, lambda place: found.update([place])):
            sample(self.loop, self.model, f"{self.name}/placed")
        return found

    def faulty(self, told: dict[str, Any], case: str, method=None, act=None, allocating=None) -> str:
        """One run with a fault, and what it left behind, into ``told``; returns how the run ended."""
        self.runs += 1
        prefix = f"{self.name}/{self.runs}"
        before = Snapshot(self.loaded, self.model)
        gc.collect()
        gc.freeze()
        gc.disable()
        watch = Storages(FOLDER, allocating)
        ended = "finished"
        try:
            with before_each(*method, act) if method else nullcontext(), watch:
                sample(self.loop, self.model, prefix)
        except (comfy.model_management.InterruptProcessingException, Exception) as error:
            ended = type(error).__name__
            told["said"][str(error)] += 1
        finally:
            comfy.model_management.interrupt_current_processing(False)
        told["waiting for the collector"] += [[case, *one] for one in (*watch.alive(), *census())]
        gc.collect()
        gc.enable()
        told["alive"] += [[case, *one] for one in (*watch.alive(), *census())]
        told["changed"] += [[case, one] for one in before.changes(Snapshot(self.loaded, self.model))]
        told["cases"] += 1
        told["ended"][ended] += 1
        again = sample(self.loop, self.model, prefix)[0]
        if not torch.equal(again, self.expected):
            told["different"].append(case)
        if self.loop.stream and not torch.equal(sample(self.loop, self.model, f"{prefix}/anew")[0], self.expected):
            told["different"].append(f"{case}, not resumed")
        return ended


def empty() -> dict[str, Any]:
    lists = {key: [] for key in ("waiting for the collector", "alive", "changed", "different")}
    return {"cases": 0, "ended": Counter(), "said": Counter(), **lists}


def in_forwards(fixture: Fixture, fault: Callable[[], None], some: Callable[[int], list[int]]) -> dict[str, Any]:
    """A fault before transformer blocks of the run, each counted through all forwards."""
    told = empty()
    told["of"] = fixture.count(BLOCKS, "forward")
    for number in some(told["of"]):
        fixture.faulty(told, f"block {number}", (BLOCKS, "forward"), at(number, fault, [0]))
    return told


def between_calls(fixture: Fixture, some: Callable[[int], list[int]]) -> dict[str, Any]:
    """An interrupt after model calls of the run, skipped ones too."""
    told = empty()
    told["of"] = fixture.count((Progress,), "__call__")
    for number in some(told["of"]):
        fixture.faulty(told, f"call {number}", ((Progress,), "__call__"), at(number, stop, [0]))
    return told


def at_allocations(fixture: Fixture, some: Callable[[Counter[str]], list[tuple[str, int]]]) -> dict[str, Any]:
    """No memory at allocations of the pack's own."""
    told = empty()
    found = fixture.places()
    told["of"] = found
    for place, number in some(found):
        act = at(number, full, [0])
        fixture.faulty(told, f"{place} {number}", allocating=lambda here, place=place, act=act: act() if here == place else None)
    return told


def some_of(count: int) -> list[int]:
    """The first, one in the middle and the last."""
    return sorted({1, count // 2, count})


def probe() -> None:
    import time
    for name in LOOPS:
        started = time.process_time()
        fixture = Fixture(name)
        made = time.process_time()
        sample(fixture.loop, fixture.model, "x/y")
        one = time.process_time()
        told = in_forwards(fixture, stop, some_of)
        print("==", name, round(made - started, 2), round(one - made, 2), round((time.process_time() - one), 2), {k: v for k, v in told.items() if v and not isinstance(v, list)})
        for k, v in told.items():
            if v and isinstance(v, list): print("   ", k, len(v), v[:6])
        print("  ", {k: v for k, v in fixture.settings.items() if not isinstance(v, dict)})
        print(dict(fixture.places())) if len(sys.argv) > 3 else None


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print(json.dumps(facts))
