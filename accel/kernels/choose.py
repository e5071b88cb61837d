"""Which form of an operation runs: the Triton kernel where it can, else the plain-torch form, its specification.

Triton is optional: nothing imports it before tensors on a CUDA device ask for a kernel. A kernel that fails to compile
or launch is given up for the rest of the process, with a warning. Every call is counted, so that a run can say what it
used (``Usage``).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
TRITON = "Triton"
LEAST_CAPABILITY = (8, 0)

Verdict = tuple[bool, str]
"""Whether something can be done, and if not, why."""

interpreter: Callable[[Callable], Any] | None = None
"""What makes device code launchable for tensors on the CPU; tests set it to Triton's interpreter."""

_calls: Counter[tuple[str, str]] = Counter()


@functools.cache
def triton_installed() -> Verdict:
    """Whether Triton is there, and a C compiler where it needs one for its launchers."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    if os.name != "nt" and not any(shutil.which(name) for name in compilers if name):
        return False, "Triton finds no C compiler"
    return True, ""


@functools.cache
def available(device: torch.device) -> Verdict:
    """Whether Triton kernels run on a device; what an operation wants of its tensors is said by its ``supports``."""
    if device.type != "cuda":
        return False, "no CUDA device"
    if torch.version.hip is not None:
        return False, "written for NVIDIA devices"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return False, "needs compute capability 8.0 or more"
    return triton_installed()


class Traffic(NamedTuple):
    """What an operation's kernels do to memory: launches, and bytes at distinct addresses that each of them reads and
    writes, summed."""

    launches: int
    read: int
    written: int


class Kernel:
    """An operation in two forms with the same arguments; calling it runs one of them.

    Args:
        name: as reports call it.
        torch_form: the specification. triton_form: launches the kernel; everything that can fail at its first launch
            comes before it writes into an argument.
        supports: of the same arguments, whether the kernel takes them, whatever their device.
    """

    def __init__(
        self, name: str, torch_form: Callable, triton_form: Callable, supports: Callable[..., Verdict]
    ) -> None:
        self.name, self.torch_form, self.triton_form, self.supports = name, torch_form, triton_form, supports
        self.failure: str | None = None

    def choose(self, *args: Any, **options: Any) -> Verdict:
        """Whether these arguments go to the kernel, and if not, why."""
        if self.failure is not None:
            return False, self.failure
        ok, reason = available(_device(args, options))
        return self.supports(*args, **options) if ok else (ok, reason)

    def __call__(self, *args: Any, backend: str = "auto", **options: Any) -> Any:
        """The operation.

        Args:
            backend: ``auto``, ``torch``, or ``triton``, which raises where ``auto`` falls back.

        Raises:
            ValueError: an unknown backend, or ``triton`` for arguments the kernel does not take.
        """
        if backend not in BACKENDS:
            raise ValueError(f"{self.name}: backend is {backend!r}; use one of {', '.join(BACKENDS)}.")
        if backend == "triton":
            ok, reason = available(_device(args, options)) if interpreter is None else (True, "")
            ok, reason = self.supports(*args, **options) if ok else (ok, reason)
            if not ok:
                raise ValueError(f"{self.name}: the Triton kernel cannot run: {reason}; use backend 'torch' or 'auto'.")
            return self._launch(args, options)
        ok, reason = self.choose(*args, **options) if backend == "auto" else (False, "asked for")
        if ok:
            try:
                return self._launch(args, options)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reason = self.failure = f"the kernel failed with {type(error).__name__}"
                warnings.warn(
                    f"AR Video Accelerator: the Triton kernel for {self.name} failed and plain torch takes its place "
                    f"until the program is restarted ({type(error).__name__}: {error}).",
                    RuntimeWarning,
                    stacklevel=2,
                )
        result = self.torch_form(*args, **options)
        _calls[self.name, f"torch ({reason})"] += 1
        return result

    def _launch(self, args: tuple, options: dict[str, Any]) -> Any:
        device = _device(args, options)
        if device.type == "cuda":
            with torch.cuda.device(device):
                result = self.triton_form(*args, **options)
        else:
            result = self.triton_form(*args, **options)
        _calls[self.name, TRITON] += 1
        return result


class Usage:
    """What was used since this was made, and before in the same run where it was resumed."""

    def __init__(self) -> None:
        self._before = dict(_calls)
        self._earlier: set[tuple[str, str]] = set()

    def state(self) -> list[list[str]]:
        """Operations and forms used, for ``load``."""
        return [list(pair) for pair in sorted({*self.calls(), *self._earlier})]

    def load(self, state: Iterable[Sequence[str]]) -> None:
        """Remembers what an earlier part of the run used."""
        self._earlier = {(str(name), str(form)) for name, form in state}

    def calls(self) -> dict[tuple[str, str], int]:
        """Calls by operation and form."""
        since = {key: count - self._before.get(key, 0) for key, count in _calls.items()}
        return {key: count for key, count in since.items() if count}

    def line(self) -> str:
        """One line, as in ``relative L1 Triton; multistep, time turn torch (no CUDA device)``; empty where no
        operation was called."""
        forms: dict[str, list[str]] = {}
        for name, form in self.state():
            forms.setdefault(form, []).append(name)
        return "; ".join(f"{', '.join(forms[form])} {form}" for form in sorted(forms))


@functools.cache
def _jitted(function: Callable) -> Any:
    import triton

    return triton.jit(function)


def jitted(function: Callable, device: torch.device) -> Any:
    """Device code ready to launch: ``jitted(function, device)[grid](...)``."""
    return _jitted(function) if device.type == "cuda" else interpreter(function)


def _device(args: Iterable[Any], options: dict[str, Any]) -> torch.device:
    tensor = next(_tensors((*args, *options.values())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
