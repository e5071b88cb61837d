"""Seeded synthetic clips: coloured shapes that move, bounce, fall and hide each other on a textured background.

Everything is drawn on the fly from a seed, 64x64 RGB, in one vectorised pass over ``[clips, frames]``. A scene is
simulated first (so that a continuation can be compared with what physics would have done) and rendered after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64
KINDS = ("disc", "square", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
RGB = torch.tensor(
    [
        [0.90, 0.15, 0.15],
        [0.15, 0.75, 0.20],
        [0.20, 0.30, 0.95],
        [0.95, 0.85, 0.15],
        [0.90, 0.25, 0.85],
        [0.15, 0.85, 0.90],
    ]
)
MAX_OBJECTS = 3
EDGE = 3.5  # width in pixels of a shape's anti-aliased edge


@dataclass(slots=True)
class Scenes:
    """Simulated scenes: what is drawn, and where it is in every frame.

    Attributes:
        kind: ``[B, 3]`` index into ``KINDS``. colour: ``[B, 3]`` index into ``COLOURS``. present: ``[B, 3]`` bool.
        radius: ``[B, 3]`` pixels. centre: ``[B, T, 3, 2]`` (x, y) pixels.
        gravity, pan: ``[B]`` bool, what the prompt says of the motion.
        wave: ``[B, T, 2, 4]`` (kx, ky, phase, amplitude) of the background's two waves. base: ``[B, T, 3]`` its colour.
        cut: ``[B]`` frame of a scene cut, or T where there is none.
    """

    kind: Tensor
    colour: Tensor
    present: Tensor
    radius: Tensor
    centre: Tensor
    gravity: Tensor
    pan: Tensor
    wave: Tensor
    base: Tensor
    cut: Tensor

    @property
    def frames(self) -> int:
        return self.centre.shape[1]


def _uniform(generator: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _apart(generator: torch.Generator, clips: int, draws: int = 4) -> Tensor:
    """Places ``[B, 3, 2]`` in the unit square: of a few draws, the one whose closest two are farthest apart."""
    places = torch.rand((clips, draws, MAX_OBJECTS, 2), generator=generator)
    gaps = (places - places.roll(1, 2)).norm(dim=-1).amin(-1)
    return places[torch.arange(clips), gaps.argmax(1)]


def _motion(generator: torch.Generator, radius: Tensor, gravity: Tensor, frames: int) -> Tensor:
    """Centres ``[B, T, 3, 2]`` of discs that bounce off the walls, with gravity (pixels per frame squared) for some."""
    clips = radius.shape[0]
    low, high = radius[..., None], SIZE - radius[..., None]
    position = low + (high - low) * _apart(generator, clips)
    angle = _uniform(generator, (clips, MAX_OBJECTS), 0.0, 2 * torch.pi)
    speed = _uniform(generator, (clips, MAX_OBJECTS), 0.4, 1.2)
    velocity = torch.stack((angle.cos(), angle.sin()), -1) * speed[..., None]
    pull = torch.zeros(clips, 1, 2)
    pull[:, 0, 1] = gravity * 0.04
    centres = []
    for _ in range(frames):
        centres.append(position)
        velocity = velocity + pull
        position = position + velocity
        outside_low, outside_high = position < low, position > high
        position = torch.where(outside_low, 2 * low - position, position)
        position = torch.where(outside_high, 2 * high - position, position)
        velocity = torch.where(outside_low | outside_high, -velocity, velocity)
    return torch.stack(centres, 1)


def _background(generator: torch.Generator, pan: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    clips = pan.shape[0]
    wavelength = _uniform(generator, (clips, 2), 32.0, 72.0)
    angle = _uniform(generator, (clips, 2), 0.0, torch.pi)
    k = 2 * torch.pi / wavelength
    kx, ky = k * angle.cos(), k * angle.sin()
    drift_angle = _uniform(generator, (clips, 1), 0.0, 2 * torch.pi)
    drift = _uniform(generator, (clips, 1), 0.4, 1.2) * pan[:, None]
    omega = -drift * (kx * drift_angle.cos() + ky * drift_angle.sin())
    phase = _uniform(generator, (clips, 2), 0.0, 2 * torch.pi)
    phases = phase[:, None] + omega[:, None] * torch.arange(frames)[None, :, None]
    amplitude = _uniform(generator, (clips, 2), 0.04, 0.08)
    spread = [value[:, None].expand(-1, frames, -1) for value in (kx, ky, amplitude)]
    wave = torch.stack((spread[0], spread[1], phases, spread[2]), -1)
    base = _uniform(generator, (clips, 1, 1), 0.25, 0.55) + _uniform(generator, (clips, 1, 3), -0.05, 0.05)
    return wave, base.expand(-1, frames, -1)


def simulate(seed: int, clips: int, frames: int, cuts: float = 0.05) -> Scenes:
    """Scenes of ``frames`` frames; ``cuts`` is the share of clips with one scene cut (same shapes, all else drawn
    anew)."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(KINDS), (clips, MAX_OBJECTS), generator=generator)
    colour = torch.rand((clips, len(COLOURS)), generator=generator).argsort(1)[:, :MAX_OBJECTS]
    present = torch.ones(clips, MAX_OBJECTS, dtype=torch.bool)
    present[:, 2] = torch.rand(clips, generator=generator) < 0.5
    radius = _uniform(generator, (clips, MAX_OBJECTS), 7.5, 11.0)
    gravity = torch.rand(clips, generator=generator) < 1 / 3
    pan = torch.rand(clips, generator=generator) < 0.5
    centre = _motion(generator, radius, gravity, frames)
    wave, base = _background(generator, pan, frames)
    cut = torch.full((clips,), frames)
    is_cut = torch.rand(clips, generator=generator) < cuts
    where = torch.randint(1, max(frames, 2), (clips,), generator=generator)
    if bool(is_cut.any()) and frames > 1:
        other_centre = _motion(generator, radius, gravity, frames)
        other_wave, other_base = _background(generator, pan, frames)
        cut = torch.where(is_cut, where, cut)
        after = torch.arange(frames)[None] >= cut[:, None]
        centre = torch.where(after[..., None, None], other_centre, centre)
        wave = torch.where(after[..., None, None], other_wave, wave)
        base = torch.where(after[..., None], other_base, base)
    return Scenes(kind, colour, present, radius, centre, gravity, pan, wave, base, cut)


def masks(scenes: Scenes) -> Tensor:
    """Coverage ``[B, T, 3, 64, 64]`` in [0, 1] of each shape before occlusion; absent shapes cover nothing."""
    axis = torch.arange(SIZE) + 0.5
    dx = axis[None, None, None, None, :] - scenes.centre[..., 0, None, None]
    dy = axis[None, None, None, :, None] - scenes.centre[..., 1, None, None]
    kind = scenes.kind[:, None, :, None, None]
    radius = scenes.radius[:, None, :, None, None]
    ax, ay = dx.abs(), dy.abs()
    disc = (dx.square() + dy.square()).sqrt() - radius
    square = torch.maximum(ax, ay) - radius * 0.86
    diamond = (ax + ay) * 0.7071 - radius * 0.86
    distance = torch.where(kind == 0, disc, torch.where(kind == 1, square, diamond))
    cover = (0.5 - distance / EDGE).clamp_(0, 1)
    return cover * scenes.present[:, None, :, None, None]


def render(scenes: Scenes) -> Tensor:
    """Frames ``[B, 3, T, 64, 64]`` in [0, 1]; later shapes hide earlier ones."""
    axis = torch.arange(SIZE) + 0.5
    kx, ky, phase, amplitude = scenes.wave.unbind(-1)
    angle = (
        kx[..., None, None] * axis[None, None, None, None, :] + ky[..., None, None] * axis[None, None, None, :, None]
    )
    texture = ((angle + phase[..., None, None]).sin() * amplitude[..., None, None]).sum(2)
    frame = scenes.base.permute(0, 2, 1)[..., None, None] + texture[:, None]
    cover = masks(scenes)
    rgb = RGB[scenes.colour]
    for index in range(MAX_OBJECTS):
        alpha = cover[:, None, :, index]
        frame = torch.lerp(frame, rgb[:, index, :, None, None, None].expand_as(frame), alpha)
    return frame.clamp(0, 1)


def visible_labels(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """What is seen at each pixel: ``(kind, colour)``, both ``[B, T, 64, 64]`` int64, 0 background, 1 + index
    elsewhere."""
    cover = masks(scenes) > 0.5
    kind = torch.zeros(cover.shape[:2] + cover.shape[3:], dtype=torch.int64)
    colour = torch.zeros_like(kind)
    for index in range(MAX_OBJECTS):
        kind = torch.where(cover[:, :, index], scenes.kind[:, index, None, None, None] + 1, kind)
        colour = torch.where(cover[:, :, index], scenes.colour[:, index, None, None, None] + 1, colour)
    return kind, colour
