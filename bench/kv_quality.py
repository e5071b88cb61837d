"""What a smaller K/V store costs in quality: closed loop, on the unbounded run's history, on the simulation's history.

A clip is a simulated scene: its first block is given, the rest is rolled out with the scene's prompt. A segment is a
block. *Closed loop*: every store lives on what it made itself. *Same history*: every block is denoised from the same
noise after the unbounded run's clean latents, so that errors do not compound. *True history*: likewise after the
simulation's own latents, so that a block can be compared with what the simulation does next.

Rows hold squared errors, not decibels, so that they can be pooled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from accel.metrics import frame_mse
from demo.data import Scenes, render, simulate
from demo.evaluate import segment_accuracy
from demo.generate import start_noise
from demo.judge import clear, read, track
from demo.prompt import embed_scenes

from .kv_rollout import BLOCK, Rollout, Strategy
from .runs import codec, judge

SCENES = 7000  # first seed of the simulated scenes
CLOSED, SAME, TRUE = "closed loop", "same history", "true history"


@dataclass(frozen=True, slots=True)
class Clip:
    """A simulated scene of one seed.

    Attributes:
        seed: of scene and noise. scenes: the simulation. latents: ``[1, 16, T, 8, 8]`` of its frames. video: those
            through the codec, ``[1, 3, T, 64, 64]``. noise: of all blocks.
    """

    seed: int
    scenes: Scenes
    latents: Tensor
    video: Tensor
    noise: Tensor

    @classmethod
    def of(cls, seed: int, frames: int) -> Clip:
        """The clip of ``seed`` with ``frames`` latent frames."""
        scenes = simulate(SCENES + seed, 1, frames, cuts=0.0)
        latents = codec().encode(render(scenes))
        return cls(seed, scenes, latents, codec().decode(latents), start_noise(seed, frames))

    @property
    def frames(self) -> int:
        return self.latents.shape[2]

    @property
    def firsts(self) -> range:
        """First latent frame of every block that is denoised."""
        return range(BLOCK, self.frames, BLOCK)


@torch.inference_mode()
def roll(strategy: Strategy, clip: Clip, history: Tensor | None) -> tuple[Tensor, Rollout]:
    """Latents of a clip with one store.

    Args:
        history: latents that are committed in place of what was made; None commits what was made.
    """
    rollout = Rollout(strategy, clip.seed, clip.frames, embed_scenes(clip.scenes))
    made = [clip.latents[:, :, :BLOCK]]
    rollout.prefill(made[0])
    for first in clip.firsts:
        part = slice(first, first + BLOCK)
        made.append(rollout.denoise(clip.noise[:, :, part]))
        rollout.commit(made[-1] if history is None else history[:, :, part])
    return torch.cat(made, 2), rollout


@lru_cache(maxsize=1)
def references(unbounded: Strategy, seed: int, frames: int) -> tuple[Clip, Tensor, Rollout, Tensor]:
    """A clip, what the unbounded store makes of it, how, and its answers on the simulation's history."""
    clip = Clip.of(seed, frames)
    return clip, *roll(unbounded, clip, None), roll(unbounded, clip, clip.latents)[0]


def measure(strategy: Strategy, unbounded: Strategy, seed: int, frames: int) -> dict[str, Any]:
    """One row: a store on a clip. Errors are lists with one entry a denoised block."""
    clip, whole, rollout, answers = references(unbounded, seed, frames)
    made, same, true = whole, whole, answers
    if strategy != unbounded:
        made, rollout = roll(strategy, clip, None)
        same, true = roll(strategy, clip, whole)[0], roll(strategy, clip, clip.latents)[0]
    return {
        "strategy": strategy.name,
        "seed": seed,
        "flops": rollout.flops,
        CLOSED: compare(clip, made, whole) | {"accuracy": accuracy(clip, made)},
        SAME: {"to_unbounded": errors(clip, codec().decode(whole), codec().decode(same))},
        TRUE: compare(clip, true, answers),
        "centre_if_still": still(clip),
    }


def compare(clip: Clip, made: Tensor, reference: Tensor) -> dict[str, Any]:
    """Squared errors to the unbounded store's video and to the simulation, and ``centres``."""
    video, whole = codec().decode(made), codec().decode(reference)
    return {
        "to_unbounded": errors(clip, whole, video),
        "to_simulation": errors(clip, clip.video, video),
        "centre": centres(clip, video),
    }


def errors(clip: Clip, reference: Tensor, video: Tensor) -> list[float]:
    """Mean squared error of every denoised block."""
    frames = frame_mse(reference, video)
    return [float(frames[first : first + BLOCK].mean()) for first in clip.firsts]


def centres(clip: Clip, video: Tensor) -> list[list[float]]:
    """How far shapes are from where the simulation has them; of every denoised block the sum of the errors in pixels,
    the shapes found, and those that can be seen."""
    visible = clear(clip.scenes)
    error = (track(read(judge(), video), clip.scenes.colour) - clip.scenes.centre).norm(dim=-1)
    found, rows = visible & ~error.isnan(), []
    for first in clip.firsts:
        part = slice(first, first + BLOCK)
        total = float(error[:, part][found[:, part]].sum())
        rows.append([total, int(found[:, part].sum()), int(visible[:, part].sum())])
    return rows


def still(clip: Clip) -> list[list[float]]:
    """``centres`` if nothing moved since the frame before the block."""
    visible, rows = clear(clip.scenes), []
    for first in clip.firsts:
        seen = visible[:, first : first + BLOCK]
        moved = clip.scenes.centre[:, first : first + BLOCK] - clip.scenes.centre[:, first - 1 : first]
        rows.append([float(moved.norm(dim=-1)[seen].sum()), int(seen.sum()), int(seen.sum())])
    return rows


def accuracy(clip: Clip, made: Tensor) -> list[float]:
    """Share of the prompted shapes that every denoised block shows."""
    bounds = [(first, first + BLOCK) for first in clip.firsts]
    return segment_accuracy(read(judge(), codec().decode(made)), clip.scenes, bounds)
