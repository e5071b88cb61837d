"""Finished segments as videos: decoded in order, each behind what came before it, and appended.

Nothing of a segment stays here but what the next one is decoded with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..accel.checkpoint import Checkpoint
from .host_vae import WARM, segment_decoder
from .stream import NODE, StreamSettings
from .video_file import VideoFile


class SegmentVideos:
    """The growing videos of one run, one for every clip of its batch.

    Args:
        settings: of Stream Segments, with a VAE. checkpoint: the run in progress, whose notes say where the videos
            stand. name: how the names of the files begin.
        patcher: the MODEL, which decoding may push out of memory. to_latent: from the latents of the run to what a VAE
            decodes. prefix: clean latents ``[B, C, T, H, W]`` at the start of the video.
    """

    def __init__(
        self, settings: StreamSettings, checkpoint: Checkpoint, name: str, patcher: Any,
        to_latent: Callable[[Tensor], Tensor], prefix: Tensor | None,
    ) -> None:  # fmt: skip
        self.settings, self.checkpoint, self.name = settings, checkpoint, name
        self.patcher, self.to_latent, self.prefix = patcher, to_latent, prefix
        self._files: list[VideoFile] = []
        self._decoder = segment_decoder(settings.vae, settings.context)
        self._frames = 0
        self._ends: list[dict[str, Any]] = []

    def open(self, finished: Sequence[Tensor]) -> None:
        """Cuts the videos behind the last of the finished segments, or makes them again from the latents."""
        ends = self._noted(len(finished))
        if not ends:
            return self._make_again(finished)
        sizes = ends[-1]["sizes"]
        self._files = [self._file(index) for index in range(len(sizes))]
        if not all(file.holds(size) for file, size in zip(self._files, sizes, strict=True)):
            return self._make_again(finished)
        for file, size in zip(self._files, sizes, strict=True):
            file.cut(size)
        self._ends, self._frames = ends, ends[-1]["frames"]
        self._resume([*([] if self.prefix is None else [self.prefix]), *finished])
        return None

    def append(self, latents: Tensor) -> None:
        """Decodes the next segment ``[B, C, T, H, W]`` and appends its frames."""
        if not self._ends and self.prefix is not None:
            latents = torch.cat((self.prefix.to(latents), latents), 2)
        self._write(self._with_model(lambda: self._decoder.decode(self.to_latent(latents)), latents.shape))

    def finish(self, metadata: Mapping[str, str]) -> list[Path]:
        """Completes the files and says where they are."""
        images = self._with_model(self._decoder.finish, None)
        if images is not None:
            self._write(images)
        self.checkpoint.note(video={})  # a completed file cannot grow: a run cut off here makes it again
        for file in self._files:
            file.finish(metadata)
        return [file.path for file in self._files]

    @property
    def _settings(self) -> list[Any]:
        return [self.settings.format, self.settings.fps, self._decoder.kind]

    def _noted(self, count: int) -> list[dict[str, Any]]:
        """Where the videos of so many segments ended, as it was noted; empty where they have to be made again."""
        try:
            noted = self.checkpoint.notes["video"]
            ends = [{"sizes": [*end["sizes"]], "frames": end["frames"]} for end in noted["ends"][:count]]
            known = noted["settings"] == self._settings and len(ends) == count
            whole = all(
                type(number) is int and number >= 0 for end in ends for number in (*end["sizes"], end["frames"])
            )
        except (KeyError, TypeError):
            return []
        return ends if known and whole else []

    def _make_again(self, finished: Sequence[Tensor]) -> None:
        for latents in finished:
            self.append(latents)

    def _write(self, images: Tensor) -> None:
        """Appends frames ``[B, F, H, W, 3]`` and notes where the videos end now."""
        if len(self._files) != len(images):
            self._files = [self._file(index) for index in range(len(images))]
        if images.shape[1]:
            sizes = [file.append(clip, self._frames) for file, clip in zip(self._files, images, strict=True)]
        else:
            sizes = self._ends[-1]["sizes"]
        self._frames += images.shape[1]
        self._ends = [*self._ends, {"sizes": sizes, "frames": self._frames}]
        names = [file.path.name for file in self._files]
        self.checkpoint.note(video={"settings": self._settings, "files": names, "ends": self._ends})

    def _resume(self, parts: Sequence[Tensor]) -> None:
        """Lets the decoder go on behind the latents ``parts``, the whole video so far."""
        tail: list[Tensor] = []
        for latents in reversed(parts):
            if sum(part.shape[2] for part in tail) >= max(WARM, self.settings.context):
                break
            tail.insert(0, latents)
        latents, count = self.to_latent(torch.cat(tail, 2)), sum(part.shape[2] for part in parts)
        self._with_model(lambda: self._decoder.resume(latents, count), latents.shape)

    def _with_model(self, decode: Callable[[], Any], shape: Sequence[int] | None) -> Any:
        """What ``decode`` returns, with the MODEL back in memory behind it where more sampling follows."""
        try:
            return decode()
        finally:
            if shape is not None:
                comfy.model_management.load_models_gpu(
                    [self.patcher], memory_required=self.patcher.memory_required(list(shape))
                )

    def _file(self, index: int) -> VideoFile:
        mark = f"clip{index + 1}" if index else ""
        path = Path(self.checkpoint.folder.parent, f"{self.name}_{mark}.{self.settings.format}")
        return VideoFile(path, self.settings.fps)


def check_vae(vae: Any, channels: int) -> None:
    """Raises ValueError for a VAE that is none of a video model with so many latent channels."""
    if vae.latent_dim != 3 or vae.latent_channels != channels:
        raise ValueError(
            f"{NODE}: vae decodes {vae.latent_channels} channels in {vae.latent_dim} dimensions, the model makes "
            f"{channels} in 3; connect the video VAE that belongs to the model."
        )
