"""Film strips inside ComfyUI, for test_progress.py; facts to the last line."""

from __future__ import annotations

import importlib
import json

import torch
from run_in_comfy import pack_module

progress = importlib.import_module(".nodes.host_progress", pack_module().__name__)


def numbered(first: int, last: int) -> torch.Tensor:
    return torch.arange(first, last, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(1, 16, -1, 2, 2)


def shown(strip) -> list[float]:
    return strip.frames[0, : strip.reached - strip.first, 0, 0].tolist()


facts = {"short": []}
strip = progress.FilmStrip(numbered(0, 8))
for first in (0, 4):
    strip.put(first, numbered(first, first + 4), first + 4)
    facts["short"].append(shown(strip))
strip = progress.FilmStrip(numbered(0, 200))
for first in range(0, 200, 4):
    strip.put(first, numbered(first, first + 4), first + 4)
facts["long"], facts["long strip"] = shown(strip), strip.frames.numel()
facts["strip of 64"] = progress.FilmStrip(numbered(0, 64)).frames.numel()
strip = progress.FilmStrip(numbered(0, 200))
strip.put(0, numbered(0, 100), 100)
strip.put(100, numbered(100, 104), 104)
facts["resumed"] = shown(strip)
assert strip.sheet().shape[:3] == (1, 16, 1)
print(json.dumps(facts))
