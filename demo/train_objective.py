"""What the tiny models learn from: noise levels, attention masks and losses of their regimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor, nn

from accel.schedule import shifted

from .codec import TinyCodec
from .data import MAX_OBJECTS, Scenes, render, simulate
from .generate import SHIFT
from .prompt import embed_scenes, pack
from .train_forward import HalfForward
from .train_muon import has_bfloat16

LENGTHS = {  # latent frames of a clip, drawn anew each step; shorter clips, more of them: more scenes a step
    "tiny-df": (16, 16, 16, 8, 4),
    "tiny-next-clip": (16,),
    "tiny-causal": (32, 16, 8, 4, 4),
}
NEAR_ONE = 20.0  # noise-level shift of the steps where a sampler settles where things are
TAUGHT_GUIDANCE = (2.6, 1.25)  # of a first block, and of those whose history says where shapes go
SLIP = 0.08  # most noise that clean history has without being told: a rollout's own history is never perfect
FORGOTTEN = 0.06  # share of the clips whose history lacks a shape, which a rollout loses behind another at times


def forget(scenes: Scenes, generator: torch.Generator, block: int = 4) -> tuple[Tensor, Scenes]:
    """Clips ``[B]`` bool whose history forgets a shape, and these scenes without it up to the end of a block: a model
    that learns to bring it back does not lose it for good when its own history has."""
    clips, frames = scenes.centre.shape[:2]
    chosen = torch.rand(clips, generator=generator) < FORGOTTEN
    few = Scenes(**{field.name: getattr(scenes, field.name)[chosen] for field in fields(Scenes)})
    count = int(chosen.sum())
    shape = (torch.rand(count, generator=generator) * few.present.sum(1)).long()  # the present ones come first
    until = block * torch.randint(1, frames // block + 1, (count,), generator=generator)
    early = torch.arange(frames)[None, :, None] < until[:, None, None]
    gone = early & (torch.arange(MAX_OBJECTS) == shape[:, None, None])
    few.centre = torch.where(gone[..., None], -1e3, few.centre)
    return chosen, few


def clip_levels(generator: torch.Generator, clips: int) -> Tensor:
    """Noise level of each clip ``[B, 1]``: logit-normal, even over the steps of a sampler, or near pure noise."""
    normal = shifted(torch.sigmoid(torch.randn(clips, 1, generator=generator)), SHIFT)
    even = torch.rand(clips, 1, generator=generator)
    pick = torch.rand(clips, 1, generator=generator)
    rest = torch.where(pick < 0.65, shifted(even, SHIFT), shifted(even, NEAR_ONE))
    return torch.where(pick < 0.4, normal, rest)


def noise_levels(generator: torch.Generator, clips: int, frames: int, block: int = 4) -> Tensor:
    """Noise level of each latent frame ``[B, T]``: independent, shared or, most often, a staircase, as videos are
    sampled, a third of those where a block is near pure noise; three quarters of the clips with a clean prefix."""
    independent = shifted(torch.sigmoid(torch.randn(clips, frames, generator=generator)), SHIFT)
    shared = clip_levels(generator, clips).expand(-1, frames)
    lag = torch.randint(1, 16, (clips, 1), generator=generator) / 50
    index = torch.arange(frames)[None] // block
    depth = (frames - 1) // block * lag
    even = torch.rand(clips, 1, generator=generator)
    begins = torch.randint(frames // block, (clips, 1), generator=generator) * lag
    near_one = torch.rand(clips, 1, generator=generator) < 0.35
    start = torch.where(near_one, shifted(even, NEAR_ONE / SHIFT) - begins, even * (1 + depth) - depth)
    staircase = shifted((start + index * lag).clamp(0, 1), SHIFT)
    pick = torch.rand(clips, 1, generator=generator)
    sigma = torch.where(pick < 0.15, independent, torch.where(pick < 0.4, shared, staircase))
    prefix = torch.randint(1, max(2, frames // 2 + 1), (clips, 1), generator=generator)
    prefix = torch.where(
        torch.rand(clips, 1, generator=generator) < 0.6, torch.full_like(prefix, min(block, frames - 1)), prefix
    )
    prefix = prefix * (torch.rand(clips, 1, generator=generator) < 0.75)
    return torch.where(torch.arange(frames)[None] < prefix, torch.zeros(()), sigma)


class Objective:
    """Draws batches of one regime and gives the loss; ``model`` may be compiled.

    Args:
        clips: clips of 16 frames of one batch; more of shorter ones. teacher: the model whose guided velocity a causal
            one learns, instead of flow matching. half: makes the forward passes, where a CPU has bfloat16.
    """

    def __init__(
        self,
        kind: str,
        codec: TinyCodec,
        clips: int,
        device: torch.device,
        teacher: nn.Module | None = None,
        half: HalfForward | None = None,
    ) -> None:
        self.kind, self.codec, self.count, self.device, self.teacher = kind, codec, clips, device, teacher
        self.half = half

    def clips(self, seed: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, their history as a rollout would have it, and prompts of a batch, as many frames in all whatever a
        clip's length."""
        scenes = simulate(seed, max(1, self.count * 16 // frames), frames)
        x0 = self.codec.encode(render(scenes))
        chosen, few = forget(scenes, generator)
        history = x0.clone()
        if bool(chosen.any()):
            history[chosen] = self.codec.encode(render(few))
        slip = SLIP * torch.rand(len(x0), 1, 1, 1, 1, generator=generator)
        slip = slip * (torch.rand(slip.shape, generator=generator) < 0.5)
        return x0, torch.lerp(history, torch.randn(x0.shape, generator=generator), slip), embed_scenes(scenes)

    def velocity(
        self, model: nn.Module, x: Tensor, sigma: Tensor, context: Tensor, positions: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The model's answer, on its device and in its precision; on the host in fp32."""
        x, sigma, positions = (value.to(self.device) for value in (x, sigma, positions))
        context, bias = (value.to(self.device) for value in pack(context))
        mask = None if mask is None else mask.to(self.device)
        if self.half is not None:
            return self.half(model, x, sigma, context, positions, mask, bias)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bfloat16(self.device)):
            return model(x, sigma, context, positions, mask, bias=bias).float().cpu()

    def loss(self, model: nn.Module, seed: int) -> Tensor:
        """Loss of one batch; the batch follows from the seed alone."""
        generator = torch.Generator().manual_seed(seed + 1)
        lengths = LENGTHS[self.kind]
        frames = lengths[int(torch.randint(len(lengths), (1,), generator=generator))]
        x0, history, context = self.clips(seed, frames, generator)
        context = context * (torch.rand(len(context), 1, 1, generator=generator) >= 0.1)
        noise = torch.randn(x0.shape, generator=generator)
        if self.kind == "tiny-causal":
            return self.causal(model, x0, history, noise, context, generator)
        if self.kind == "tiny-next-clip":
            told = clip_levels(generator, len(x0)).expand(-1, frames)
            prefix = 4 * (torch.rand(len(x0), 1, generator=generator) < 0.65)
            sigma = torch.where(torch.arange(frames)[None] < prefix, torch.zeros(()), told)
        else:
            told = sigma = noise_levels(generator, len(x0), frames)
        x = torch.where(_wide(sigma) > 0, torch.lerp(x0, noise, _wide(sigma)), history)
        out = self.velocity(model, x, told, context, torch.arange(frames))
        error = (out - (noise - x0)).square().mean((1, 3, 4))
        return (error * (sigma > 0)).sum() / (sigma > 0).sum().clamp(min=1)

    def causal(
        self,
        model: nn.Module,
        x0: Tensor,
        history: Tensor,
        noise: Tensor,
        context: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Teacher forcing: clean blocks and noisy blocks in one sequence; a noisy block sees the clean ones before
        it."""
        clips, _, frames = x0.shape[:3]
        history = self.resampled(self.teacher or model, x0, history, context, generator)

        def answer(network: nn.Module, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
            return self.after(network, history, x, sigma, context)

        sigma = clip_levels(generator, clips * frames // 4).view(clips, -1).repeat_interleave(4, 1)
        x, wanted = torch.lerp(x0, noise, _wide(sigma)), noise - x0
        if self.teacher is not None:
            wanted = self.guided(x, sigma, context, answer)
        return (answer(model, x, sigma, context) - wanted).square().mean()

    @torch.no_grad()
    def guided(self, x: Tensor, sigma: Tensor, context: Tensor, answer: Callable) -> Tensor:
        """The teacher's velocity guided by the prompt (guidance distillation, Meng et al. 2023, arXiv 2210.03142), by
        ``TAUGHT_GUIDANCE``."""
        blank = answer(self.teacher, x, sigma, torch.zeros_like(context))
        first = torch.arange(x.shape[2]) < 4
        scale = torch.where(first, *map(torch.tensor, TAUGHT_GUIDANCE))[:, None, None]
        return blank + scale * (answer(self.teacher, x, sigma, context) - blank)

    def after(self, network: nn.Module, history: Tensor, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """The answer for noisy blocks ``x`` ``[B, C, T, H, W]``, each after the blocks of ``history`` before it."""
        frames = x.shape[2]
        clean = frames - 4
        told = torch.cat((torch.zeros_like(sigma[:, :clean]), sigma), 1)
        positions = torch.cat((torch.arange(clean), torch.arange(frames)))
        both = torch.cat((history[:, :, :clean], x), 2)
        return self.velocity(network, both, told, context, positions, teacher_mask(frames, 16, 4))[:, :, clean:]

    @torch.no_grad()
    def resampled(
        self, model: nn.Module, x0: Tensor, history: Tensor, context: Tensor, generator: torch.Generator
    ) -> Tensor:
        """History ``[B, C, T, H, W]`` of which half of the clips are as the model itself would have left it: all but
        the first block made again in two steps from close to pure noise, once or twice over, so that errors add up.

        Self-resampling (Guo et al. 2025, arXiv 2512.15702), all blocks at once instead of one after the other.
        """
        half, frames = len(x0) // 2, x0.shape[2]
        if frames == 4 or half == 0:
            return history
        own, context = history[:half], context[:half]
        for _ in range(int(torch.randint(1, 3, (), generator=generator))):
            level = shifted(torch.rand(half, frames // 4, generator=generator), NEAR_ONE).repeat_interleave(4, 1)
            x = torch.lerp(x0[:half], torch.randn(own.shape, generator=generator), _wide(level))
            x = x - _wide(0.4 * level) * self.after(model, own, x, level, context)
            x = x - _wide(0.6 * level) * self.after(model, own, x, 0.6 * level, context)
            own = torch.cat((own[:, :, :4], x[:, :, 4:]), 2)
        return torch.cat((own, history[half:]))


def _wide(sigma: Tensor) -> Tensor:
    """``[B, T]`` as a factor of latents ``[B, C, T, H, W]``."""
    return sigma[:, None, :, None, None]


def teacher_mask(frames: int, tokens: int, block: int) -> Tensor:
    """``[N, N]`` bool for a clean copy of all blocks but the last, which no other block sees, followed by a noisy copy
    of all."""
    clean = torch.arange((frames - block) * tokens) // (tokens * block)
    index = torch.cat((clean, torch.arange(frames * tokens) // (tokens * block)))
    noisy = torch.arange(len(index)) >= len(clean)
    earlier, same = index[None] < index[:, None], index[None] == index[:, None]
    return torch.where(noisy[:, None], (~noisy[None] & earlier) | (noisy[None] & same), ~noisy[None] & (earlier | same))
