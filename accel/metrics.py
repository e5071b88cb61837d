"""How close a video is to its reference, and whether it gets worse along the way.

Videos are ``[B, C, T, H, W]`` with values in [0, 1]; latents have the same axes and any range. The reference is the run
without acceleration, from the same noise. Errors are summed in float64, one frame at a time, so a long video needs no
second copy of itself. SSIM comes from kornia, which is imported when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor


def _check(reference: Tensor, video: Tensor, frames: int = 1) -> None:
    for name, value in (("reference", reference), ("video", video)):
        if value.ndim != 5 or not value.is_floating_point():
            raise ValueError(
                f"metrics: {name} must be a floating-point tensor [B, C, T, H, W], "
                f"got {value.dtype} {tuple(value.shape)}."
            )
    if reference.shape != video.shape:
        raise ValueError(
            f"metrics: reference {tuple(reference.shape)} and video {tuple(video.shape)} differ in shape; "
            "compare runs of the same length and size."
        )
    if reference.shape[2] < frames or not reference.numel():
        raise ValueError(f"metrics: needs {frames} or more frames that are not empty, got {tuple(reference.shape)}.")


def _frames(reference: Tensor, video: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(reference.unbind(2), video.unbind(2), strict=True)


def _decibel(error: float) -> float:
    return math.inf if error == 0 else -10 * math.log10(error)


def frame_mse(reference: Tensor, video: Tensor) -> Tensor:
    """Mean squared error of every frame over batch, channels and pixels, ``[T]`` float64 on the host.

    Raises:
        ValueError: tensors that are not floating-point ``[B, C, T, H, W]`` of one shape.
    """
    _check(reference, video)
    errors = [(a.double() - b.double()).square().mean() for a, b in _frames(reference, video)]
    return torch.stack(errors).cpu()


def psnr(reference: Tensor, video: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, pooled: the squared error is averaged over all frames before the logarithm.

    Infinite for equal videos. The mean of per-frame values would let one perfect frame hide the others.
    """
    return _decibel(float(frame_mse(reference, video).mean()))


def psnr_per_frame(reference: Tensor, video: Tensor) -> list[float]:
    """PSNR of every frame in dB, pooled over the batch."""
    return [_decibel(error) for error in frame_mse(reference, video).tolist()]


def psnr_per_segment(reference: Tensor, video: Tensor, segments: Sequence[tuple[int, int]]) -> list[float]:
    """PSNR of every segment in dB, pooled over its frames.

    Args:
        reference: ``[B, C, T, H, W]`` in [0, 1].
        video: the same shape.
        segments: frames ``[start, end)`` of the video that each segment added.

    Raises:
        ValueError: an interval that is empty or outside the video.
    """
    errors = frame_mse(reference, video)
    for start, end in segments:
        if not 0 <= start < end <= len(errors):
            raise ValueError(f"metrics: segment [{start}, {end}) is not inside a video of {len(errors)} frames.")
    return [_decibel(float(errors[start:end].mean())) for start, end in segments]


def drift(curve: Sequence[float]) -> float:
    """Least-squares slope of a per-segment curve, in its unit per segment; negative means getting worse.

    Segments without a finite value (equal to the reference) are left out, the others keep their place. 0 for a curve
    that is infinite throughout, not a number where fewer than two finite points are left.
    """
    points = [(index, value) for index, value in enumerate(curve) if math.isfinite(value)]
    if curve and all(value == math.inf for value in curve):
        return 0.0
    if len(points) < 2:
        return math.nan
    centre = sum(index for index, _ in points) / len(points)
    spread = sum((index - centre) ** 2 for index, _ in points)
    return sum((index - centre) * value for index, value in points) / spread


def ssim(reference: Tensor, video: Tensor, window: int = 11) -> float:
    """Structural similarity, averaged over pixels and frames; 1 for equal videos. Arguments as ``ssim_per_frame``."""
    return fmean(ssim_per_frame(reference, video, window))


def ssim_per_frame(reference: Tensor, video: Tensor, window: int = 11) -> list[float]:
    """Structural similarity of every frame, averaged over batch, channels and pixels.

    Gaussian window of ``window`` pixels (sigma 1.5), borders reflected; Wang et al. 2004, as ``kornia.metrics.ssim``.

    Raises:
        ValueError: an even window, or frames smaller than it.
        ImportError: kornia is not installed.
    """
    _check(reference, video)
    if window < 1 or window % 2 == 0 or min(reference.shape[3:]) < window:
        height, width = reference.shape[3:]
        raise ValueError(
            f"metrics: SSIM needs an odd window no larger than the frame, got {window} for {height}x{width}."
        )
    from kornia.metrics import ssim as similarity

    values = [similarity(a.float(), b.float(), window).mean() for a, b in _frames(reference, video)]
    return torch.stack(values).double().tolist()


def relative_l2(reference: Tensor, latents: Tensor) -> float:
    """Relative error ``|latents - reference| / |reference|`` of whole latents in the L2 norm; 0 for equal latents."""
    _check(reference, latents)
    error = float(frame_mse(reference, latents).mean())
    energy = float(torch.stack([frame.double().square().mean() for frame in reference.unbind(2)]).mean())
    if energy == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / energy)


def flicker(reference: Tensor, video: Tensor) -> float:
    """Mean absolute error of the change from frame to frame; 0 where the video moves exactly as its reference.

    A constant offset does not count, an offset that alternates in sign counts twice.

    Raises:
        ValueError: fewer than two frames.
    """
    _check(reference, video, frames=2)
    offsets = (b.double() - a.double() for a, b in _frames(reference, video))
    errors = [(later - earlier).abs().mean() for earlier, later in pairwise(offsets)]
    return float(torch.stack(errors).mean())
