"""A device that is not there: tensors that say they lie on it, keep their numbers on the CPU, and give nothing away
unseen.

How many times a GPU run waits cannot be read off a CPU run: on a CPU ``tolist`` and ``numpy`` reach the memory without
passing the dispatcher, and nothing is ever copied. Here a wrapper subclass (on torch's Python ``PrivateUse1`` backend,
so that factories, ``.to`` and device guards work) has no memory of its own: every way to its numbers is an operator
that ``StandIn`` sees, and those that are not (``tolist``, ``numpy``, ``torch.tensor(..., device=...)``) raise in torch
itself and are given or refused here. So nothing can be read that is not counted. What is counted, by ``StandIn.told``:

- ``read``: the host waits for numbers (``item``, ``bool``, ``tolist``, ``cpu``, ``equal``, copies into memory that is
  not pinned);
- ``sized``: the host waits for a size (``nonzero``, ``masked_select``, indexing by a mask, ``unique``);
- ``upload``: a copy to the device that waits for it (``.to`` without ``non_blocking``, an index in host memory);
- ``sent``: a copy into pinned memory beside the work; ``wait``: the host waits for such a copy, told with how many
  later ones are then still on their way (so the device has not run dry).

A sent copy arrives only when its event is waited for (a GPU that is always behind), or at once with ``lag=False``;
until then its memory holds NaN, so reading it early shows.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from accel import readback

NAME = "standin"
ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.item.default}
SIZED = {"nonzero", "nonzero_numpy", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive",
         "bincount", "repeat_interleave"}  # fmt: skip
MIXES = {"copy_", "_to_copy", "index", "index_put", "index_put_", "set_", "_index_put_impl_"}


def device() -> torch.device:
    """The stand-in, registered at first."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)
    return torch.device(NAME, 0)


class There(torch.Tensor):
    """A tensor on the stand-in; ``held`` has its numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=device(), requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on the stand-in outside of a StandIn")

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("can't convert a tensor of the stand-in to numpy; a GPU's neither")

    def __repr__(self):
        return f"There({tuple(self.shape)}, {self.dtype})"


def put(value):
    """A tensor on the stand-in, or a module whose parameters and buffers lie there (in place)."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = There(parameter.detach())
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = There(buffer)
        return value
    return There(value)


class StandIn(TorchDispatchMode):
    """Runs operators on the stand-in and counts what the host waits for.

    Attributes:
        told: ``(kind, operator, where)`` in order; ``where`` is the innermost line of this project.
    """

    def __init__(self, monkeypatch, lag: bool = True) -> None:
        super().__init__()
        self.told: list[tuple[str, str, str]] = []
        self.lag, self._pinned, self._travelling = lag, set(), []
        monkeypatch.setattr(torch, "Generator", _Generator)
        monkeypatch.setattr(readback, "alongside", lambda where: torch.device(where).type == NAME)
        monkeypatch.setattr(torch.cuda, "Event", lambda: _Event(self))
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)

    def counts(self) -> Counter:
        return Counter(kind for kind, *_ in self.told)

    def places(self, *kinds: str) -> Counter:
        return Counter((kind, name, where) for kind, name, where in self.told if kind in kinds)

    def note(self, kind: str, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
        own = [f for f in frames if Path(f.filename).relative_to(ROOT).parts[0] in ("accel", "demo", "bench", "nodes")]
        where = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].name}" if own else "a test"
        self.told.append((kind, name, where))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [*_tensors(args), *_tensors(list(kwargs.values()))]
        there = [tensor for tensor in tensors if isinstance(tensor, There)]
        here = [tensor for tensor in tensors if not isinstance(tensor, There)]
        name = func.overloadpacket.__name__
        target = kwargs.get("device")
        lands = bool(there) if target is None else torch.device(target).type == NAME
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
            made = func(*args, **kwargs)
            self._pinned.add(made.untyped_storage().data_ptr())
            return made
        if not there and not lands:
            return func(*args, **kwargs)
        if lands and target is not None:
            kwargs["device"] = torch.device("cpu")
        self._count(func, name, args, kwargs, there, here, lands)
        if name == "copy_" and not isinstance(args[0], There) and isinstance(args[1], There):
            return self._bring(args[0], args[1], kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        out = func(*_held(args), **{key: _held(value) for key, value in kwargs.items()})
        return _wrapped(out, {id(leaf.held): leaf for leaf in there}) if lands and name != "equal" else out

    def _count(self, func, name, args, kwargs, there, here, lands) -> None:
        if func in READS:
            self.note("read", name)
        elif name in SIZED and (name != "repeat_interleave" or func is aten.repeat_interleave.Tensor):
            self.note("sized", name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for index in args[1]:
                if isinstance(index, There) and index.dtype in (torch.bool, torch.uint8):
                    self.note("sized", name)
                elif index is not None and not isinstance(index, There):
                    self.note("upload", name)
        elif name == "_to_copy":
            if there and not lands:
                self.note("read", name)
            elif here and lands and not kwargs.get("non_blocking"):
                self.note("upload", name)
        elif name == "copy_":
            onto, source = args[:2]
            alongside = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if isinstance(onto, There) and not isinstance(source, There) and not alongside:
                self.note("upload", name)
        elif name not in MIXES and there and any(leaf.ndim for leaf in here):
            raise RuntimeError(f"{func}: tensors on the stand-in and on the CPU; a GPU refuses this, too")

    def _bring(self, onto, source, alongside):
        pinned = onto.untyped_storage().data_ptr() in self._pinned
        if not (alongside and pinned):
            self.note("read", "copy_")
            onto.copy_(source.held)
        else:
            self.note("sent", "copy_")
            self._travelling.append((onto, source.held.clone()))
            onto.fill_(float("nan") if onto.is_floating_point() else -(2**30))
            if not self.lag:
                self.arrive()
        return onto

    def arrive(self, count: int | None = None) -> None:
        count = len(self._travelling) if count is None else count
        for onto, value in self._travelling[:count]:
            onto.copy_(value)
        del self._travelling[:count]


class _Generator(torch.Generator):
    """Random numbers of the stand-in are drawn on the CPU."""

    def __new__(cls, where="cpu"):
        return super().__new__(cls, "cpu")


class _Event:
    """A CUDA event: what was sent before it is there once it was waited for."""

    def __init__(self, standin: StandIn) -> None:
        self.standin = standin

    def record(self, *_) -> None:
        self.behind = list(self.standin._travelling)

    def query(self) -> bool:
        return not any(one is two for one in self.behind for two in self.standin._travelling)

    def synchronize(self) -> None:
        travelling = self.standin._travelling
        if not self.query():
            last = max(i for i, one in enumerate(travelling) if any(one is two for two in self.behind))
            self.standin.arrive(last + 1)
        self.standin.note("wait", f"{len(travelling)} behind")


def _held(value):
    if isinstance(value, There):
        return value.held
    return type(value)(map(_held, value)) if isinstance(value, list | tuple) else value


def _wrapped(value, given):
    if isinstance(value, list | tuple):
        return type(value)(_wrapped(one, given) for one in value)
    if not isinstance(value, torch.Tensor) or isinstance(value, There):
        return value
    return given[id(value)] if id(value) in given else There(value)


def _tensors(value):
    """Every tensor in arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
