"""Tensors and JSON on disk that are either whole or not there: temporary name, flush to the disk, rename.

Tensors are written in the safetensors format one after the other, so that gigabytes of K/V never lie in memory twice,
and every file has a SHA-256 digest that whoever refers to it keeps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PARTIAL = ".part"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHUNK = 1 << 20


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Any = None) -> str:
    """Writes a safetensors file under ``path`` or nothing at all; returns its SHA-256 digest.

    Args:
        tensors: of any device and layout, by name; copied to the host one at a time.
        facts: plain JSON that goes into the file's metadata.

    Raises:
        ValueError: a dtype that safetensors does not know. OSError: the disk is full or cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"facts": json.dumps(facts)}}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"Tensor file: {name} is {tensor.dtype}, which safetensors cannot hold; convert it first.")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def content(file: BinaryIO) -> None:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for tensor in tensors.values():
            data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)

    write_whole(path, content)
    return digest.hexdigest()


def read_tensors(path: Path, digest: str) -> tuple[dict[str, Tensor], Any]:
    """Tensors on the host and facts of a file that ``write_tensors`` wrote.

    Raises:
        ValueError: the file is missing, or not the one that the digest was made of; says which.
    """
    try:
        found = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
        if found.hexdigest() != digest:
            raise ValueError(f"{path.name} is damaged: its content is not what was written")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = (file.metadata() or {}).get("facts", "null")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from None
    try:
        return tensors, json.loads(told)
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name} cannot be read: its facts are no JSON") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON with a checksum of itself under ``path``, or nothing at all."""
    text = _canonical(content)
    whole = json.dumps({"checksum": _checksum(text), **content}, indent=1)
    write_whole(path, lambda file: file.write(whole.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote.

    Raises:
        ValueError: the file is missing, cut off or changed; says which.
    """
    try:
        content = json.loads(path.read_bytes())
        checksum, text = content.pop("checksum"), _canonical(content)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path.name} is missing, cut off or no JSON object") from None
    if checksum != _checksum(text):
        raise ValueError(f"{path.name} is damaged: its content is not what was written")
    return content


def write_whole(path: Path, content: Callable[[BinaryIO], Any]) -> None:
    """Has ``content`` write into a temporary file, brings it to the disk and gives it its name."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Brings the rename to the disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
