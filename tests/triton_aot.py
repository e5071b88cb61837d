"""Ahead-of-time compilation of the Triton kernels, without a GPU: what the compiler makes of them on each architecture.

A kernel joins with an entry in ``CASES``. ``python -m tests.triton_aot`` compiles all of them for all architectures and
prints a table; with names of cases, those. Tests compile in a process of their own (``built``).
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from accel.kernels import column_mass, frame_merge, listed_tiles

ARCHITECTURES = (80, 86, 89, 90, 120)
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 120: "HMMA"}
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
POINTERS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}


@dataclass(frozen=True)
class Case:
    """One kernel with one kind of arguments.

    Attributes:
        kernel: ``module:function`` below ``accel.kernels``. types: of each argument that is not a constant, in
            Triton's words. constants: values of the others, strides that are 1 among them. loose: arguments not known
            to be multiples of 16; pointers and integers that are not listed here are. warps, stages: of a launch.
            wide_loads: least 128-bit loads from global memory. uses: a word the machine code must have, as ``HGMMA``,
            by architecture. long: compiled in the long tests alone.
    """

    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    loose: Sequence[str] = ()
    warps: int = 4
    stages: int = 3
    wide_loads: int = 1
    uses: Mapping[int, str] = field(default_factory=dict)
    long: bool = False


def _relative_l1(dtype: str, long: bool = False) -> Case:
    integers = (
        "now_batch", "now_row", "rows_batch", "length", "split", "first_shift", "second_shift", "batch", "tiles",
        "pieces", "column", "columns",
    )  # fmt: skip
    types = {"now": POINTERS[dtype], "rows": POINTERS[dtype], "partial": "*fp32"} | dict.fromkeys(integers, "i32")
    constants = {"now_stride": 1, "CHUNK": 16384, "BLOCK": 2048, "REFRESH": True}
    loose = [name for name in integers if name not in ("now_batch", "now_row", "rows_batch", "length")]
    return Case("relative_l1_triton:partial_sums", types, constants, loose, warps=8, wide_loads=2, long=long)


def _column_mass(function: str, dtype: str, group: int = 1, dim: int = 128, long: bool = False) -> Case:
    strides = ("q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token")
    types = {"q": POINTERS[dtype], "k": POINTERS[dtype], "totals": "*fp32", "mass": "*fp32"} | dict.fromkeys(
        (*strides, "queries", "keys", "heads"), "i32"
    )
    types = {name: type for name, type in types.items() if name != "mass" or function == "column_sums"}
    constants, launch = column_mass.built(getattr(torch, NAMES[dtype]), group, dim)
    loose = ("queries", "keys", "heads")
    return Case(
        f"column_mass_triton:{function}", types | {"scale": "fp32"}, constants, loose, launch["num_warps"],
        launch["num_stages"], uses=TENSOR_CORES if dtype != "fp32" else dict.fromkeys(ARCHITECTURES, "HMMA"), long=long,
    )  # fmt: skip


def _listed_tiles(dtype: str, ordered: bool, biased: bool, dim: int = 128, long: bool = False) -> Case:
    sides = [f"{name}_{axis}" for name in ("q", "k", "v", "out") for axis in ("batch", "token", "head")]
    lists = ("tiles_batch", "tiles_head", "tiles_row", "order_batch", "order_head", "bias_head")
    numbers = ("queries", "keys", "heads", "kept")
    types = dict.fromkeys(("q", "k", "v", "out"), POINTERS[dtype]) | {"tiles": "*i64", "order": "*i64", "bias": "*fp32"}
    types |= dict.fromkeys((*sides, *lists, *numbers), "i32") | {"scale": "fp32"}
    constants, launch = listed_tiles.built(getattr(torch, NAMES[dtype]), 256, 64, dim, ordered, biased)
    return Case(
        "listed_tiles_triton:attend", types, constants, (*lists, *numbers), launch["num_warps"], launch["num_stages"],
        uses=TENSOR_CORES if dtype != "fp32" else dict.fromkeys(ARCHITECTURES, "HMMA"), long=long,
    )  # fmt: skip


def _frame_merge(function: str, arguments: str, integers: str, constants: Mapping[str, Any], wide_loads: int) -> Case:
    """``arguments``: pointers with their types and other numbers, as ``name:type``."""
    types = dict(one.split(":") for one in arguments.split()) | dict.fromkeys(integers.split(), "i32")
    loose = [name for name in integers.split() if not name.endswith(("_batch", "_token"))]
    warps = constants.get("num_warps", 4)
    constants = {name: value for name, value in constants.items() if name != "num_warps"}
    return Case(f"frame_merge_triton:{function}", types, constants, loose, warps, wide_loads=wide_loads)


def _relative_l1_sketch() -> Case:
    """Scalars at a stride: what is remembered is contiguous, and no row of it needs to begin at a multiple of 16."""
    dense = _relative_l1("bf16")
    types = dict(dense.types) | {"now_stride": "i32"}
    constants = {key: value for key, value in dense.constants.items() if key != "now_stride"}
    loose = [name for name in types if types[name] == "i32"]
    return replace(dense, types=types, constants=constants, loose=loose, wide_loads=0, long=True)


def _ones(case: Case) -> Case:
    """Integers that are 1, which the compiler is told as constants."""
    types = {name: kind for name, kind in case.types.items() if not kind.startswith("i")}
    ones = {name: 1 for name in case.types if name not in types}
    return replace(case, types=types, constants={**case.constants, **ones}, loose=(), wide_loads=0, long=True)


def _time_turn(dtype: str, long: bool = False) -> Case:
    integers = ("x_batch", "x_token", "x_head", "out_batch", "out_token", "out_head", "tokens", "each")
    types = {"x": POINTERS[dtype], "cos": "*fp32", "sin": "*fp32", "out": POINTERS[dtype]}
    constants = {"HEADS": 12, "CHANNELS": 44, "TURNED_HEADS": 1, "FLAT": True, "BLOCK": 1024}
    return Case(
        "time_turn_triton:turn",
        types | dict.fromkeys(integers, "i32"),
        constants,
        ("x_head", "tokens", "each"),
        long=long,
    )


def _multistep(dtype: str, points: int, long: bool = False) -> Case:
    integers = (
        "point_stride", "v_batch", "v_channel", "v_frame", "x_batch", "x_channel", "x_frame", "channels", "frames",
        "size",
    )  # fmt: skip
    types = {"velocities": "*fp32", "table": "*fp32", "x": POINTERS[dtype], "out": POINTERS[dtype]}
    constants = {"POINTS": points, "ENTRIES": 1, "FROM_X": True, "BLOCK": 1024}
    return Case(
        "multistep_triton:linear_step", types | dict.fromkeys(integers, "i32"), constants, ("frames",),
        wide_loads=points + 1, long=long,
    )  # fmt: skip


CASES = {
    "frame similarities bf16": _frame_merge(
        "similarities",
        "new:*bf16 old:*bf16 places:*i64 out:*fp32",
        "new_batch new_token old_batch old_token height width batch heads",
        frame_merge.similarity_constants(128, 1),
        2,
    ),
    "frame partners of 1560 tokens": _frame_merge(
        "assigned",
        "similarity:*fp32 places:*i64 counts:*fp32 live:*i64 best:*fp32 asked:*i32 taken:*i32 into:*i64 "
        "weights:*fp32 grown:*i64 threshold:fp32 floor:fp32",
        "height width capacity",
        frame_merge.assign_constants(1560, 1, True),
        0,
    ),
    "frame joined bf16": _frame_merge(
        "joined",
        "keys:*bf16 values:*bf16 plain:*bf16 frames:*i64 middle_keys:*bf16 middle_values:*bf16 "
        "middle_plain:*bf16 middle_frames:*i64 middle_counts:*fp32 into:*i64 weights:*fp32",
        "keys_batch keys_token values_batch values_token plain_batch plain_token middle_batch middle_token "
        "middle_plain_batch middle_plain_token most",
        {"WIDTH": 1536, "PLAIN": 528, "BLOCK": frame_merge.BLOCK, "num_warps": 2},
        4,
    ),
    "listed tiles bf16": _listed_tiles("bf16", True, True),
    "listed tiles fp16, plain": _listed_tiles("fp16", False, False, long=True),
    "listed tiles fp32": _listed_tiles("fp32", True, True, dim=64, long=True),
    "row totals bf16": _column_mass("row_totals", "bf16"),
    "column sums bf16": _column_mass("column_sums", "bf16"),
    "column sums bf16, groups of 4": _column_mass("column_sums", "bf16", 4, long=True),
    "row totals fp16, groups of 4": _column_mass("row_totals", "fp16", 4, long=True),
    "row totals fp32": _column_mass("row_totals", "fp32", dim=64, long=True),
    "column sums fp32": _column_mass("column_sums", "fp32", dim=64, long=True),
    "relative L1 bf16": _relative_l1("bf16"),
    "relative L1 fp32": _relative_l1("fp32", long=True),
    "relative L1 fp16": _relative_l1("fp16", long=True),
    "relative L1 sketch": _relative_l1_sketch(),
    "relative L1 pooled": Case(
        "relative_l1_triton:pooled",
        {"partial": "*fp32", "table": "*fp32", "out": "*fp32", "columns": "i32", "pieces": "i32"},
        {"BLOCK": 1024},
        ("columns", "pieces"),
        wide_loads=0,
    ),
    "time turn bf16": _time_turn("bf16"),
    "time turn fp16": _time_turn("fp16", long=True),
    "time turn fp32": _time_turn("fp32", long=True),
    "multistep of 3 bf16": _multistep("bf16", 3),
    "multistep of 3 fp32": _multistep("fp32", 3, long=True),
    "multistep of 1 fp16": _multistep("fp16", 1, long=True),
}
CASES |= {
    f"{name}, ones": _ones(CASES[name])
    for name in ("relative L1 bf16", "relative L1 pooled", "time turn bf16", "multistep of 3 bf16")
}


@dataclass(frozen=True)
class Built:
    """What the compiler made: registers of a thread, bytes of stack and of local memory of a thread, bytes of shared
    memory, instructions that spill, 128-bit loads and stores of global memory, and the words of ``uses`` found."""

    case: str
    architecture: int
    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    wide_loads: int
    wide_stores: int
    found: bool


@functools.cache
def built(names: tuple[str, ...], architectures: tuple[int, ...] = ARCHITECTURES) -> list[Built]:
    """Compiles cases in a new process, which never saw the interpreter."""
    command = [sys.executable, "-m", "tests.triton_aot", "--json", *map(str, architectures), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise AssertionError(f"ahead-of-time compilation failed:\n{done.stderr}")
    return [Built(**one) for one in json.loads(done.stdout)]


def compile_case(name: str, architecture: int) -> Built:
    """Compiles one case in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = CASES[name]
    module, function = case.kernel.split(":")
    kernel = triton.jit(getattr(importlib.import_module(f"accel.kernels.{module}"), function))
    signature = {arg: case.types.get(arg, "constexpr") for arg in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, arg in enumerate(kernel.arg_names)
        if arg in case.types and arg not in case.loose and not case.types[arg].startswith("fp")
    }
    source = ASTSource(kernel, signature, dict(case.constants), attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage, code = _tool("cuobjdump", "--dump-resource-usage", cubin), _tool("nvdisasm", "-c", cubin)
    resources = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    return Built(
        name,
        architecture,
        *(int(resources[key]) for key in ("REG", "STACK", "LOCAL")),
        made.metadata.shared,
        *(
            len(re.findall(word, code))
            for word in (r"\b(?:LDL|STL)\b", r"\bLDG(?:STS)?\.E\S*\.128", r"\bSTG\.E\S*\.128")
        ),
        case.uses.get(architecture, "") in code,
    )


def _tool(name: str, *arguments: Any) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def _main(arguments: list[str]) -> None:
    as_json = "--json" in arguments
    architectures = [int(one) for one in arguments if one.isdecimal()] or ARCHITECTURES
    names = [one for one in arguments if one in CASES] or CASES
    found = [compile_case(name, architecture) for name in names for architecture in architectures]
    print(json.dumps([asdict(one) for one in found]) if as_json else "\n".join(map(str, found)))


if __name__ == "__main__":
    _main(sys.argv[1:])
