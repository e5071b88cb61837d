"""A kernel runs where it can; otherwise, and after any failure, the plain-torch form does; the report says which."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from accel.kernels import choose
from accel.kernels.choose import Kernel, Usage


def doubled(supports=lambda x, scale=2.0: (True, ""), triton_form=lambda x, scale=2.0: x * scale) -> Kernel:
    return Kernel("doubling", lambda x, scale=2.0: x + x, triton_form, supports)


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    """Tensors of the CPU pass for those of a GPU."""
    monkeypatch.setattr(choose, "available", lambda device: (True, ""))


def failing(x, scale=2.0):
    raise RuntimeError("no such instruction")


def test_on_the_cpu_torch_runs_and_the_report_says_why() -> None:
    usage = Usage()
    assert usage.line() == ""
    assert doubled()(torch.ones(2)).tolist() == [2.0, 2.0]
    assert usage.line() == "doubling torch (no CUDA device)"
    assert Usage().line() == ""


def test_the_kernel_runs_where_it_can(on_gpu) -> None:
    usage = Usage()
    assert doubled()(torch.ones(1), scale=3.0).item() == 3.0
    assert usage.line() == "doubling Triton"
    other = Kernel("adding", lambda x: x, lambda x: x, lambda x: (True, ""))
    assert other(torch.ones(1)).item() == 1.0
    assert usage.line() == "adding, doubling Triton"
    usage = Usage()
    doubled()(torch.ones(1), scale=3.0)
    assert doubled()(torch.ones(1), scale=3.0, backend="torch").item() == 2.0
    assert usage.line() == "doubling Triton; doubling torch (asked for)"


def test_what_the_kernel_does_not_take_runs_in_torch(on_gpu) -> None:
    usage, kernel = Usage(), doubled(lambda x, scale=2.0: (x.dtype == torch.float32, f"no kernel for {x.dtype}"))
    kernel(torch.ones(1, dtype=torch.float64))
    assert usage.line() == "doubling torch (no kernel for torch.float64)"
    with pytest.raises(ValueError, match="doubling: the Triton kernel cannot run: no kernel for torch.float64"):
        kernel(torch.ones(1, dtype=torch.float64), backend="triton")


def test_a_failure_is_told_once_and_torch_runs_from_then_on(on_gpu) -> None:
    usage, kernel = Usage(), doubled(triton_form=failing)
    with pytest.warns(RuntimeWarning, match="Triton kernel for doubling failed.*no such instruction"):
        assert kernel(torch.ones(1)).item() == 2.0
    kernel.triton_form = lambda x: x * 5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel(torch.ones(1)).item() == 2.0
    assert usage.line() == "doubling torch (the kernel failed with RuntimeError)"


def test_a_forced_kernel_shows_its_failure_and_out_of_memory_is_none(on_gpu) -> None:
    def full(x, scale=2.0):
        raise torch.OutOfMemoryError("full")

    kernel = doubled(triton_form=full)
    with pytest.raises(torch.OutOfMemoryError):
        kernel(torch.ones(1))
    assert kernel.failure is None
    with pytest.raises(RuntimeError, match="no such instruction"):
        doubled(triton_form=failing)(torch.ones(1), backend="triton")


def test_a_backend_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(ValueError, match="doubling: the Triton kernel cannot run: no CUDA device"):
        doubled()(torch.ones(1), backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda'; use one of auto, torch, triton"):
        doubled()(torch.ones(1), backend="cuda")


@pytest.mark.parametrize(
    ("installed", "compilers", "reason"),
    [
        (None, {"cc"}, "Triton is not installed"),
        (object(), set(), "Triton finds no C compiler"),
        (object(), {"gcc"}, ""),
    ],
)
def test_triton_needs_to_be_there_and_a_compiler_on_linux(monkeypatch, installed, compilers, reason) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: installed)
    monkeypatch.setattr(choose.shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.setattr(choose.os, "name", "posix")
    assert choose.triton_installed.__wrapped__() == (not reason, reason)


def test_importing_the_package_imports_no_triton() -> None:
    """All modules but the device code, and an operation on the CPU."""
    code = (
        "import pkgutil, sys, importlib, torch, accel.kernels as k\n"
        "names = [m.name for m in pkgutil.iter_modules(k.__path__) if not m.name.endswith('_triton')]\n"
        "[importlib.import_module(f'accel.kernels.{name}') for name in names]\n"
        "import accel.engine, accel.kv.bounded\n"
        "from accel.kernels.relative_l1 import Look, group_relative_l1\n"
        "group_relative_l1([Look(torch.ones(1, 1, 4), torch.ones(1, 1, 4), ((0, 1),))], [[1.0, 0.0]])\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'triton'], 'triton was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
