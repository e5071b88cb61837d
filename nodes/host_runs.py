"""Timelines of the last runs of core's samplers, found again by the latent that a run made.

A sampler of core's has no output for them. What is kept is plain numbers and a digest, no tensor; a latent that core
serves from its cache still finds the run that made it, and never another one.
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
from .host_identity import digest

KEPT = 32
_runs: deque[FinishedRun] = deque(maxlen=KEPT)


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a run made: digest of its latent, node that ran it (None where none did), and timeline."""

    latent: str
    node: str | None
    timeline: Timeline


def remember(samples: Tensor, node: str | None, timeline: Timeline) -> None:
    """Keeps the timeline of a run that ended with ``samples``."""
    _runs.append(FinishedRun(_digest(samples), node, timeline))


def run_of(latent: Mapping[str, Any], node: str | None) -> Timeline | None:
    """The timeline of the run that made a LATENT; of several that made the very same one, that of ``node``, or the
    last. None where no accelerated run did."""
    made = _digest(latent["samples"])
    found = [run for run in _runs if run.latent == made]
    of_node = [run for run in found if run.node is not None and run.node == node]
    return next((run.timeline for run in reversed(of_node or found)), None)


def source_of(graph: Mapping[str, Any] | None, node: str | None, name: str) -> str | None:
    """Id of the node that an input of a node of an API-format graph comes from; None where that is not known."""
    link = ((graph or {}).get(str(node)) or {}).get("inputs", {}).get(name)
    return str(link[0]) if isinstance(link, list) and link else None


def _digest(samples: Any) -> str:
    """Of latents as core's sampler nodes hand them on."""
    if getattr(samples, "is_nested", False):
        samples, _ = comfy.utils.pack_latents(samples.unbind())
    return digest(samples.to(comfy.model_management.intermediate_dtype()))
