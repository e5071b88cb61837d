"""What is finished stays finished: one JSON file a measurement, found again by everything that it depends on."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

ROWS_VERSION = 1
"""Raise it when code that changes a figure changes: what was stored before counts no longer."""


def told(value: Any) -> Any:
    """What a hash is told of a value that JSON does not know.

    Of a dataclass its name and the fields that are not None, so that a part added later, which is None where it is not
    used, leaves stored measurements valid, while a default that changes does not; of anything else its repr.
    """
    if not is_dataclass(value):
        return repr(value)
    pairs = ((field.name, getattr(value, field.name)) for field in fields(value))
    return {"class": type(value).__name__} | {name: own for name, own in pairs if own is not None}


class NotMeasured(LookupError):
    """A measurement that is not stored, where none may be made."""


class Store:
    """A folder of finished measurements. A file is written whole or not at all, so several processes may share it.

    Args:
        closed: nothing is measured any more; ``get`` of what is not stored raises NotMeasured.
    """

    def __init__(self, folder: Path, closed: bool = False) -> None:
        self.folder, self.closed = folder, closed

    def path(self, name: str, parts: dict[str, Any]) -> Path:
        """File of a measurement: ``name`` for people, and a hash of ``parts`` and ``ROWS_VERSION``."""
        text = json.dumps({"version": ROWS_VERSION, "name": name} | parts, sort_keys=True, default=told)
        return self.folder / f"{name}-{sha256(text.encode()).hexdigest()[:16]}.json"

    def get(self, path: Path, make: Callable[[], Any]) -> Any:
        """What is stored, or what ``make`` returns, stored."""
        if not path.exists():
            if self.closed:
                raise NotMeasured(path.name)
            self.write(path, make())
        return json.loads(path.read_text(encoding="utf-8"))

    def write(self, path: Path, value: Any) -> None:
        self._whole(path, lambda target: target.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))

    def write_latents(self, path: Path, latents: Tensor) -> None:
        """Latents beside a measurement's JSON."""
        self._whole(
            path.with_suffix(".safetensors"), lambda target: save_file({"latents": latents.contiguous()}, target)
        )

    def latents(self, path: Path, make: Callable[[], Tensor]) -> Tensor:
        """Latents stored beside a measurement, or what ``make`` returns, stored."""
        if not path.with_suffix(".safetensors").exists():
            self.write_latents(path, make())
        return load_file(path.with_suffix(".safetensors"))["latents"]

    def pack(self, archive: Path) -> None:
        """Every measurement, without latents, in one small file that can be handed on."""
        rows = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*.json"))}
        archive.write_bytes(lzma.compress(json.dumps(rows, sort_keys=True).encode(), preset=9))

    def unpack(self, archive: Path) -> None:
        """The measurements of an archive, where there is one; those that are here already stay as they are."""
        rows = json.loads(lzma.decompress(archive.read_bytes())) if archive.exists() else {}
        for name, value in rows.items():
            if not (self.folder / name).exists():
                self.write(self.folder / name, value)

    def _whole(self, path: Path, write: Callable[[Path], Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        write(part)
        part.replace(path)
