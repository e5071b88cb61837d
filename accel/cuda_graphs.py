"""Replayed forwards: the forward of a causal block recorded once as a CUDA graph, and replayed for every later one.

A few-step causal model with small blocks is bound by the launches of its kernels, which a CUDA graph makes in one. A
graph repeats the same kernels on the same addresses, so everything that changes from forward to forward has to come in
through tensors: latents, noise levels, prompt, positions, and the places of the block in the ring. What is read of the
K/V has one length once the ring is full, and their allocation never moves; before that, forwards are made as always.
One graph serves all forwards, denoising and committing, of one number of latent frames.

This has not been run on a GPU: its tests replay the recorded operators on a CPU. It is for denoisers of the library
that say what they give their model (``Recordable``); models inside ComfyUI, which may be cast, offloaded or patched
between two calls, are not served. Nothing uses it unless asked to: wrap a denoiser in ``GraphedDenoiser``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from .attention.dense import attend
from .call import Call, Kind
from .kv.budget import WINDOW
from .kv.memory import KVMemory
from .kv.slots import PlainSlots

WARM_UPS = 3
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


class Recordable(Protocol):
    """A ``Denoiser`` over a model with a K/V store, in two halves."""

    model: Callable[..., Tensor]

    def inputs(self, call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
        """Latents, noise levels, prompt, positions (all tensors) and the K/V store, begun for the call's block."""
        ...

    def guided(self, out: Tensor) -> Tensor:
        """The velocity of the model's answer."""
        ...


def record(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Warms ``run`` up on a stream of its own and records it: its result, and what makes it anew in the same place."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return result, graph.replay


def supports(store: Any, device: torch.device, model: Any = None) -> tuple[bool, str]:
    """Whether forwards over this K/V store can be replayed, and if not, why."""
    if device.type != "cuda":
        return False, f"CUDA graphs need a CUDA device, the latents are on {device.type}"
    if not isinstance(store, KVMemory):
        return False, f"{type(store).__name__} grows with the video; keep K/V within a budget (KVBudgetConfig)"
    config = store.config
    if config.keep != WINDOW:
        return False, f"keep is {config.keep!r}, which changes how much is read from block to block; use {WINDOW!r}"
    if config.storage != "model" or config.offload:
        return False, "8-bit or offloaded K/V are unpacked for every read; use storage 'model' and offload 0"
    if store.sparse_note() is not None:
        return False, "sparse attention picks what it reads anew for every block; remove the AnnConfig"
    if isinstance(model, torch.nn.Module):
        tensors = [*model.parameters(), *model.buffers()]
        if any(tensor.device != device for tensor in tensors):
            return False, "a part of the model is not on the device (offloaded or low VRAM)"
        if any(tensor.is_floating_point() and tensor.itemsize < 2 for tensor in tensors):
            return False, "8-bit weights are cast in every forward"
        if any(module._forward_pre_hooks or module._forward_hooks for module in model.modules()):
            return False, "modules have hooks, which a graph would not call"
    return True, ""


class Replays:
    """Functions of tensors, each recorded at its first call and replayed at later ones.

    Args:
        record: as the function of this module; what tests put in its place repeats the recorded operators.
    """

    def __init__(self, record: Record = record) -> None:
        self._record = record
        self._graphs: dict[Hashable, tuple[list[Tensor], Tensor, Callable[[], None]]] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def forget(self) -> None:
        """Drops all graphs: the addresses they know are no longer right."""
        self._graphs.clear()

    def __call__(self, key: Hashable, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """``function(*inputs)``, a new tensor.

        Args:
            key: which graph; functions and anything but the values of ``inputs`` must be the same where keys are.
            function: reads nothing that changes but its arguments, and nothing back from the device.
            inputs: copied into the graph's own tensors.

        Raises:
            ValueError: inputs of other shapes, dtypes or devices than those recorded.
        """
        full = (key, *((tuple(given.shape), given.dtype, given.device) for given in inputs))
        if full not in self._graphs:
            buffers = [given.clone() for given in inputs]
            result, replay = self._record(lambda: function(*buffers))
            self._graphs[full] = (buffers, result, replay)
        buffers, result, replay = self._graphs[full]
        for buffer, given in zip(buffers, inputs, strict=True):
            buffer.copy_(given, non_blocking=True)
        replay()
        return result.clone()


class GraphedDenoiser:
    """A denoiser whose forwards are replayed where they can be; in all else the denoiser it wraps.

    Args:
        denoiser: a ``Recordable``. record: as of ``Replays``. check: as ``supports``.

    Attributes:
        reason: why the last forward was not replayed; empty where it was. A store is checked once.
    """

    def __init__(
        self, denoiser: Recordable, record: Record = record, check: Callable[..., tuple[bool, str]] = supports
    ) -> None:
        self._denoiser, self._check, self._replays = denoiser, check, Replays(record)
        self._addresses: tuple[int, ...] = ()
        self._checked: tuple[Any, tuple[bool, str]] | None = None
        self.reason = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    @property
    def graphs(self) -> int:
        """How many there are: one for every number of latent frames a block has."""
        return len(self._replays)

    @torch.no_grad()
    def velocity(self, call: Call, x: Tensor) -> Tensor:
        denoiser = self._denoiser
        *given, store = denoiser.inputs(call, x)
        view = self._view(store, x)
        if view is None:
            out = denoiser.model(*given, None, store)
        else:
            inputs = [*given, view.open(x.device)]
            out = self._replays("forward", lambda *buffers: _forward(denoiser.model, view, buffers), inputs)
        if call.kind is not Kind.DENOISE:
            store.commit()
        return denoiser.guided(out)

    def _view(self, store: Any, x: Tensor) -> FullMemory | None:
        """The store as a graph sees it; None where forwards are not replayed."""
        if self._checked is None or self._checked[0] is not store:
            self._checked = store, self._check(store, x.device, self._denoiser.model)
        ok, self.reason = self._checked[1]
        if not ok:
            return None
        view = FullMemory.of(store)
        if view is None:
            self.reason = "the ring is not full yet"
            return None
        if view.addresses != self._addresses:
            self._replays.forget()
            self._addresses = view.addresses
        return view


class FullMemory:
    """A ``KVMemory`` whose rings are full: every read has one length, and a block's places come as a tensor."""

    def __init__(self, memory: KVMemory, slots: Sequence[Sequence[PlainSlots]]) -> None:
        self.stores, self._slots, self._branches = memory.stores, slots, memory.branches
        self._places: Tensor | None = None

    @classmethod
    def of(cls, memory: KVMemory) -> FullMemory | None:
        """None where a ring has room left."""
        layers = range(memory.shape.layers)
        slots = [[store.slots(layer) for layer in layers] for store in memory.stores]
        full = all(store.keys == memory.layout.places for store in memory.stores)
        return cls(memory, slots) if full and all(isinstance(one, PlainSlots) for row in slots for one in row) else None

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of everything that is written and read."""
        return tuple(side.data_ptr() for row in self._slots for one in row for side in (one.keys, one.values))

    def open(self, device: torch.device) -> Tensor:
        """Makes room for the block that was begun, and says where it lies."""
        for store in self.stores:
            store.open()
        return self.stores[0].places(device)

    def at(self, places: Tensor) -> FullMemory:
        """The same, for a block that lies at ``places``."""
        self._places = places
        return self

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As ``KVMemory.attend``, without anything but tensors."""
        answers = []
        sides = (side.chunk(self._branches) for side in (queries, keys, values))
        for row, q, k, v in zip_longest(self._slots, *sides):
            if row is None:  # a branch that keeps nothing
                answers.append(attend(q, k, v))
                continue
            slots = row[layer]
            slots.keys.index_copy_(1, self._places, k.to(slots.keys.dtype))
            slots.values.index_copy_(1, self._places, v.to(slots.values.dtype))
            answers.append(attend(q, slots.keys, slots.values))
        return torch.cat(answers)


def _forward(model: Callable[..., Tensor], view: FullMemory, inputs: Sequence[Tensor]) -> Tensor:
    *given, places = inputs
    return model(*given, None, view.at(places))
