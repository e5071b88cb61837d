"""Runs the AR Segment Sampler inside ComfyUI with faults thrown at it, for test_faults.py; facts go to the last line.

Arguments: the folder with the checkpoints ``frames`` and ``causal``, and what to do: names of functions below, each
with the loops it is for (``failing=window,sparse``; all of them without). Answers stand under the function's name.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ldm.wan.ar_model
import comfy.ldm.wan.model
import comfy.model_management
import torch
from run_in_comfy import pack_module

sys.path.append(str(Path(__file__).parent))
from fault_loops import LOOPS, accelerated, load, sample  # noqa: E402
from leftovers import Snapshot, Storages, census  # noqa: E402

LAYERS = 2
KEPT = (
    "history.py:_ring_for", "frozen.py:_slot", "slots.py:<genexpr>", "slots.py:__init__", "slots.py:pair",
    "ring.py:__init__", "ring.py:_keep", "grouping.py:_packed", "correct.py:record", "signals.py:_rows_for",
    "solver.py:_history", "host_progress.py:__init__", "prompt.py:collapse",
)  # fmt: skip
KEEPERS = {
    "ann.py", "auto.py", "bounded.py", "correct.py", "frozen.py", "grouping.py", "history.py", "host_attention.py",
    "host_progress.py", "host_prompt.py", "host_stream.py", "host_video.py", "importance_redundancy.py", "prompt.py",
    "ring.py", "signals.py", "slots.py", "solver.py", "temporal_merge.py", "video_file.py",
}  # fmt: skip
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


def at(number: int, fault: Callable[[], None], for_good: bool = False) -> Callable[[], None]:
    """Counts, and does ``fault`` at the count of ``number``, or from then on."""
    seen = 0

    def act() -> None:
        nonlocal seen
        seen += 1
        if seen == number or (for_good and seen > number):
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
        comfy.model_management.load_models_gpu([self.model])  # core notes on the network that it has been loaded
        self.before = Snapshot(self.loaded, self.model)
        self.runs = 0

    def count(self, owners: tuple[type, ...], name: str) -> int:
        """Calls of a method in a whole run."""
        seen: list[None] = []
        with before_each(owners, name, lambda: seen.append(None)):
            sample(self.loop, self.model, f"{self.name}/counted")
        return len(seen)

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
        gc.collect()
        gc.freeze()
        gc.disable()
        watch = Storages(FOLDER, allocating)
        ended = "finished"
        try:
            with before_each(*method, act) if method else nullcontext(), watch:
                remark = sample(self.loop, self.model, prefix)[1].get("out of memory")
            told["remarks"] += [remark]
        except (comfy.model_management.InterruptProcessingException, Exception) as error:
            ended = type(error).__name__
            told["said"][str(error)] += 1
        finally:
            comfy.model_management.interrupt_current_processing(False)
        told["waiting for the collector"] += [[case, *one] for one in (*watch.alive(), *census())]
        gc.collect()
        gc.enable()
        told["alive"] += [[case, *one] for one in (*watch.alive(), *census())]
        told["changed"] += [[case, one] for one in self.before.changes(Snapshot(self.loaded, self.model))]
        told["cases"] += 1
        told["ended"][ended] += 1
        again = sample(self.loop, self.model, prefix)[0]
        if not torch.equal(again, self.expected):
            told["different"].append(case)
        if self.loop.stream and not torch.equal(sample(self.loop, self.model, f"{prefix}/anew")[0], self.expected):
            told["different"].append(f"{case}, not resumed")
        return ended


def empty() -> dict[str, Any]:
    lists = {key: [] for key in ("waiting for the collector", "alive", "changed", "different", "remarks")}
    return {"cases": 0, "ended": Counter(), "said": Counter(), **lists}


def in_forwards(fixture: Fixture, fault: Callable[[], None], some: Callable[[int], list[int]]) -> dict[str, Any]:
    """A fault inside forwards of the run, before one block or the other."""
    told = empty()
    blocks = fixture.count(BLOCKS, "forward")
    told["of"] = blocks // LAYERS
    for number in some(told["of"]):
        act = at((number - 1) * LAYERS + 1 + number % LAYERS, fault)
        fixture.faulty(told, f"forward {number}", (BLOCKS, "forward"), act)
    return told


def after_calls(fixture: Fixture, some: Callable[[int], list[int]]) -> dict[str, Any]:
    """An interrupt after model calls of the run, skipped ones too."""
    told = empty()
    told["of"] = fixture.count((Progress,), "__call__")
    for number in some(told["of"]):
        fixture.faulty(told, f"call {number}", ((Progress,), "__call__"), at(number, stop))
    return told


def at_allocations(
    fixture: Fixture, some: Callable[[Counter[str]], list[tuple[str, int]]], for_good: bool = False
) -> dict[str, Any]:
    """No memory at allocations of the pack's own, once or from then on."""
    told = empty()
    told["of"] = fixture.places()
    for place, number in some(told["of"]):
        act = at(number, full, for_good)
        allocating = lambda here, place=place, act=act: act() if here == place else None  # noqa: E731
        ended = fixture.faulty(told, f"{place} {number}", allocating=allocating)
        told.setdefault("ended where", {}).setdefault(ended, []).append(place)
    return told


def every(count: int) -> list[int]:
    return list(range(1, count + 1))


def five_of(count: int) -> list[int]:
    return sorted({1, *(count * part // 4 for part in range(1, 5))} - {0})


def middle_of(count: int) -> list[int]:
    return [count // 2 + 1]


def kept(found: Counter[str]) -> list[tuple[str, int]]:
    """The last allocation of each kind that outlives a call."""
    return [(place, count) for place, count in found.items() if place in KEPT]


def anywhere(found: Counter[str]) -> list[tuple[str, int]]:
    """The first allocation in every function that works on what is kept, and the last of those that outlive a call."""
    first = [(place, 1) for place in found if place.partition(":")[0] in KEEPERS]
    return first + [(place, count) for place, count in kept(found) if count > 1]


def together(name: str, other: str) -> dict[str, Any]:
    """Two loops on one loaded MODEL in turns, as two prompts or two samplers of a graph take it."""
    first, second = Fixture(name), LOOPS[other]
    expected, _ = sample(second, accelerated(second, load(second)))
    behind = accelerated(second, first.loaded)
    before = Snapshot(first.loaded, first.model, behind)
    made = [sample(*pair)[0] for pair in ((first.loop, first.model), (second, behind)) * 2]
    with suppress(ValueError):  # nodes that do not go with those of the first are refused, which changes nothing either
        sample(second, accelerated(second, first.model))
    wanted = (first.expected, expected) * 2
    return {
        "same": [torch.equal(one, other) for one, other in zip(made, wanted, strict=True)],
        "changed": before.changes(Snapshot(first.loaded, first.model, behind)),
        "another": not torch.equal(*wanted[:2]) if wanted[0].shape == wanted[1].shape else True,
    }


def changed_between(name: str) -> dict[str, Any]:
    """Other sizes and settings between two runs, each on the same MODEL and on a fresh one."""
    fixture = Fixture(name)
    loop, settings = fixture.loop, fixture.loop.settings
    others = {
        "resolution": replace(loop, size=(96, 48)), "length": replace(loop, frames=loop.frames - 4),
        "batch": replace(loop, batch=2), "steps": replace(loop, settings=settings | {"steps": 6}),
        "seed": replace(loop, settings=settings | {"seed": 8}),
        "cfg": replace(loop, settings=settings | {"cfg": 3.0 - settings["cfg"]}),
    }  # fmt: skip
    told: dict[str, Any] = {"different": [], "cases": 0}

    def compare(case: str, same: bool) -> None:
        back = torch.equal(sample(loop, fixture.model)[0], fixture.expected)
        told["cases"] += 1
        told["different"] += [case] * (not same) + [f"back from {case}"] * (not back)

    for case, other in others.items():
        compare(case, torch.equal(sample(other, fixture.model)[0], sample(other, accelerated(other, load(other)))[0]))
    half = torch.bfloat16
    made = [sample(loop, model, dtype=half)[0] for model in (fixture.model, accelerated(loop, load(loop)))]
    compare("dtype of the latent", torch.equal(*made))
    narrow = [model.clone() for model in (fixture.model, accelerated(loop, load(loop)))]
    for model in narrow:
        model.set_model_compute_dtype(half)
    made = [sample(loop, model)[0] for model in narrow]
    compare("computed in another dtype", torch.equal(*made) and not torch.equal(made[0], fixture.expected))
    weights = [accelerated(loop, load(loop, dtype=half)) for _ in range(2)]
    made = [sample(loop, model)[0] for model in weights]
    compare("weights of another dtype", torch.equal(*made) and not torch.equal(made[0], fixture.expected))
    return told


def dropped(name: str) -> list[int]:
    """Parts of the network that wait for the collector once nobody holds its MODEL: of one that was only loaded, and of
    one behind our run."""
    waiting = []
    for runs in (0, 1):
        loop = LOOPS[name]
        loaded = load(loop)
        model = accelerated(loop, loaded)
        comfy.model_management.load_models_gpu([loaded])
        parts = [weakref.ref(part) for part in loaded.model.modules()]
        gc.collect()
        gc.disable()
        for _ in range(runs):
            sample(loop, model)
        del loaded, model
        waiting.append(sum(part() is not None for part in parts))
        gc.enable()
    return waiting


def digest(latents: torch.Tensor) -> str:
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()


def short(name: str) -> dict[str, Any]:
    """One fault of two kinds, in the middle of the run."""
    fixture = Fixture(name)
    return {
        "interrupt": in_forwards(fixture, stop, middle_of),
        "no memory": at_allocations(fixture, lambda found: kept(found)[-1:]),
    }


def cancelled(name: str) -> dict[str, Any]:
    """Interrupts in every forward, and after every call."""
    fixture = Fixture(name)
    return {"inside": in_forwards(fixture, stop, every), "after": after_calls(fixture, every)}


def failing(name: str) -> dict[str, Any]:
    """Errors in forwards, and no memory in forwards and wherever the pack works on what it keeps."""
    fixture = Fixture(name)
    return {
        "error": in_forwards(fixture, broken, five_of),
        "no memory in a forward": in_forwards(fixture, full, five_of),
        "no memory": at_allocations(fixture, anywhere),
        "no memory any more": at_allocations(fixture, kept, for_good=True),
    }


def lowered(name: str) -> dict[str, Any]:
    """A K/V store that cannot be allocated, once and for good."""
    fixture = Fixture(name)
    first = lambda found: [(place, 1) for place in found if place.startswith("slots.py")][:1]  # noqa: E731
    return {"once": at_allocations(fixture, first), "for good": at_allocations(fixture, first, for_good=True)}


def turns(name: str) -> dict[str, Any]:
    """In turns with the next loop on the same checkpoint."""
    same = [other for other in LOOPS if LOOPS[other].checkpoint == LOOPS[name].checkpoint]
    return together(name, same[(same.index(name) + 1) % len(same)])


def sizes(name: str) -> dict[str, Any]:
    return changed_between(name)


def digests(name: str) -> str:
    return digest(Fixture(name).expected)


def ask(what: str, name: str) -> Any:
    """One answer, which is told on stderr too: a run of everything takes long."""
    answer = globals()[what](name)
    print(json.dumps({what: {name: answer}}), file=sys.stderr, flush=True)
    return answer


if __name__ == "__main__":
    for given in sys.argv[2:]:
        what, _, chosen = given.partition("=")
        facts[what] = {name: ask(what, name) for name in (chosen.split(",") if chosen else LOOPS)}
    print(json.dumps(facts))
