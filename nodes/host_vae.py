"""Segments decoded behind what came before them: exactly where the decoder can be carried on, else with some latent
frames before them."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import comfy.ldm.wan.vae
import torch
from torch import Tensor

from .stream import NODE

WARM = 16  # latent frames that a carried decoder is warmed up with when a run is resumed


class ContextDecoder:
    """Decodes each segment with the last ``context`` latent frames before it, for any video VAE."""

    def __init__(self, vae: Any, context: int) -> None:
        self.vae, self.context = vae, context
        self._tail: Tensor | None = None

    @property
    def kind(self) -> str:
        """How it decodes: a video begun one way is not continued another."""
        return f"context {self.context}"

    def decode(self, latents: Tensor) -> Tensor:
        """Frames ``[B, F, H, W, 3]`` of the next latents ``[B, C, T, H, W]``, in [0, 1]."""
        tail = self._tail
        given = latents if tail is None else torch.cat((tail.to(latents), latents), 2)
        images = self.vae.decode(given)
        self.remember(latents)
        if tail is None:
            return images
        return images[:, -latents.shape[2] * (self.vae.temporal_compression_decode() or 1) :]

    def remember(self, latents: Tensor) -> None:
        """Keeps the last latent frames, which the next segment is decoded with."""
        both = latents.cpu() if self._tail is None else torch.cat((self._tail, latents.cpu()), 2)
        self._tail = both[:, :, -self.context :].clone() if self.context else None

    def finish(self) -> Tensor | None:
        """Frames that are still to come when there are no more latents; None for none."""
        return None

    def resume(self, tail: Tensor, count: int) -> None:
        """Goes on behind ``count`` latent frames, the last of which are ``tail``."""
        self.remember(tail)


class CarriedDecoder:
    """Carries the features of core's Wan 2.1 decoder from segment to segment, so that a video decoded piece by piece
    is the video decoded at once.

    That decoder takes the first latent frame alone and then two at a time, and keeps the last features of every causal
    convolution in between; so a latent frame without its pair waits for the next segment. Where the decoder runs out
    of memory, decoding goes on in tiles with latent frames before each segment (``ContextDecoder``). A resumed run
    warms the decoder up with the last ``WARM`` latent frames.
    """

    def __init__(self, vae: Any, context: int) -> None:
        self.vae, self._context = vae, ContextDecoder(vae, context)
        self._view = copy.copy(vae)
        self._features: dict[int, list[Any]] = {}
        self._waiting: Tensor | None = None
        self._tiled = False

    @staticmethod
    def supports(vae: Any) -> bool:
        """Whether ``vae`` is core's Wan 2.1 VAE and its decoder keeps its features where they can be carried."""
        module = getattr(vae, "first_stage_model", None)
        if type(module) is not comfy.ldm.wan.vae.WanVAE or not hasattr(comfy.ldm.wan.vae, "count_cache_layers"):
            return False
        return {"feat_cache", "feat_idx"} <= set(inspect.signature(module.decoder.forward).parameters)

    @property
    def kind(self) -> str:
        """As of ``ContextDecoder``."""
        return self._context.kind if self._tiled else "carried"

    def decode(self, latents: Tensor) -> Tensor:
        """As ``ContextDecoder.decode``; the frames of a latent frame that waits for its pair come with the next."""
        if self._tiled:
            return self._context.decode(latents)
        given = latents if self._waiting is None else torch.cat((self._waiting.to(latents), latents), 2)
        paired = given.shape[2] - (given.shape[2] - (0 if self._features else 1)) % 2
        return self._decode(given[:, :, :paired], given[:, :, paired:])

    def finish(self) -> Tensor | None:
        """As of ``ContextDecoder``."""
        waiting, self._waiting = self._waiting, None
        return None if waiting is None else self._decode(waiting, waiting[:, :, :0])

    def resume(self, tail: Tensor, count: int) -> None:
        """As of ``ContextDecoder``."""
        self.decode(tail[:, :, (count - tail.shape[2]) % 2 :])

    def _decode(self, latents: Tensor, waiting: Tensor) -> Tensor:
        if not latents.shape[2]:
            self._waiting = waiting.cpu().clone()
            return torch.empty(len(latents), 0, 1, 1, 3)
        try:
            images = torch.cat([self._clip(index, clip[None]) for index, clip in enumerate(latents)])
        except _OutOfMemory:
            logging.warning("%s: decoding goes on in tiles, with latent frames before each segment.", NODE)
            self._tiled, self._features, self._waiting = True, {}, None
            return self._context.decode(torch.cat((latents, waiting), 2))
        self._context.remember(latents)
        self._waiting = waiting.cpu().clone() if waiting.shape[2] else None
        return images

    def _clip(self, index: int, latents: Tensor) -> Tensor:
        module = _Carried(self.vae.first_stage_model, self._features.get(index))
        self._view.first_stage_model = module
        try:
            images = self._view.decode(latents)
        finally:
            self._view.first_stage_model = None
        self._features[index] = module.features
        return images


class _OutOfMemory(Exception):
    """The decoder is asked for tiles."""


class _Carried:
    """What ``comfy.sd.VAE.decode`` calls in place of the module: one call, with the features of the one before."""

    def __init__(self, module: Any, features: list[Any] | None) -> None:
        self.module, self.features, self._called = module, features, False

    def decode(self, latents: Tensor) -> Tensor:
        if self._called:
            raise _OutOfMemory
        self._called = True
        hidden, frames, place = self.module.conv2(latents), [], 0
        features = None if self.features is None else list(self.features)
        while place < hidden.shape[2]:
            width = 1 if features is None else 2
            if features is None:
                features = [None] * comfy.ldm.wan.vae.count_cache_layers(self.module.decoder)
            made = self.module.decoder(hidden[:, :, place : place + width], feat_cache=features, feat_idx=[0])
            frames += made if isinstance(made, list) else [made]
            place += width
        self.features = [part.to("cpu", copy=True) if isinstance(part, Tensor) else part for part in features or ()]
        return torch.cat(frames, 2)


def segment_decoder(vae: Any, context: int) -> CarriedDecoder | ContextDecoder:
    """What decodes the segments of a run with ``vae``."""
    return CarriedDecoder(vae, context) if CarriedDecoder.supports(vae) else ContextDecoder(vae, context)
