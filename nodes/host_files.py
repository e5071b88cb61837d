"""What the demo and timeline nodes need of ComfyUI's folders, latent space and devices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import folder_paths
import torch
from torch import Tensor

TINY_MODELS = Path(__file__).parents[1] / "demo" / "weights" / "diffusion_models"
_WAN = comfy.latent_formats.Wan21()


def register_tiny_models() -> None:
    """Lists the tiny checkpoints in core's Load Diffusion Model."""
    folder_paths.add_model_folder_path("diffusion_models", str(TINY_MODELS))


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
