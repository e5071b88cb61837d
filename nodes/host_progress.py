"""What a run shows while it goes: the progress bar in model calls, the growing clip, and the growing timeline."""

from __future__ import annotations

import math
import time
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..accel.call import Call
from .host_live import Audience

PREVIEW_SECONDS = 0.25
PREVIEW_FRAMES = 64


class FilmStrip:
    """The latest latent frames of a video being made: their memory does not grow with the video.

    Args:
        like: latents ``[B, C, T, H, W]`` of the whole video; the first of the batch is shown.
    """

    def __init__(self, like: Tensor) -> None:
        channels, total, height, width = like.shape[1:]
        self.frames = like.new_zeros(channels, min(total, PREVIEW_FRAMES), height, width)
        self.first, self.reached = 0, 0

    def put(self, first: int, latents: Tensor, reached: int) -> None:
        """Latents ``[B, C, T, H, W]`` of the latent frames from ``first`` on; ``reached`` are worth showing."""
        width, shown = self.frames.shape[1], latents[0][:, -self.frames.shape[1] :].to(self.frames)
        start = first + latents.shape[2] - shown.shape[1]
        forward = start + shown.shape[1] - width - self.first
        if forward > 0:
            moved = torch.zeros_like(self.frames)
            moved[:, : max(0, width - forward)] = self.frames[:, forward:]
            self.frames, self.first = moved, self.first + forward
        self.frames[:, start - self.first : start - self.first + shown.shape[1]] = shown
        self.reached = max(self.reached, reached)

    def sheet(self) -> Tensor:
        """What there is to show in rows, as one latent ``[1, C, 1, H', W']``."""
        return mosaic(self.frames, self.reached - self.first)


class Progress:
    """Progress bar in model calls, the growing clip as a film strip and the growing timeline; checks for interrupts
    between calls."""

    def __init__(self, model: Any, calls: int, audience: Audience) -> None:
        self.audience = audience
        self.bar = comfy.utils.ProgressBar(calls)
        self.calls, self.done, self.shown = calls, 0, 0.0
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def begin(self, x: Tensor, known: Tensor | None, done: int = 0) -> None:
        """A run over latents like ``x`` ``[B, C, T, H, W]`` starts, of which the first are ``known`` and ``done`` calls
        are made."""
        self.strip, self.done = FilmStrip(x), done
        if known is not None:
            self.strip.put(0, known, known.shape[2])

    def __call__(self, call: Call, latents: Tensor) -> None:
        """After every call, with the latents of the segment."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += 1
        self.strip.put(call.offset, latents, call.offset + call.frames[0] + _started(call))
        self.bar.update_absolute(min(self.done, self.calls), self.calls, self._preview())
        self.audience.tell()

    def _preview(self):
        now = time.monotonic()
        if self.previewer is None or (now - self.shown < PREVIEW_SECONDS and self.done < self.calls):
            return None
        self.shown = now
        return self.previewer.decode_latent_to_preview_image("JPEG", self.strip.sheet())


def _started(call: Call) -> int:
    """Latent frames of the window up to the last one that has started."""
    return max((index for index, step in enumerate(call.steps, 1) if step), default=0)


def mosaic(strip: Tensor, frames: int) -> Tensor:
    """The first ``frames`` of ``strip`` ``[C, T, H, W]`` in rows, as one latent ``[1, C, 1, H', W']``."""
    channels, total, height, width = strip.shape
    columns = math.ceil(math.sqrt(total * height / width))
    rows = math.ceil(total / columns)
    sheet = strip.new_zeros(channels, rows * columns, height, width)
    sheet[:, :frames] = strip[:, :frames]
    sheet = sheet.unflatten(1, (rows, columns)).transpose(2, 3).reshape(1, channels, 1, rows * height, columns * width)
    return sheet
