"""Files of AR video models as core's MODEL: read safely, brought into Wan's own layout and handed to core's loader."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..accel.families import FAMILIES, find_family, foreign, host_metadata
from ..accel.wan_keys import flatten, fold_frame_rate, read_wan
from .host_files import show_text

NODE = "Load AR Video Model"
FOLDER = "diffusion_models"
WEIGHT_DTYPES = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
SAFETENSORS = {".safetensors", ".sft"}
MOST_PARTS = 1000
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")


def model_files() -> list[str]:
    """Files in core's folders for diffusion models."""
    return folder_paths.get_filename_list(FOLDER)


def load_model(name: str, family: str, fps: int, weight_dtype: str) -> tuple[Any, str]:
    """Core's MODEL of a file, and what was found in it; also shown on the node and in the log.

    Args:
        name: one of ``model_files``; of a checkpoint in several files any one. family: a key of ``FAMILIES`` or
            ``auto``. fps: frame rate for models that are told it. weight_dtype: a key of ``WEIGHT_DTYPES``.

    Raises:
        ValueError: one sentence with the node, the file, what is wrong and the remedy.
    """
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(f"{NODE}: {name} is in no {FOLDER} folder; put it there, or choose another file.")
    model, report = _load(path, family, fps, weight_dtype)
    logging.info("%s: %s", NODE, report)
    context = get_executing_context()
    if context is not None:
        show_text(context.node_id, report)
    return model, report


def reload_model(path: str, family: str, fps: int, weight_dtype: str, disable_dynamic: bool = False) -> Any:
    """The same MODEL again, for core, which asks for it where it runs a model on several GPUs."""
    return _load(path, family, fps, weight_dtype, disable_dynamic)[0]


def _load(path: str, family: str, fps: int, weight_dtype: str, disable_dynamic: bool = False) -> tuple[Any, str]:
    file = Path(path).name
    try:
        tensors, metadata = _read_all(Path(path))
        refusal = foreign(tensors)
        if refusal:
            raise ValueError(refusal)
        weights = read_wan(tensors)
        del tensors
        finding = find_family(family, weights, metadata, file)
        report = finding.report(file, weights, fps)
        metadata = host_metadata(finding.family, weights, metadata)
        state = fold_frame_rate(weights.tensors, fps) if weights.tells_frame_rate else dict(weights.tensors)
        model = _build(state, WEIGHT_DTYPES[weight_dtype], metadata, disable_dynamic)
    except ValueError as error:
        raise ValueError(f"{NODE}: {file} cannot be loaded: {str(error).rstrip('.')}.") from error
    sampling, shift = model.model.model_sampling, FAMILIES[finding.family].shift
    if shift is not None and sampling.shift != shift:
        sampling.set_parameters(shift=shift, multiplier=sampling.multiplier)
    model.cached_patcher_init = (reload_model, (path, family, fps, weight_dtype))
    return model, report


def _build(state: dict[str, Tensor], options: dict[str, Any], metadata: dict[str, str], disable_dynamic: bool) -> Any:
    try:
        model = comfy.sd.load_diffusion_model_state_dict(state, dict(options), metadata, disable_dynamic)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # shapes and settings that core takes on trust
        raise ValueError(f"ComfyUI could not build it ({_first_line(error)}); download it again") from error
    if model is None:
        raise ValueError("ComfyUI knows no model with this layout; use a file that core's Load Diffusion Model takes")
    return model


def _read_all(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint in one file or several."""
    part = SHARD.fullmatch(path.name)
    if not part or not 0 < int(part[2]) <= int(part[3]) <= MOST_PARTS:
        return _read(path)
    digits, count = len(part[2]), int(part[3])
    paths = [path.with_name(f"{part[1]}-{number:0{digits}}-of-{part[3]}{part[4]}") for number in range(1, count + 1)]
    absent = [one.name for one in paths if not one.is_file()]
    if absent:
        named = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        raise ValueError(f"it is one of {count} files, and {named} not beside it; put all in one folder")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for one in paths:
        try:
            more, told = _read(one)
        except ValueError as error:
            raise ValueError(f"of its {count} files {one.name} is the trouble: {error}") from error
        if twice := tensors.keys() & more.keys():
            raise ValueError(f"{one.name} repeats {min(twice)} of another of its {count} files; download them again")
        tensors |= more
        metadata |= told
    return tensors, metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Through core's reader, which runs no code from the file."""
    try:
        tree, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
        tensors = flatten(tree)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror or type(error).__name__})") from error
    except (AttributeError, TypeError) as error:
        raise ValueError("it holds no weights by name; choose another file") from error
    except Exception as error:
        if path.suffix.lower() in SAFETENSORS:
            reason = f"it is no whole safetensors file ({_first_line(error)}); download it again"
        elif "Unsupported global" in str(error):
            reason = "it holds more than tensors, and code in files is never run; convert it to safetensors"
        else:
            reason = "it is cut off or no PyTorch file; download it again"
        raise ValueError(reason) from error
    if not tensors:
        raise ValueError("it holds no weights by name; choose another file")
    return tensors, metadata or {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
