"""The judge: reads shapes off frames, so that generated videos can be scored without a reference.

Pixels are assigned to the nearest shape colour; a small classifier, trained on codec round trips of the same synthetic
clips, tells the kind of shape from the outline. What is in a frame, where it is and whether it keeps being one thing
all follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .codec import WEIGHTS, TinyCodec
from .data import COLOURS, KINDS, RGB, SIZE, Scenes, render, simulate, visible_labels

PATH = WEIGHTS / "judge.safetensors"
CROP = 28  # pixels of the square cut out around a shape
REACH = 0.38  # RGB distance within which a pixel counts as a shape's colour
LEAST_PIXELS = 60  # pixels below which a shape counts as not there


class Judge(nn.Module):
    """Kind logits ``[N, 3]`` of outlines ``[N, 1, 28, 28]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 12, 3, 2, 1), nn.SiLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.SiLU(), nn.Flatten(),
            nn.Linear(24 * 49, 48), nn.SiLU(), nn.Linear(48, len(KINDS)),
        )  # fmt: skip

    def forward(self, outlines: Tensor) -> Tensor:
        return self.layers(outlines)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the judge sees in videos ``[B, 3, T, 64, 64]``, for each of the six colours.

    Attributes:
        area: ``[B, T, 6]`` pixels. kind: ``[B, T, 6]`` index into ``KINDS``. centre: ``[B, T, 6, 2]`` (x, y) pixels,
        NaN where the colour is absent. spread: ``[B, T, 6]`` root mean square distance from the centre in pixels.
    """

    area: Tensor
    kind: Tensor
    centre: Tensor
    spread: Tensor


def members(frames: Tensor) -> Tensor:
    """Pixels of each colour, ``[N, 6, 64, 64]`` of 0 and 1, in ``frames`` ``[N, 3, 64, 64]``."""
    distance = (frames[:, None] - RGB[None, :, :, None, None]).square().sum(2).sqrt()
    nearest = distance.argmin(1, keepdim=True)
    own = torch.arange(len(COLOURS))[None, :, None, None] == nearest
    return (own & (distance < REACH)).float()


def _moments(member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    area = member.sum((2, 3))
    axis = torch.arange(SIZE) + 0.5
    x = (member.sum(2) * axis).sum(-1) / area
    y = (member.sum(3) * axis).sum(-1) / area
    square = (axis - x[..., None, None]).square() + (axis[:, None] - y[..., None, None]).square()
    spread = ((member * square.nan_to_num()).sum((2, 3)) / area).sqrt()
    return area, torch.stack((x, y), -1), spread


def outlines(member: Tensor, centre: Tensor) -> Tensor:
    """Squares ``[N * 6, 1, 28, 28]`` cut out of ``member`` around each ``centre`` ``[N, 6, 2]``."""
    step = (torch.arange(CROP) - (CROP - 1) / 2) * 2 / SIZE
    middle = centre.nan_to_num(SIZE / 2).flatten(0, 1) * 2 / SIZE - 1
    grid_x = middle[:, None, None, 0] + step[None, None, :].expand(-1, CROP, -1)
    grid_y = middle[:, None, None, 1] + step[None, :, None].expand(-1, -1, CROP)
    return F.grid_sample(member.flatten(0, 1)[:, None], torch.stack((grid_x, grid_y), -1), align_corners=False)


@torch.no_grad()
def read(judge: Judge, video: Tensor) -> Reading:
    """Reads every frame of ``[B, 3, T, 64, 64]``."""
    clips, _, frames = video.shape[:3]
    member = members(video.transpose(1, 2).flatten(0, 1))
    area, centre, spread = _moments(member)
    kind = judge(outlines(member, centre)).argmax(1)
    shape = (clips, frames, len(COLOURS))
    return Reading(area.view(shape), kind.view(shape), centre.view(*shape, 2), spread.view(shape))


def attribute_accuracy(reading: Reading, scenes: Scenes, wanted: Tensor) -> Tensor:
    """Share of the prompted shapes seen with the right kind, per frame ``[T]``.

    Args:
        wanted: ``[B, T, 3]`` or ``[B, 1, 3]`` bool, which shapes are asked for in which frames.
    """
    index = scenes.colour[:, None].expand(-1, reading.area.shape[1], -1)
    seen = reading.area.gather(2, index) >= LEAST_PIXELS
    right = reading.kind.gather(2, index) == scenes.kind[:, None]
    wanted = wanted.expand_as(seen)
    return (seen & right & wanted).sum((0, 2)) / wanted.sum((0, 2))


def track(reading: Reading, colours: Tensor) -> Tensor:
    """Centres ``[B, T, 3, 2]`` of the shapes of the given ``[B, 3]`` colours, NaN where one is not seen."""
    index = colours[:, None, :, None].expand(-1, reading.area.shape[1], -1, 2)
    seen = reading.area.gather(2, index[..., 0]) >= LEAST_PIXELS
    return torch.where(seen[..., None], reading.centre.gather(2, index), torch.nan)


def clear(scenes: Scenes) -> Tensor:
    """``[B, T, 3]`` shapes of which at least 85 % can be seen: hiding behind another shape is not an error."""
    _, colour = visible_labels(scenes)
    area = torch.stack([(colour == scenes.colour[:, slot, None, None, None] + 1).sum((2, 3)) for slot in range(3)], 2)
    whole = torch.tensor([torch.pi, (2 * 0.86) ** 2, 2 * (0.86 / 0.7071) ** 2])[scenes.kind] * scenes.radius.square()
    return scenes.present[:, None] & (area > 0.85 * whole[:, None])


def load_judge(path: Path = PATH) -> Judge:
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval().requires_grad_(False)


def train_judge(seed: int = 11, steps: int = 400, path: Path = PATH) -> float:
    """Trains and writes the judge; returns its attribute accuracy on held-out clips, the ceiling of generated ones."""
    torch.manual_seed(seed)
    codec, judge = TinyCodec.load(), Judge()
    optimiser = torch.optim.AdamW(judge.parameters(), 2e-3)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        scenes = simulate(seed * 1_000_003 + step, 32, 1)
        latents = codec.encode(render(scenes))
        frames = codec.decode(latents + 0.15 * torch.rand(32, 1, 1, 1, 1) * torch.randn_like(latents))[:, :, 0]
        member = members(frames)
        chosen = clear(scenes)[:, 0]
        rows = torch.arange(32)[:, None].expand(-1, 3)[chosen] * len(COLOURS) + scenes.colour[chosen]
        logits = judge(outlines(member, _moments(member)[1])[rows])
        loss = F.cross_entropy(logits, scenes.kind[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    save_file({name: value.half() for name, value in judge.state_dict().items()}, path)
    return held_out_accuracy(load_judge(path), seed + 1)


def held_out_accuracy(judge: Judge, seed: int) -> float:
    """Attribute accuracy on real clips after the codec's round trip."""
    scenes = simulate(seed, 100, 4)
    codec = TinyCodec.load()
    reading = read(judge, codec.decode(codec.encode(render(scenes))))
    return float(attribute_accuracy(reading, scenes, clear(scenes)).mean())
