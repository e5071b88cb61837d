"""What a run is, as plain JSON with digests for content: two runs with equal descriptions make equal latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..accel.checkpoint import DIGEST
from ..accel.engine import Acceleration
from .job import Job

SAMPLES, SAMPLE = 16, 1 << 16  # places of a weights file that are looked at, and bytes at each


def describe_run(
    model: Any,
    conditionings: Mapping[str, list],
    start: Tensor,
    job: Job,
    acceleration: Acceleration,
    above: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that determines the latents of a run.

    Args:
        model: core's MODEL. conditionings: by name, as they were given. start: start noise ``[B, C, T, H, W]``.
        above: digests of the graphs that the model and the conditionings come from (``graph_digest``), by name; they
            stand for what has no content to look at here, such as patches and control models.
    """
    plan = asdict(job.plan)
    settings = {"mode": job.mode, "solver": job.solver, "block": job.block, "cfg": job.cfg, "seed": job.seed}
    settings |= {"history_noise": job.history_noise, "sigmas": job.table.tolist(), **plan}
    settings |= {"history_guidance": job.history_guidance} if job.history_guidance else {}
    return _plain(
        {
            "model": _weights(model) | {"graph": above.get("model")},
            "settings": settings,
            "acceleration": asdict(acceleration),
            **{name: digest([given, above.get(name)]) for name, given in conditionings.items()},
            "noise": digest(start),
            "computed on": [_device(start.device), str(model.model_dtype()), torch.__version__],
        }
    )


def graph_digest(graph: Mapping[str, Any] | None, node: str | None, name: str) -> str:
    """Digest of all nodes that an input of a node of an API-format graph comes from, whatever their ids; of nothing
    where the graph is not known."""

    source = ((graph or {}).get(str(node)) or {}).get("inputs", {}).get(name)
    return digest(json.dumps(_expanded(graph, source), sort_keys=True, default=str) if source else "")


def node_digest(graph: Mapping[str, Any] | None, node: str | None) -> str:
    """Digest of a node of an API-format graph and of all nodes before it, whatever their ids; empty where it is not
    known."""
    known = str(node) in (graph or {})
    return digest(json.dumps(_expanded(graph, [str(node), 0]), sort_keys=True, default=str)) if known else ""


def _expanded(graph: Mapping[str, Any], value: Any) -> Any:
    """A value of an input with every link in the place of what it leads to."""
    if isinstance(value, list) and len(value) == 2 and str(value[0]) in graph:
        source = graph[str(value[0])]
        inputs = {key: _expanded(graph, entry) for key, entry in sorted(source.get("inputs", {}).items())}
        return [source.get("class_type"), inputs, value[1]]
    return value


def digest(content: Any) -> str:
    """Digest of tensors, numbers and texts in lists and dicts; anything else counts by its class."""
    found = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{tuple(value.shape)} {value.dtype}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                found.update(f"{key}:".encode())
                take(value[key])
        elif isinstance(value, list | tuple):
            found.update(f"[{len(value)}".encode())
            for part in value:
                take(part)
        elif value is None or isinstance(value, str | int | float | bool):
            found.update(repr(value).encode())
        else:
            found.update(type(value).__name__.encode())

    take(content)
    return DIGEST + found.hexdigest()


def _weights(model: Any) -> dict[str, Any]:
    """Name, size and samples of the file that a MODEL was loaded from, what it is, and its patches' strengths."""
    loader = getattr(model, "cached_patcher_init", None)
    path = Path(loader[1][0]) if loader and loader[1] and isinstance(loader[1][0], str) else None
    told: dict[str, Any] = {"class": type(model.model).__name__}
    if path is not None and path.is_file():
        told |= {"file": path.name, "weights": _file_digest(path)}
    else:
        told["weights"] = digest([[name, list(value.shape)] for name, value in model.model_state_dict().items()])
    patches = getattr(model, "patches", {})
    told["patches"] = digest({name: [entry[0] for entry in entries] for name, entries in patches.items()})
    return told


def _file_digest(path: Path) -> str:
    """Of a file's size and of samples spread over it, the first bytes among them; a checkpoint of 30 GB takes no
    time."""
    size, found = path.stat().st_size, hashlib.sha256()
    found.update(str(size).encode())
    with path.open("rb") as file:
        for place in range(SAMPLES):
            file.seek(max(size - SAMPLE, 0) * place // (SAMPLES - 1))
            found.update(file.read(SAMPLE))
    return DIGEST + found.hexdigest()


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that descriptions can be compared."""
    return json.loads(json.dumps(value, default=str))
