"""What the nodes need of ComfyUI's files, folders, latent space, devices and messages."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from server import PromptServer
from torch import Tensor

from ..accel.tensor_file import write_whole
from .inputs import SHORT

TINY_MODELS = Path(__file__).parents[1] / "demo" / "weights" / "diffusion_models"
PART_BYTES, PREFIX_BYTES = 200, 1000  # file systems take 255 a name
RUN = "_run"  # ends the name of a folder with a run in progress
_WAN = comfy.latent_formats.Wan21()


def register_tiny_models() -> None:
    """Lists the tiny checkpoints in core's Load Diffusion Model."""
    folder_paths.add_model_folder_path("diffusion_models", str(TINY_MODELS))


def embedded_model(model: Any) -> tuple[str, Path] | None:
    """Name and file of the embedded tiny model that a MODEL was loaded from; None for any other model.

    The checkpoint's metadata says it, so a copy under another name is known too.
    """
    loader = getattr(model, "cached_patcher_init", None)
    path = Path(loader[1][0]) if loader and loader[1] and isinstance(loader[1][0], str) else None
    if path is None or path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            kind = json.loads((file.metadata() or {})["tiny"])["kind"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return (kind, path) if isinstance(kind, str) else None


def show_text(node_id: str, text: str) -> None:
    """Shows ``text`` on a node in the browser; nobody may be looking."""
    PromptServer.instance.send_progress_text(text, node_id)


def to_model_space(latents: Tensor) -> Tensor:
    """LATENT values as core keeps them ``[B, 16, T, H, W]`` -> what Wan models see, fp32."""
    return _WAN.process_in(latents.float())


def to_latent_space(latents: Tensor) -> Tensor:
    """The inverse of ``to_model_space``."""
    return _WAN.process_out(latents.float())


def empty_latent(node: str, *shape: int) -> Tensor:
    """Zeros where core keeps the tensors that travel between nodes.

    Raises:
        ValueError: more than fits.
    """
    device = comfy.model_management.intermediate_device()
    check_size(node, shape, device)
    return torch.zeros(shape, device=device)


def check_size(node: str, shape: Sequence[int], device: torch.device) -> None:
    """Raises ValueError where a latent of this shape, in fp32 and with its noise, is more than the free memory."""
    needed, free = 2 * 4 * math.prod(shape), comfy.model_management.get_free_memory(device)
    if needed > free:
        raise ValueError(
            f"{node}: a latent {list(shape)} and its noise take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "use fewer frames, a smaller size or a smaller batch."
        )


def check_prefix(node: str, filename_prefix: str) -> None:
    """Raises ValueError where no file of this prefix can lie in ComfyUI's output folder or below."""
    named = f"{node}: filename_prefix {SHORT.repr(filename_prefix)}"
    output = os.path.abspath(folder_paths.get_output_directory())
    folder = os.path.abspath(os.path.join(output, os.path.dirname(os.path.normpath(filename_prefix))))
    if folder != output and not folder.startswith(output + os.sep):
        raise ValueError(
            f"{named} leads out of ComfyUI's output folder; give a name, or a folder and a name, inside it."
        )
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in filename_prefix):
        raise ValueError(f"{named} has characters that no file name can have; use letters, digits, - and _.")
    longest = max(len(os.fsencode(part)) for part in filename_prefix.split("/"))
    if longest > PART_BYTES or len(os.fsencode(filename_prefix)) > PREFIX_BYTES:
        raise ValueError(
            f"{named} is too long; use at most {PART_BYTES} bytes for the name and for each folder, {PREFIX_BYTES} in "
            "all."
        )


@contextmanager
def writing(node: str, filename_prefix: str) -> Iterator[None]:
    """Words what the file system refuses.

    Raises:
        ValueError: with the node, the prefix, the reason and the remedy.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{node}: files of filename_prefix {SHORT.repr(filename_prefix)} cannot be written "
            f"({error.strerror or error}); use another name, or make room and give access in ComfyUI's output folder."
        ) from error


def _place(node: str, filename_prefix: str) -> tuple[Path, str, int, str]:
    """Folder, name, next number and subfolder of a prefix."""
    check_prefix(node, filename_prefix)
    with writing(node, filename_prefix):
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
    return Path(folder), name, counter, subfolder


def new_run(node: str, filename_prefix: str) -> tuple[Path, str, str]:
    """Folder for a run in progress, how the names of its results begin (with a number of its own) and their subfolder,
    in the output folder. Raises as ``check_prefix`` and ``writing``."""
    folder, name, counter, subfolder = _place(node, filename_prefix)
    stem = f"{name}_{counter:05}"
    return folder / (stem + RUN), stem, subfolder


def unfinished_runs(node: str, filename_prefix: str) -> list[tuple[Path, str, str]]:
    """Runs in progress of this prefix as ``new_run`` gave them, newest first. Raises as ``new_run``."""
    folder, name, _, subfolder = _place(node, filename_prefix)
    found = re.compile(re.escape(name) + r"_\d{5,}" + re.escape(RUN))
    runs = [path for path in folder.iterdir() if found.fullmatch(path.name) and path.is_dir()]
    runs.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [(path, path.name.removesuffix(RUN), subfolder) for path in runs]


def save_texts(node: str, filename_prefix: str, texts: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Writes ``texts`` (by file extension) under one new number in the output folder: all of them or none.

    Returns:
        By extension, the file as core lists results: ``{"filename", "subfolder", "type"}``.

    Raises:
        ValueError: as ``check_prefix`` and ``writing``.
    """
    folder, name, counter, subfolder = _place(node, filename_prefix)
    results, written = {}, []
    try:
        with writing(node, filename_prefix):
            for extension, text in texts.items():
                filename = f"{name}_{counter:05}_.{extension}"
                write_whole(folder / filename, lambda file, text=text: file.write(text.encode()))
                written.append(folder / filename)
                results[extension] = {"filename": filename, "subfolder": subfolder, "type": "output"}
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return results
