"""What a run leaves behind in ComfyUI's process: tensors that live on, and what is changed on a MODEL.

Memory is watched in two ways that do not depend on each other: weak references to every storage that was made while
``Storages`` watched, and a count of all tensors that Python knows.
"""

from __future__ import annotations

import gc
import sys
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

FRESH = ("aten::lift_fresh", "aten::lift")
PATCHER = (
    "object_patches", "object_patches_backup", "patches", "backup", "wrappers", "callbacks", "injections",
    "hook_patches", "attachments", "additional_models", "weight_wrapper_patches", "model_options", "patches_uuid",
    "hook_mode", "force_cast_weights", "is_injected",
)  # fmt: skip


class Storages(TorchDispatchMode):
    """Keeps a weak reference to every storage that is made while it is entered.

    Args:
        package: folder of a pack; allocations made in its files are told apart. act: called with the place of each of
            them, ``file.py:function``, before it is kept; what it raises reaches the pack as an allocator's error does.
    """

    def __init__(self, package: str = "", act: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.package, self.act = package, act
        self._made: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = set() if func.name() in FRESH else {_storage(x)._cdata for x in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = _storage(tensor)
            if storage._cdata in known or not storage.nbytes():
                continue
            place = self._place()
            if place and self.act is not None:
                self.act(place)
            self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), place
        return out

    def alive(self, but: tuple[torch.Tensor, ...] = ()) -> list[tuple[str, int]]:
        """Place and bytes of the storages that are still there, without those of ``but``."""
        kept = {_storage(tensor)._cdata for tensor in but}
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return [(place, size) for key, (_, size, place) in self._made.items() if key not in kept]

    def _place(self) -> str:
        """Where in the pack's files the tensor was made; nothing where that was not in one of them."""
        frame = sys._getframe(2) if self.package else None
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(self.package):
                return f"{file.rpartition('/')[2]}:{frame.f_code.co_name}"
            if "/torch/" not in file and file != __file__:
                return ""
            frame = frame.f_back
        return ""


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for part in tree for tensor in _tensors(part)]


def census() -> list[tuple[int, ...]]:
    """Shapes of all tensors that Python knows and that were made since ``gc.freeze`` was called last."""
    return [tuple(thing.shape) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


class Snapshot:
    """All that can be changed on MODELs of one network, and on the network, by name.

    What is not plain has to stay the very same object; weights and buffers have to keep their content too.
    """

    def __init__(self, *models: Any) -> None:
        self._held: list[Any] = []  # so that no other object can take the place, and so the identity, of one
        self.seen: dict[str, Any] = {}
        for number, model in enumerate(models):
            for name in PATCHER:
                self.seen[f"patcher {number} {name}"] = self._told(getattr(model, name, None))
        for path, module in models[0].model.named_modules():
            own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
            hooks = {key: value for key, value in vars(module).items() if key.endswith("_hooks") and value}
            self.seen[f"{path} class"] = self._told(type(module))
            self.seen[f"{path} forward"] = self._told(getattr(module.forward, "__func__", module.forward))
            self.seen[f"{path} attributes"] = self._told(own)
            self.seen[f"{path} hooks"] = self._told(hooks)
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                self.seen[f"{path} {name}"] = None if tensor is None else self._content(tensor)

    def changes(self, later: Snapshot) -> list[str]:
        """What is not as it was, one phrase each."""
        names = dict.fromkeys((*self.seen, *later.seen))
        pairs = ((name, self.seen.get(name), later.seen.get(name)) for name in names)
        return [f"{name}: {was} is now {now}"[:300] for name, was, now in pairs if was != now]

    def _told(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): self._told(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._told(part) for part in value]
        if isinstance(value, str | int | float | bool | None):
            return value
        self._held.append(value)
        return f"{type(value).__name__} {id(value)}"

    def _content(self, tensor: torch.Tensor) -> tuple:
        self._held.append(tensor)
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return (
            id(tensor),
            str(tensor.dtype),
            str(tensor.device),
            tuple(tensor.shape),
            tensor.data_ptr(),
            zlib.crc32(data),
        )
