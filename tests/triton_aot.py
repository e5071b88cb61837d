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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 89, 90, 120)
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


CASES = {
    "relative L1 bf16": _relative_l1("bf16"),
    "relative L1 fp32": _relative_l1("fp32", long=True),
    "relative L1 fp16": _relative_l1("fp16", long=True),
    "relative L1 pooled": Case(
        "relative_l1_triton:pooled",
        {"partial": "*fp32", "table": "*fp32", "out": "*fp32", "columns": "i32", "pieces": "i32"},
        {"BLOCK": 1024},
        ("columns", "pieces"),
        wide_loads=0,
    ),
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
        *(len(re.findall(word, code)) for word in (r"\b(?:LDL|STL)\b", r"\bLDG\.E\S*\.128", r"\bSTG\.E\S*\.128")),
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
