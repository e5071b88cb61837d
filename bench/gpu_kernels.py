"""Each kernel against a copy of as many bytes, against plain torch and against torch.compile.

``TABLE`` has a line a kernel: where it lives, what it is given, and what ``torch.compile`` is given in its place. A
form that is not there or does not run leaves its reason in the row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gpu_clock import Work
from .gpu_extent import Bench

SETS = 3  # of inputs, taken in turn: a cache that held one would flatter
FORMS = ("plain", "compiled", "kernel")


@dataclass(frozen=True, slots=True)
class Line:
    """One kernel.

    Attributes:
        name: for people. home: module under ``accel.kernels`` and the operation in it, see ``accel.kernels.choose``.
        inputs: makes its arguments. moved: bytes that have to be read and written, of these arguments.
        compiled: what ``torch.compile`` is given, with the same arguments; None for the operation's plain form.
        plain: the plain form where the operation is not there.
    """

    name: str
    home: tuple[str, str]
    inputs: Callable[[Bench], tuple]
    moved: Callable[..., int]
    compiled: Callable | None = None
    plain: Callable | None = None


def operation(home: tuple[str, str]) -> tuple[Any, str]:
    """The operation of a line, or None and why it is not there."""
    module, name = home
    try:
        return getattr(importlib.import_module(f"accel.kernels.{module}"), name), ""
    except (ImportError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"


def forms(line: Line, arguments: tuple, bench: Bench) -> tuple[dict[str, Callable], dict[str, str]]:
    """What can run of a line, each tried once, and of what cannot, why not."""
    found, reasons = {}, {}
    kernel, missing = operation(line.home)
    plain = line.plain if kernel is None else kernel.torch_form
    tried: dict[str, Callable | None] = {"plain": plain, "compiled": None, "kernel": None}
    reasons["plain"] = reasons["kernel"] = missing
    reasons["compiled"] = "not compiled at this size" if not bench.extent.compiled else missing
    if bench.extent.compiled and (line.compiled or plain):
        torch.compiler.reset()
        tried["compiled"] = torch.compile(line.compiled or plain, dynamic=False)
    if kernel is not None:
        ok, reasons["kernel"] = kernel.choose(*arguments)
        tried["kernel"] = kernel.triton_form if ok else None
    for name, form in tried.items():
        if form is None:
            continue
        try:
            form(*arguments)
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            found[name] = form
    return found, {name: reason for name, reason in reasons.items() if name not in found}


def measured(line: Line, bench: Bench) -> dict[str, Any]:
    """A row: device seconds of each form, and as ratios; bytes a second as a part of a copy's."""
    sets = [line.inputs(bench) for _ in range(SETS)]
    moved = line.moved(*sets[0])
    found, reasons = forms(line, sets[0], bench)
    source, target = (
        torch.empty(max(moved // 2, 1), dtype=torch.uint8, device=bench.device).random_() for _ in range(2)
    )
    works: dict[str, Work] = {"copy": lambda number: (source, target)[number % 2].copy_((target, source)[number % 2])}
    works |= {name: lambda number, form=form: form(*sets[number % SETS]) for name, form in found.items()}
    times = bench.timed(bench.clock.queued, works)
    row = {"kernel": line.name, "bytes": moved, "rounds": times.rounds, "reasons": reasons}
    row["seconds"] = {name: times.median(name) for name in works}
    row["of_copy"] = {name: times.ratio("copy", name) for name in found}
    row["kernel_over_compiled"] = times.ratio("kernel", "compiled") if {"kernel", "compiled"} <= set(found) else None
    row["kernel_over_plain"] = times.ratio("kernel", "plain") if {"kernel", "plain"} <= set(found) else None
    return row


def kernels(bench: Bench, told: dict[str, Any]) -> None:
    """Fills ``told`` with a row a line of ``TABLE``; an error stays in its row."""
    told["kernels"], told["figures"] = [], {}
    for line in TABLE:
        bench.pace.demand(line.name)
        try:
            row = measured(line, bench)
        except TimeoutError:
            raise
        except Exception as error:
            row = {"kernel": line.name, "error": f"{type(error).__name__}: {error}"}
        told["kernels"].append(row)
        bench.say(f"kernels: {line.name}, {spoken(row)}")
        if line is RELATIVE_L1 and "kernel" in row.get("seconds", {}):
            told["figures"]["relative_l1_share"] = row["of_copy"]["kernel"]
            if row["kernel_over_compiled"] is not None:
                told["figures"]["relative_l1_over_compiled"] = row["kernel_over_compiled"]


def spoken(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if "error" in row:
        return row["error"]
    return ", ".join(f"{name} {taken * 1e6:.4g} us" for name, taken in row["seconds"].items())


def _looks(bench: Bench) -> tuple:
    """A feature of ``kernel_bytes`` bytes, one row a latent frame, and what is remembered of it."""
    from accel.kernels.relative_l1 import Look

    frames = bench.extent.plan.segment
    length = bench.extent.kernel_bytes // bench.dtype.itemsize // frames
    now, rows = bench.random(1, frames, length), bench.random(1, frames, length)
    return [Look(now, rows, ((0, frames),))], [[1.0] * frames + [1e-8]]


def _looks_bytes(looks: list, table: list) -> int:
    return sum(2 * look.now.nbytes + look.rows.nbytes for look in looks)


def _compiled_looks(looks: list, table: list) -> Tensor:
    """What the kernel does for one group of whole rows, as a compiler sees it best."""
    now, rows, _ = looks[0]
    before = rows.float()
    change, size = (now.float() - before).abs().sum(), before.abs().sum()
    rows.copy_(now)
    return change / (size + table[0][-1])


RELATIVE_L1 = Line(
    "relative L1 with refresh", ("relative_l1", "group_relative_l1"), _looks, _looks_bytes, _compiled_looks
)
TABLE = [RELATIVE_L1]
