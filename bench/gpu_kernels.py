"""Each kernel against a copy of as many bytes, against plain torch and against torch.compile.

``TABLE`` has a line a kernel: what it is given, and what ``torch.compile`` is given in its place. A form that does not
run leaves its reason in the row. Kernels of attention are measured against dense attention, in ``gpu_attention``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.kernels import frame_merge, multistep, relative_l1, time_turn
from accel.kernels.choose import Kernel, Traffic
from accel.kernels.relative_l1 import Look
from accel.kv.rotary import TimeRotary
from accel.kv.temporal_merge import TemporalMergeConfig, merge_kernel
from accel.kv.tokens import Tokens

from .gpu_clock import Work
from .gpu_extent import Bench
from .gpu_model import latents

SETS = 3  # of inputs, taken in turn: a cache that held one would flatter
REPEATS = 20  # of small works in one reading


@dataclass(frozen=True, slots=True)
class Line:
    """One kernel.

    Attributes:
        name: for people. operation: in its forms. inputs: makes its arguments. traffic: what has to be read and
            written, of the same arguments.
        compiled: what ``torch.compile`` is given, with the same arguments; None for the operation's plain form.
    """

    name: str
    operation: Kernel
    inputs: Callable[[Bench], tuple]
    traffic: Callable[..., Traffic]
    compiled: Callable | None = None


def forms(line: Line, arguments: tuple, bench: Bench) -> tuple[dict[str, Callable], dict[str, str]]:
    """What can run of a line, each tried once, and of what cannot, why not."""
    found, reasons = {}, {"compiled": "not compiled at this size"}
    kernel = line.operation
    ok, reasons["kernel"] = kernel.choose(*arguments)
    tried: dict[str, Callable | None] = {"plain": kernel.torch_form, "kernel": kernel.triton_form if ok else None}
    if bench.extent.compiled:
        torch.compiler.reset()
        tried["compiled"] = torch.compile(line.compiled or kernel.torch_form, dynamic=False)
    for name, form in tried.items():
        try:
            if form is None:
                continue
            form(*arguments)
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            found[name] = form
    return found, {name: reason for name, reason in reasons.items() if name not in found}


def measured(line: Line, bench: Bench) -> dict[str, Any]:
    """A row: device seconds of each form, and as ratios; bytes a second as a part of a copy's."""
    sets = [line.inputs(bench) for _ in range(SETS)]
    traffic = line.traffic(*sets[0])
    moved = traffic.read + traffic.written
    found, reasons = forms(line, sets[0], bench)
    source, target = (
        torch.empty(max(moved // 2, 1), dtype=torch.uint8, device=bench.device).random_() for _ in range(2)
    )
    works: dict[str, Work] = {"copy": lambda number: (source, target)[number % 2].copy_((target, source)[number % 2])}
    works |= {name: lambda number, form=form: form(*sets[number % SETS]) for name, form in found.items()}
    times = bench.timed(bench.clock.queued, works, min(REPEATS, max(1, bench.extent.kernel_bytes // moved)))
    row = {"kernel": line.name, "bytes": moved, "rounds": times.rounds, "reasons": reasons}
    row["seconds"] = {name: times.median(name) for name in works}
    row["of_copy"] = {name: times.ratio("copy", name) for name in found}
    row["kernel_over_compiled"] = times.ratio("kernel", "compiled") if {"kernel", "compiled"} <= set(found) else None
    row["kernel_over_plain"] = times.ratio("kernel", "plain") if {"kernel", "plain"} <= set(found) else None
    return row


def kernels(bench: Bench, told: dict[str, Any]) -> None:
    """Fills ``told`` with a row a line of ``TABLE``; an error stays in its row."""
    told["kernels"] = []
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
        if line is RELATIVE_L1:
            told["figures"], told["why"] = figures(row)


def figures(row: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """What relative L1 reaches, and why where a figure is missing."""
    reasons = row.get("reasons", {"kernel": row.get("error", "")})
    found = {
        "relative_l1_share": row.get("of_copy", {}).get("kernel"),
        "relative_l1_over_compiled": row.get("kernel_over_compiled"),
    }
    why = "; ".join(f"{form}: {reasons[form]}" for form in ("kernel", "compiled") if reasons.get(form))
    return (
        {key: value for key, value in found.items() if value is not None},
        {key: why for key, value in found.items() if value is None},
    )


def spoken(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if "error" in row:
        return row["error"]
    return ", ".join(f"{name} {taken * 1e6:.4g} us" for name, taken in row["seconds"].items())


def _looks(bench: Bench) -> tuple:
    """A feature of ``kernel_bytes`` bytes, one row a latent frame, and what is remembered of it."""
    frames = bench.extent.plan.segment
    length = bench.extent.kernel_bytes // bench.dtype.itemsize // frames
    now, rows = bench.random(1, frames, length), bench.random(1, frames, length)
    return [Look(now, rows, ((0, frames),))], [[1.0] * frames + [1e-8]]


def _compiled_looks(looks: list, table: list) -> Tensor:
    """What the kernel does for one group of whole rows, as a compiler sees it best."""
    now, rows, _ = looks[0]
    before = rows.float()
    change, size = (now.float() - before).abs().sum(), before.abs().sum()
    rows.copy_(now)
    return change / (size + table[0][-1])


def _velocities(bench: Bench) -> tuple:
    """Three stored velocities, latents and coefficients of a segment in which every latent frame advances."""
    frames = bench.extent.plan.segment
    x = latents(bench, frames, bench.extent.grid)
    velocities = torch.stack([latents(bench, frames, bench.extent.grid) for _ in range(3)])
    return velocities, torch.rand(3, frames) - 0.5, x, [True] * frames


def _compiled_step(velocities: Tensor, table: Tensor, x: Tensor, moving: list) -> Tensor:
    """What the kernel does, as a compiler sees it best."""
    weights = table.to(x.device)[:, None, None, :, None, None]
    return x + (velocities * weights).sum(0)


def _sink(bench: Bench) -> tuple:
    """Time channels of the first latent frame's keys of one layer, and the places they are turned into."""
    shape, (rows, columns) = bench.extent.shape, bench.extent.causal_grid
    width = shape.dim // shape.heads
    channels = TimeRotary.of_wan(width).channels
    stored = bench.random(1, rows * columns, shape.heads, width)
    angles = bench.random(1, 1, channels // 2, dtype=torch.float32)
    plain = bench.random(1, rows * columns, shape.heads, channels)
    return plain, angles.cos(), angles.sin(), stored[..., :channels]


def _frame(bench: Bench) -> tuple:
    """One layer's middle that stands for the latent frame before, and the next one, of which half the tokens join."""
    shape, grid = bench.extent.shape, bench.extent.causal_grid
    size, width = grid[0] * grid[1], shape.dim // shape.heads
    channels = TimeRotary.of_wan(width).channels
    keys, values = (bench.random(1, 2 * size, shape.heads, width) for _ in range(2))
    frame_keys = bench.random(1, size, shape.heads, width)
    near = keys[:, : size // 2]
    frame_keys[:, : size // 2] = near + 0.1 * frame_keys[:, : size // 2]
    frames = torch.zeros(2 * size, dtype=torch.int64, device=bench.device)
    ones = torch.ones(2 * size, device=bench.device)
    middle = Tokens(keys, values, frames, bench.random(1, 2 * size, shape.heads, channels), ones)
    plain = bench.random(1, size, shape.heads, channels)
    frame = Tokens(frame_keys, bench.random(1, size, shape.heads, width), frames[:size] + 1, plain)
    places, live = torch.arange(size, device=bench.device), torch.full((), size, device=bench.device)
    return places, live, middle, frame, None, TemporalMergeConfig(), grid


def _frame_traffic(
    places: Tensor, live: Tensor, middle: Tokens, frame: Tokens, capacity: None, config: TemporalMergeConfig,
    grid: tuple[int, int],
) -> Traffic:  # fmt: skip
    (batch, size, heads, width), element = frame.keys.shape, frame.keys.element_size()
    return frame_merge.traffic(
        batch, heads, width, grid, size // 2, element, frame.plain.shape[3], config.neighbourhood
    )  # fmt: skip


RELATIVE_L1 = Line(
    "relative L1 with refresh", relative_l1.group_relative_l1, _looks, relative_l1.traffic, _compiled_looks
)
TABLE = [
    RELATIVE_L1,
    Line(
        "multistep and Euler, a noise level a frame", multistep.linear_step, _velocities, multistep.traffic,
        _compiled_step,
    ),
    Line("time turn of the sink, one layer", time_turn.turn_pairs, _sink, time_turn.traffic),
    Line("temporal merge of a latent frame, one layer", merge_kernel, _frame, _frame_traffic),
]  # fmt: skip
