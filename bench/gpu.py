"""``python -m bench.gpu [--parts ...] [--toy]``: what the savings are as time, on one GPU, in under nine minutes.

Parts: ``forwards`` (each forward of the diffusion-forcing schedules, what skipping one costs, schedules composed of
both, a block of Wan 14B), ``causal`` (few-step rollouts with bounded K/V), ``attention`` (dense, block-sparse, column
mass), ``kernels`` (each against a copy, plain torch and torch.compile), ``memory`` (peaks beside a plain loop),
``loops`` (97 frames in 20 steps). Full-size random weights made on the device, no network. Writes ``gpu.json`` and
``gpu.md`` after every part; parts measured before stay in them. A part that fails says why and the others go on.

``--toy`` runs everything at toy size, on a CPU in seconds, into ``results/toy``.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from accel.kernels.choose import Usage

from .gpu_attention import attention
from .gpu_causal import causal
from .gpu_clock import Clock, EventClock, Pace, ProcessClock
from .gpu_extent import TOY, WHOLE, Bench, Extent
from .gpu_forwards import forwards
from .gpu_kernels import kernels
from .gpu_loops import loops, memory
from .gpu_report import figures, markdown

RESULTS = Path(__file__).with_name("results")
LIMIT = 500.0  # what is under way when it is over goes on
VERSION = 1  # of what is written; raise it when parts measure otherwise, and what was written before counts no longer
Say = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A measurement that fills a dictionary, the seconds it is thought to take on an H100 or H200, and the most it
    gets."""

    measure: Callable[[Bench, dict[str, Any]], None]
    estimate: float
    budget: float


PARTS = {
    "forwards": Part(forwards, 90, 120),
    "causal": Part(causal, 40, 60),
    "attention": Part(attention, 35, 60),
    "kernels": Part(kernels, 60, 90),
    "memory": Part(memory, 25, 40),
    "loops": Part(loops, 200, 230),
}


def run(
    extent: Extent, parts: list[str], folder: Path, device: torch.device, say: Say = print, clock: Clock | None = None,
    seconds: float = LIMIT,
) -> dict[str, Any]:  # fmt: skip
    """Measures ``parts``, writes all that is known into ``folder`` after each, and returns it.

    Args:
        clock: what times works; None takes the device's own. seconds: most that all parts together may take.
    """
    clock = clock or (EventClock(device) if device.type == "cuda" else ProcessClock())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    toy, whole = extent is not WHOLE, Pace(seconds)
    known = folder / "gpu.json"
    told = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    if (told.get("version"), told.get("toy")) != (VERSION, toy):
        told = {"version": VERSION, "toy": toy, "parts": {}}
    say(f"about {sum(PARTS[name].estimate for name in parts):.0f} s at full size on an H100 or H200")
    for name in (one for one in PARTS if one in parts):
        pace = Pace(min(PARTS[name].budget, whole.left))
        found, started, usage = {"conditions": conditions(device, dtype)}, time.monotonic(), Usage()
        bench = Bench(extent, device, dtype, clock, pace, say)
        try:
            pace.demand(name)
            with torch.inference_mode():
                PARTS[name].measure(bench, found)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
            say(f"{name}: stopped, {found['error']}")
        found |= {"seconds": time.monotonic() - started, "used": usage.line()}
        told["parts"] = {one: told["parts"].get(one) for one in PARTS if one in told["parts"]} | {name: found}
        told["figures"] = figures(told["parts"], toy)
        write(folder, told)
        say(f"{name}: {found['seconds']:.1f} s")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return told


def write(folder: Path, told: dict[str, Any]) -> None:
    """``gpu.json`` and ``gpu.md``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("gpu.json", json.dumps(told, indent=1)), ("gpu.md", markdown(told))):
        part = folder / f"{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(folder / name)


def conditions(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """When and on what a part is measured."""
    found = {
        "date": date.today().isoformat(), "device": f"{platform.machine()} CPU", "driver": None,
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": _triton(),
        "dtype": str(dtype).removeprefix("torch."), "clock_mhz": None,
    }  # fmt: skip
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "driver": _driver()}
        try:
            found["clock_mhz"] = torch.cuda.clock_rate(device)
        except Exception as error:
            found["clock_mhz"] = f"not readable ({type(error).__name__})"
    return found


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _driver() -> str | None:
    """Version of the NVIDIA driver, where something tells it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else version
    except Exception:
        told = Path("/proc/driver/nvidia/version")
        return told.read_text(encoding="utf-8").splitlines()[0] if told.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--toy", action="store_true", help="toy size, on a CPU, to see that everything works")
    parser.add_argument("--seconds", type=float, default=LIMIT, help=f"most that all parts may take ({LIMIT:g})")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not arguments.toy and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --toy shows on a CPU that everything works")
    device = torch.device("cpu" if arguments.toy else "cuda:0")
    folder = arguments.output or (RESULTS / "toy" if arguments.toy else RESULTS)
    if arguments.toy:
        torch.set_num_threads(1)
    told = run(
        TOY if arguments.toy else WHOLE, arguments.parts, folder, device, lambda line: print(line, flush=True),
        seconds=arguments.seconds,
    )  # fmt: skip
    print("\n".join(markdown(told).split("\n## ")[0].splitlines()))


if __name__ == "__main__":
    main()
