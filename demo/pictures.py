"""Videos as files people look at: mp4 where PyAV is installed, animated webp elsewhere, and contact sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def _pixels(video: Tensor, scale: int) -> np.ndarray:
    """``[T, H, W, 3]`` uint8 of one video ``[3, T, H, W]``, enlarged ``scale`` times."""
    frames = F.interpolate(video.transpose(0, 1), scale_factor=scale, mode="bicubic").clamp(0, 1)
    return (frames * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def save_video(video: Tensor, path: Path, fps: int = 12, scale: int = 4) -> Path:
    """Writes ``[3, T, H, W]`` in [0, 1] and returns the file: ``path`` with the suffix of the format that was at
    hand."""
    frames = _pixels(video, scale)
    try:
        import av
    except ImportError:
        path = path.with_suffix(".webp")
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // fps, loop=0, quality=85)
        return path
    path = path.with_suffix(".mp4")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=fps, options={"crf": "18"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def contact_sheet(videos: Tensor, path: Path, columns: int = 13, scale: int = 1) -> Path:
    """One row a video of ``[B, 3, T, H, W]``, ``columns`` frames evenly spread over its length."""
    count = videos.shape[2]
    chosen = sorted({round(index * (count - 1) / max(1, columns - 1)) for index in range(min(columns, count))})
    rows = [np.concatenate(list(_pixels(video[:, chosen], scale)), axis=1) for video in videos]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)
    return path
