"""Timelines of the last runs of core's samplers, found again by what was asked for and the latent that came of it.

A sampler of core's has no output for them. What is kept is plain numbers and two digests, no tensor: of the graph
before the sampler and of the latent. A latent that core serves from its cache finds the run that made it, and never one
with other settings that came to the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
from torch import Tensor

from ..accel.timeline import Timeline
from .host_identity import digest, node_digest

KEPT = 32
_runs: deque[FinishedRun] = deque(maxlen=KEPT)


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """Digests of the latent that a run made and of the graph that asked for it, and the run's timeline."""

    latent: str
    asked: str
    timeline: Timeline


def remember(samples: Tensor, graph: Mapping[str, Any] | None, node: str | None, timeline: Timeline) -> None:
    """Keeps the timeline of a run of ``node`` of an API-format graph (None where there is none) that ended with
    ``samples``."""
    _runs.append(FinishedRun(_digest(samples), node_digest(graph, node), timeline))


def run_of(latent: Mapping[str, Any], graph: Mapping[str, Any] | None, node: str | None) -> Timeline | None:
    """The timeline of the run of ``node`` that made a LATENT; None where no accelerated run did."""
    wanted = _digest(latent["samples"]), node_digest(graph, node)
    return next((run.timeline for run in reversed(_runs) if (run.latent, run.asked) == wanted), None)


def source_of(graph: Mapping[str, Any] | None, node: str | None, name: str) -> str | None:
    """Id of the node that an input of a node of an API-format graph comes from; None where that is not known."""
    link = ((graph or {}).get(str(node)) or {}).get("inputs", {}).get(name)
    return str(link[0]) if isinstance(link, list) and link else None


def _digest(samples: Any) -> str:
    """Of latents as core's sampler nodes hand them on."""
    if getattr(samples, "is_nested", False):
        samples, _ = comfy.utils.pack_latents(samples.unbind())
    return digest(samples.to(comfy.model_management.intermediate_dtype()))
