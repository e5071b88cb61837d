"""Two runs side by side: how far the second video is from the reference, and what each run did and cost.

Clips are ``[T, H, W, 3]`` with values in [0, 1], as ComfyUI keeps images. What is not known (a timeline that is not
given, FLOPs or times that were not counted) is left out of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import psnr, psnr_per_frame, psnr_per_segment, ssim_per_frame
from .timeline import Timeline
from .timeline_report import figures, quantity

NODE = "Compare Runs"
WINDOW = 11
QUARTERS = 4


@dataclass(frozen=True, slots=True)
class Comparison:
    """How close a video is to its reference.

    Attributes:
        size: frames, height and width. psnr: dB, pooled over all frames; infinite for equal videos.
        psnr_frames: dB of every frame. ssim_frames: SSIM of every frame; empty where kornia is not installed.
        window: pixels of SSIM's window.
        quarters: ``(first frame, end, dB)`` of the clip's quarters (fewer in a clip of less than four frames).
    """

    size: tuple[int, int, int]
    psnr: float
    psnr_frames: list[float]
    ssim_frames: list[float]
    window: int
    quarters: list[tuple[int, int, float]]

    @property
    def ssim(self) -> float | None:
        """Mean over frames; None where it is not known."""
        return sum(self.ssim_frames) / len(self.ssim_frames) if self.ssim_frames else None


def check_clips(reference: Tensor, video: Tensor) -> None:
    """Raises ValueError, in one sentence with the remedy, for clips that cannot be compared."""
    for name, clip in (("reference", reference), ("video", video)):
        if clip.ndim != 4 or clip.shape[-1] < 3 or not clip.numel():
            raise ValueError(
                f"{NODE}: {name} must be images [frames, height, width, 3], got {list(clip.shape)}; connect the frames "
                "that VAE Decode makes of a run."
            )
    frames, sizes = ([clip.shape[0] for clip in (reference, video)], [clip.shape[1:3] for clip in (reference, video)])
    if frames[0] != frames[1]:
        raise ValueError(
            f"{NODE}: reference has {frames[0]} frames and video {frames[1]}; sample both from the same latent, so "
            "that they are equally long."
        )
    if sizes[0] != sizes[1]:
        (height, width), (other_height, other_width) = sizes
        raise ValueError(
            f"{NODE}: reference is {width}x{height} pixels and video {other_width}x{other_height}; sample both from "
            "the same latent and decode them with the same VAE."
        )


def compare(reference: Tensor, video: Tensor) -> Comparison:
    """How close ``video`` is to ``reference``, both ``[T, H, W, 3]`` in [0, 1].

    Raises:
        ValueError: clips of different length or size, or tensors that are no clips.
    """
    check_clips(reference, video)
    frames, height, width, _ = reference.shape
    pair = [clip[..., :3].movedim(-1, 0)[None] for clip in (reference, video)]
    bounds = [round(index * frames / QUARTERS) for index in range(QUARTERS + 1)]
    spans = [(start, end) for start, end in zip(bounds, bounds[1:], strict=False) if end > start]
    window = min(WINDOW, (min(height, width) - 1) // 2 * 2 + 1)
    try:
        similarity = ssim_per_frame(*pair, window)
    except ImportError:
        similarity = []
    return Comparison(
        (frames, height, width), psnr(*pair), psnr_per_frame(*pair), similarity, window,
        [(*span, value) for span, value in zip(spans, psnr_per_segment(*pair, spans), strict=True)],
    )  # fmt: skip


def difference(reference: Tensor, video: Tensor, gain: float) -> Tensor:
    """``gain * |video - reference|`` of clips ``[T, H, W, 3]``, cut off at 1.

    Raises:
        ValueError: as ``compare``.
    """
    check_clips(reference, video)
    return (video[..., :3] - reference[..., :3]).abs().mul(gain).clamp(max=1.0)


def decibels(value: float) -> str:
    """A PSNR in words; infinite means equal."""
    return "equal" if value == math.inf else f"{value:.2f} dB"


def table(comparison: Comparison, reference: Timeline | None = None, run: Timeline | None = None) -> str:
    """Everything known as Markdown: closeness first, then, given timelines, what each run did and cost."""
    frames, height, width = comparison.size
    lines = [f"{frames} frames of {width}x{height}, against the reference", "", "| closeness | |", "|-|-|"]
    lines.append(f"| PSNR | {decibels(comparison.psnr)} |")
    if comparison.ssim is not None:
        window = f", window {comparison.window}" * (comparison.window != WINDOW)
        lines.append(f"| SSIM{window} | {comparison.ssim:.4f} |")
    lines += [f"| PSNR, frames {start} to {end - 1} | {decibels(db)} |" for start, end, db in comparison.quarters]
    costs = cost_rows(reference, run)
    if costs:
        lines += ["", "| cost | reference | video |", "|-|-|-|"]
        lines += [f"| {name} | {left} | {right} |" for name, left, right in costs]
    if reference is not None and run is not None and (unlike := differing(reference, run)):
        lines += ["", f"The runs differ in more than acceleration: {unlike}."]
    return "\n".join(lines)


def cost_rows(reference: Timeline | None, run: Timeline | None) -> list[tuple[str, str, str]]:
    """``(what, of the reference, of the run)`` for everything that at least one timeline knows."""
    totals = [None if timeline is None else timeline.totals() for timeline in (reference, run)]

    def row(name: str, value: Callable[[dict], object], words: Callable[[float], str]) -> None:
        cells = [None if one is None else value(one) for one in totals]
        if any(cells):
            rows.append((name, *("" if cell is None else words(cell) for cell in cells)))

    rows: list[tuple[str, str, str]] = []
    for decision in ("recompute", "predict", "cache", "commit"):
        row(f"calls: {decision}", lambda one, key=decision: one["calls"][key], str)
    row("FLOPs", lambda one: one["flops"] or None, lambda value: quantity(value, "FLOP"))
    row("fewer FLOPs than computing every call", lambda one: one["flop_ratio"], lambda value: f"{value:.2f}x")
    row("seconds", lambda one: one["seconds"] or None, lambda value: f"{figures(value)} s")
    row("state bytes", lambda one: one.get("state_bytes"), lambda value: quantity(value, "B"))
    if None not in totals:
        for name, key in (("FLOP ratio", "flops"), ("measured speed-up", "seconds")):
            if all(one[key] for one in totals):
                rows.append((name, "", f"{totals[0][key] / totals[1][key]:.2f}x"))
    return rows


def differing(reference: Timeline, run: Timeline) -> str:
    """Schedule entries in which two runs differ, as ``steps 50 and 25``; empty where they agree."""
    left, right = reference.schedule, run.schedule
    keys = [key for key in left.keys() | right.keys() if left.get(key) != right.get(key)]
    told = [f"{key} {left.get(key)} and {right.get(key)}" for key in sorted(keys) if key != "sigmas" or len(keys) == 1]
    return ", ".join(told)


def plot_curves(comparison: Comparison) -> list[tuple[str, list[float]]]:
    """``(label, value of every frame)`` of the curves there are."""
    curves = [("PSNR (dB)", comparison.psnr_frames), ("SSIM", comparison.ssim_frames)]
    return [(name, values) for name, values in curves if values]


def plot(comparison: Comparison) -> Tensor:
    """PSNR and SSIM per frame over time, as an image ``[1, H, W, 3]`` in [0, 1]."""
    from .compare_plot import draw

    pixels = draw(plot_curves(comparison), [start for start, _, _ in comparison.quarters[1:]])
    return torch.from_numpy(pixels).float()[None] / 255
