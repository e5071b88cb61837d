"""What the nodes need of ComfyUI's files, folders, latent space, devices and messages."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import folder_paths
import torch
from safetensors import safe_open
from server import PromptServer
from torch import Tensor

TINY_MODELS = Path(__file__).parents[1] / "demo" / "weights" / "diffusion_models"
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
    with safe_open(path, "pt") as file:
        told = (file.metadata() or {}).get("tiny")
    return (json.loads(told)["kind"], path) if told else None


def show_text(node_id: str, text: str) -> None:
    """Shows ``text`` on a node in the browser; nobody may be looking."""
    PromptServer.instance.send_progress_text(text, node_id)


def to_model_space(latents: Tensor) -> Tensor:
    """LATENT values as core keeps them ``[B, 16, T, H, W]`` -> what Wan models see, fp32."""
    return _WAN.process_in(latents.float())


def to_latent_space(latents: Tensor) -> Tensor:
    """The inverse of ``to_model_space``."""
    return _WAN.process_out(latents.float())


def empty_latent(*shape: int) -> Tensor:
    """Zeros where core keeps the tensors that travel between nodes."""
    return torch.zeros(shape, device=comfy.model_management.intermediate_device())


def stays_in_output_folder(filename_prefix: str) -> bool:
    """Whether files of this prefix land in ComfyUI's output folder or below."""
    output = os.path.abspath(folder_paths.get_output_directory())
    folder = os.path.abspath(os.path.join(output, os.path.dirname(os.path.normpath(filename_prefix))))
    return folder == output or folder.startswith(output + os.sep)


def new_run(filename_prefix: str) -> tuple[Path, str, str]:
    """Folder for a run in progress, how the names of its results begin (with a number of its own) and their subfolder,
    in the output folder."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    stem = f"{name}_{counter:05}"
    return Path(folder, stem + RUN), stem, subfolder


def unfinished_runs(filename_prefix: str) -> list[tuple[Path, str, str]]:
    """Runs in progress of this prefix as ``new_run`` gave them, newest first."""
    folder, name, _, subfolder, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    found = re.compile(re.escape(name) + r"_\d{5,}" + re.escape(RUN))
    runs = [path for path in Path(folder).iterdir() if found.fullmatch(path.name) and path.is_dir()]
    runs.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [(path, path.name.removesuffix(RUN), subfolder) for path in runs]


def save_texts(filename_prefix: str, texts: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Writes ``texts`` (by file extension) under one new number in the output folder.

    Returns:
        By extension, the file as core lists results: ``{"filename", "subfolder", "type"}``.
    """
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    results = {}
    for extension, text in texts.items():
        filename = f"{name}_{counter:05}_.{extension}"
        Path(folder, filename).write_text(text, encoding="utf-8")
        results[extension] = {"filename": filename, "subfolder": subfolder, "type": "output"}
    return results
