"""The segment loops: how an AR video is made, one segment after the other, over a ``Denoiser``.

Three loops: ``diffusion_forcing`` (SkyReels-V2: synchronous or staircase segments that overlap in clean latent frames),
``next_clip`` (FramePack-like continuation: a synchronous segment whose history shares the time embedding) and
``causal_blocks`` (Self-/Causal-Forcing: block after block with a K/V store; Euler or re-noising). Each yields finished
segments as they come. With ``Acceleration()`` they are the plain loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .call import Call, Family, Kind
from .engine import Run
from .schedule import StepMatrix, noise_table, step_matrix, step_rows
from .solver import EulerSolver, UniPCSolver

Progress = Callable[[Call, Tensor], None]


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """How a video of ``frames`` latent frames is cut into segments.

    Attributes:
        frames: latent frames of the whole video. segment: of one segment. overlap: clean latent frames a segment takes
            over from the video so far. block: latent frames denoised together. ar_step: rows between neighbouring
            blocks, 0 synchronous. steps: solver steps of a latent frame.

    Raises:
        ValueError: naming the value and what fits.
    """

    frames: int
    segment: int
    overlap: int = 0
    block: int = 1
    ar_step: int = 0
    steps: int = 50

    def __post_init__(self) -> None:
        if min(self.frames, self.segment, self.block, self.steps) < 1 or min(self.overlap, self.ar_step) < 0:
            raise ValueError(
                f"Segment plan: frames {self.frames}, segment {self.segment}, block {self.block} and steps "
                f"{self.steps} must "
                f"be 1 or more, overlap {self.overlap} and ar_step {self.ar_step} 0 or more."
            )
        for name, value in (("segment", self.segment), ("overlap", self.overlap)):
            if value % self.block:
                raise ValueError(
                    f"Segment plan: {name} is {value} latent frames, not a multiple of the block of {self.block}; "
                    f"use {value // self.block * self.block} or {(value // self.block + 1) * self.block}."
                )
        if self.overlap >= self.segment:
            raise ValueError(
                f"Segment plan: overlap {self.overlap} leaves nothing new in a segment of {self.segment} latent "
                "frames; "
                f"use an overlap of at most {self.segment - self.block}."
            )
        tail = self.frames % self.block
        if tail:
            raise ValueError(
                f"Segment plan: {self.frames} latent frames leave {tail} over after blocks of {self.block}, "
                "which would "
                f"never be denoised; use {self.frames - tail} or {self.frames - tail + self.block}."
            )

    def intervals(self) -> list[tuple[int, int, int]]:
        """``(start, end, prefix)`` of each segment in latent frames of the whole video; ``prefix`` of them are
        clean."""
        segments = [(0, min(self.segment, self.frames), 0)]
        while segments[-1][1] < self.frames:
            start = segments[-1][1] - self.overlap
            segments.append((start, min(start + self.segment, self.frames), self.overlap))
        return segments

    def matrices(self) -> list[StepMatrix]:
        """Step matrix of each segment."""
        return [step_matrix(*sizes) for sizes in self._sizes()]

    def calls(self) -> int:
        """Guided denoising calls of the whole run. Raises ValueError as ``step_matrix``."""
        return sum(step_rows(*sizes) for sizes in self._sizes())

    def _sizes(self) -> list[tuple[int, int, int, int, int]]:
        return [(end - start, self.steps, self.ar_step, self.block, prefix) for start, end, prefix in self.intervals()]


@dataclass(frozen=True, slots=True)
class Segment:
    """A finished piece: ``latents`` ``[B, C, T, H, W]`` of latent frames ``[start, end)`` of the video, new ones
    only."""

    index: int
    start: int
    end: int
    latents: Tensor


def diffusion_forcing(
    run: Run,
    noise: Tensor,
    plan: SegmentPlan,
    table: Tensor | Sequence[float],
    solver: str = "euler",
    history_noise: float = 0.0,
    prefix: Tensor | None = None,
    progress: Progress | None = None,
    finished: Sequence[Tensor] = (),
) -> Iterator[Segment]:
    """Diffusion forcing over overlapping segments (SkyReels-V2); ``plan.ar_step`` 0 is synchronous.

    Args:
        run: the engine of this run.
        noise: ``[B, C, frames, H, W]`` start noise of the whole video; every new latent frame starts from its own part.
        table: ``plan.steps + 1`` noise levels.
        solver: ``euler`` or ``unipc``.
        history_noise: noise level the model is told for history latent frames, which are noised as much for the model
            only (SkyReels' ``addnoise_condition`` / 1000; private generator), in [0, 1).
        prefix: ``[B, C, T0, H, W]`` clean latents that the first segment continues (T0 a multiple of the block).
        progress: called after every call with the call and the segment's latents.
        finished: latents of the segments that were finished before, as they were given out, of a run whose state
            (``Run.load``) was taken over; they are not made or given out again.

    Raises:
        ValueError: noise that does not match the plan, an unknown solver, a level outside [0, 1), or finished latents
            that do not fit.
    """
    if noise.ndim != 5 or noise.shape[2] != plan.frames:
        raise ValueError(
            f"Diffusion forcing: noise must be [batch, channels, {plan.frames}, height, width], got "
            f"{tuple(noise.shape)}."
        )
    if solver not in ("euler", "unipc"):
        raise ValueError(f"Diffusion forcing: solver is {solver!r}; use euler or unipc.")
    if not 0.0 <= history_noise < 1.0:
        raise ValueError(f"Diffusion forcing: history noise {history_noise} must lie in [0, 1); 0 keeps history clean.")
    levels = noise_table(table, plan.steps)
    video = noise.clone()
    given = 0 if prefix is None else prefix.shape[2]
    if prefix is not None:
        video[:, :, :given] = prefix
    for index, (start, end, overlap) in enumerate(plan.intervals()):
        clean = given if index == 0 else overlap
        if index < len(finished):
            _check_finished(index, finished[index], video[:, :, start + clean : end])
            video[:, :, start + clean : end] = finished[index]
            continue
        latents = _denoise_segment(
            run, index, start, clean, video[:, :, start:end], plan, levels, solver, history_noise, progress
        )
        video[:, :, start + clean : end] = latents[:, :, clean:]
        yield Segment(index, start + clean, end, latents[:, :, clean:])


def next_clip(
    run: Run, noise: Tensor, plan: SegmentPlan, table: Tensor | Sequence[float], **options
) -> Iterator[Segment]:
    """Next-clip continuation (FramePack): synchronous segments after ``plan.overlap`` history latent frames.

    The denoiser tells the model one time for all tokens (``Denoiser.shares_time``). Arguments as ``diffusion_forcing``.

    Raises:
        ValueError: a plan with an ``ar_step``, a denoiser that does not share the time, and as ``diffusion_forcing``.
    """
    if plan.ar_step:
        raise ValueError(f"Next clip: ar_step is {plan.ar_step}; a next-clip model denoises a clip together, use 0.")
    if not run.denoiser.shares_time:
        raise ValueError("Next clip: this model takes one time per latent frame; use diffusion forcing.")
    yield from diffusion_forcing(run, noise, plan, table, **options)


def causal_blocks(
    run: Run,
    noise: Tensor,
    block: int,
    table: Tensor | Sequence[float],
    renoise_seed: int | None = None,
    prefix: Tensor | None = None,
    progress: Progress | None = None,
    finished: Sequence[Tensor] = (),
) -> Iterator[Segment]:
    """Block-causal generation with a K/V store behind the denoiser; after each block its clean K/V are committed.

    Args:
        run: the engine of this run; its denoiser keeps the K/V store (see ``Call.kind``).
        noise: ``[B, C, frames, H, W]`` start noise. A last block may be shorter.
        block: latent frames per block.
        table: noise levels, falling to 0.
        renoise_seed: None follows the ODE with Euler; a seed re-noises with fresh noise after every step as core's
            ``ar_video`` does (generator seed + block * 1000 + step).
        prefix: ``[B, C, T0, H, W]`` clean latents to continue (image-to-video), committed in one prefill call, or
            block by block where the denoiser's ``most_frames`` (latent frames its K/V take at once) are fewer.
        finished: latents of the blocks that were finished before, as in ``diffusion_forcing``.

    A block that runs out of memory is denoised once more with a smaller K/V budget, where the denoiser has one.
    """
    if noise.ndim != 5 or block < 1:
        raise ValueError(
            f"Causal blocks: needs noise [batch, channels, frames, height, width] and a block of 1 or more "
            "latent frames, "
            f"got {tuple(noise.shape)} and {block}."
        )
    levels = noise_table(table)
    start = 0 if prefix is None else prefix.shape[2]
    if prefix is not None and not finished:
        _prefill(run, prefix, block, levels)
    for index, first in enumerate(range(start, noise.shape[2], block)):
        last = min(first + block, noise.shape[2])
        if index < len(finished):
            _check_finished(index, finished[index], noise[:, :, first:last])
            continue
        given = (index, first, noise[:, :, first:last], levels, renoise_seed, progress)
        latents = run.within_memory(index, lambda given=given: _commit_block(run, *given))
        yield Segment(index, first, last, latents)


def _check_finished(index: int, latents: Tensor, place: Tensor) -> None:
    if latents.shape != place.shape:
        raise ValueError(
            f"Finished segments: the latents of segment {index} are {tuple(latents.shape)}, this run needs "
            f"{tuple(place.shape)} there; give those of a run with the same plan and noise."
        )


def _denoise_segment(run, index, start, clean, x, plan, levels, solver, history_noise, progress) -> Tensor:
    frames = x.shape[2]
    matrix = step_matrix(frames, plan.steps, plan.ar_step, plan.block, clean)
    step_solver = (UniPCSolver if solver == "unipc" else EulerSolver)(levels, frames)
    run.begin_segment(index, frames, clean, plan.block, levels)
    windows = matrix.suffix_windows() if run.acceleration.suffix_window else [(0, frames)] * matrix.rows
    told = matrix.sigmas(levels)
    told[:, :clean] = history_noise
    generator = torch.Generator(x.device).manual_seed(index) if history_noise and clean else None
    calls = [
        Call(
            Kind.DENOISE, index, iteration, (first, last), tuple(sigmas[first:last]), tuple(steps[first:last]),
            tuple(active[first:last]), start, step_solver.family, plan.steps, given=clean,
        )
        for iteration, (steps, active, sigmas, (first, last)) in enumerate(
            zip(matrix.index.tolist(), matrix.active.tolist(), told.tolist(), windows, strict=True)
        )
    ]  # fmt: skip

    def shown(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
        """The window of a call, and what the model sees of it."""
        window = x[:, :, slice(*call.frames)]
        noised = generator is not None
        return window, _noised(window, clean - call.frames[0], history_noise, generator) if noised else window

    window, given = shown(calls[0], x)
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        velocity, true = run.step(call, given)
        moved, (first, last) = (
            step_solver.step(window, velocity, call.steps, call.active, call.frames, true),
            call.frames,
        )
        x = moved if (first, last) == (0, frames) else torch.cat((x[:, :, :first], moved, x[:, :, last:]), 2)
        if following is not None:
            window, given = shown(following, x)
            run.ahead(following, given)
        if progress is not None:
            progress(call, x)
    run.end_segment()
    return x


def _noised(window: Tensor, clean: int, level: float, generator: torch.Generator) -> Tensor:
    if clean <= 0:
        return window
    history = window[:, :, :clean]
    noise = torch.randn(history.shape, generator=generator, device=window.device, dtype=torch.float32).to(window.dtype)
    return torch.cat((torch.lerp(history, noise, level), window[:, :, clean:]), 2)


def _prefill(run: Run, prefix: Tensor, block: int, levels: Tensor) -> None:
    frames = prefix.shape[2]
    piece = frames if frames <= getattr(run.denoiser, "most_frames", frames) else block
    for first in range(0, frames, piece):
        part = prefix[:, :, first : first + piece]
        run.step(_whole(Kind.PREFILL, 0, 0, part.shape[2], first, levels), part)


def _commit_block(run, index, offset, x, levels, renoise_seed, progress) -> Tensor:
    frames = x.shape[2]
    run.begin_segment(index, frames, 0, frames, levels)
    latents = _denoise_block(run, index, offset, x, levels, renoise_seed, progress)
    commit = _whole(Kind.COMMIT, index, levels.numel() - 1, frames, offset, levels)
    run.step(commit, latents)
    if progress is not None:
        progress(commit, latents)
    return latents


def _denoise_block(run, index, offset, x, levels, renoise_seed, progress) -> Tensor:
    frames, steps = x.shape[2], levels.numel() - 1
    family = Family.ODE if renoise_seed is None else Family.RENOISE
    sigmas = levels.tolist()
    calls = [
        Call(
            Kind.DENOISE, index, step - 1, (0, frames), (sigmas[step - 1],) * frames, (step,) * frames,
            (True,) * frames, offset, family, steps,
        )
        for step in range(1, steps + 1)
    ]  # fmt: skip
    for step, (call, following) in enumerate(zip(calls, [*calls[1:], None], strict=True), 1):
        velocity, _ = run.step(call, x)
        if renoise_seed is None:
            x = x + (sigmas[step] - sigmas[step - 1]) * velocity
        else:
            denoised = x - sigmas[step - 1] * velocity
            x = _renoised(denoised, sigmas[step], renoise_seed + index * 1000 + step - 1)
        if following is not None:
            run.ahead(following, x)
        if progress is not None:
            progress(call, x)
    run.end_segment()
    return x


def _renoised(denoised: Tensor, sigma: float, seed: int) -> Tensor:
    if sigma == 0.0:
        return denoised
    generator = torch.Generator(denoised.device).manual_seed(seed % 2**64)
    fresh = torch.randn(denoised.shape, generator=generator, device=denoised.device, dtype=denoised.dtype)
    return (1.0 - sigma) * denoised + sigma * fresh


def _whole(kind: Kind, segment: int, iteration: int, frames: int, offset: int, levels: Tensor) -> Call:
    clean = levels.numel()
    return Call(
        kind, segment, iteration, (0, frames), (0.0,) * frames, (clean,) * frames, (False,) * frames, offset,
        total_steps=clean - 1,
    )  # fmt: skip
