"""Segments on their way out of a run: saved, decoded in order and appended to a video, one after the other.

Nothing of a finished segment stays here but the last latent frames, which the next one is decoded with.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..accel.checkpoint import Checkpoint, Finished
from ..accel.engine import Run
from ..accel.sampling import Segment
from ..accel.tensor_file import write_tensors
from .host_files import new_run, show_text, unfinished_runs
from .stream import NODE, StreamSettings
from .video_file import VideoFile

DecodeSpace = Callable[[Tensor], Tensor]


class SegmentStream:
    """Where the segments of one run go.

    Args:
        settings: what Stream Segments describes. hidden: the sampler's hidden inputs, which the video carries as core's
            Save Video has it.

    Attributes:
        lines: what there is to say of it, for the report. results: files to show on the node, as core lists them.
    """

    def __init__(self, settings: StreamSettings, hidden: Any = None) -> None:
        self.settings, self.hidden = settings, hidden
        self.lines: list[str] = []
        self.results: list[dict[str, str]] = []

    def begin(
        self, run: Run, description: dict[str, Any], patcher: Any, to_latent: DecodeSpace, prefix: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Takes up a run that was cut off, or starts one; returns the latents of the finished segments.

        Args:
            run: goes on with the saved state where there is one. description: what the run is (``describe_run``).
            patcher: the MODEL, which decoding may push out of memory. to_latent: from the latents of the run to what a
                VAE decodes. prefix: clean latents at the start of the video.
        """
        self.patcher, self.to_latent, self.prefix = patcher, to_latent, prefix
        self._check_vae(patcher.get_model_object("latent_format").latent_channels)
        finished = self._resume(description) if self.settings.resume else None
        if finished is None:
            finished = Finished()
            folder, self.name, self.subfolder = new_run(self.settings.prefix)
            self.checkpoint = Checkpoint.start(folder, description)
        elif finished.state is not None:
            run.load(finished.state)
        self._open_videos(finished)
        return finished.latents

    def carry(self, segments: Iterator[Segment], run: Run) -> Iterator[Segment]:
        """Hands on segments after they were saved and appended to the video; what is finished is kept however the run
        ends."""
        try:
            for segment in segments:
                due = (segment.index + 1) % self.settings.every == 0
                self.checkpoint.save(segment, run.state() if due else None)
                self._append(segment.latents)
                yield segment
        except BaseException:
            kept = self.checkpoint.resumable
            self._say(f"{NODE}: {kept} finished segments are kept; queue again with resume to go on after them.")
            if not self.checkpoint.finished:
                self.checkpoint.remove()
            raise

    def finish(self, latents: Tensor) -> str:
        """The run is done: completes its files, removes what it needed to go on, and tells where they are.

        Args:
            latents: the whole video as LATENT samples, kept on disk where no video is made of them.
        """
        folder = self.checkpoint.folder.parent
        self.checkpoint.note(video={})
        for video in self.videos:
            video.finish(self._metadata())
            self._show(video.path.name)
            self.lines.append(f"Video: {video.path}")
        if not self.videos:
            path = folder / f"{self.name}_.latent"
            write_tensors(path, {"latent_tensor": latents, "latent_format_version_0": torch.zeros(0)})
            self.lines.append(f"Latents: {path}")
        self.checkpoint.remove()
        return "\n".join(self.lines)

    def _check_vae(self, channels: int) -> None:
        vae = self.settings.vae
        if vae is not None and (vae.latent_dim != 3 or vae.latent_channels != channels):
            raise ValueError(
                f"{NODE}: vae decodes {vae.latent_channels} channels in {vae.latent_dim} dimensions, the model makes "
                f"{channels} in 3; connect the video VAE that belongs to the model."
            )

    def _resume(self, description: dict[str, Any]) -> Finished | None:
        """The newest unfinished run of this prefix that is the same run."""
        reasons = []
        for folder, name, subfolder in unfinished_runs(self.settings.prefix):
            try:
                self.checkpoint = Checkpoint.open(folder, description)
                finished = self.checkpoint.load()
            except ValueError as error:
                reasons.append(str(error))
                continue
            self.name, self.subfolder = name, subfolder
            if finished.latents:
                self.lines.append(f"Resumed after {len(finished.latents)} finished segments in {folder}.")
            return finished
        if reasons:
            self.lines.append(f"Started anew: {reasons[0]}")
        return None

    def _open_videos(self, finished: Finished) -> None:
        """Cuts the videos behind the last finished segment, or makes them again from its latents."""
        self.videos: list[VideoFile] = []
        self._tail: Tensor | None = None
        self._frames, self._ends = 0, []
        if self.settings.vae is None:
            return
        wanted = [self.settings.format, self.settings.fps, self.settings.context]
        noted, count = self.checkpoint.notes.get("video", {}), len(finished.latents)
        ends = noted.get("ends", [])[:count]
        self.videos = [self._video(index) for index in range(len(noted.get("files", ())) if ends else 0)]
        good = noted.get("settings") == wanted and len(ends) == count > 0
        if good and all(video.holds(size) for video, size in zip(self.videos, ends[-1]["sizes"], strict=True)):
            for video, size in zip(self.videos, ends[-1]["sizes"], strict=True):
                video.cut(size)
            self._ends, self._frames = ends, ends[-1]["frames"]
            self._remember(torch.cat(([] if self.prefix is None else [self.prefix.cpu()]) + list(finished.latents), 2))
            return
        for latents in finished.latents:
            self._append(latents)

    def _append(self, latents: Tensor) -> None:
        """Decodes the next segment behind the latent frames before it and appends its frames."""
        if self.settings.vae is None:
            return
        if not self._ends and self.prefix is not None:
            latents = torch.cat((self.prefix.to(latents), latents), 2)
        images = self._decode(latents)
        if len(self.videos) != len(images):
            self.videos = [self._video(index) for index in range(len(images))]
        sizes = [video.append(clip, self._frames) for video, clip in zip(self.videos, images, strict=True)]
        self._frames += images.shape[1]
        self._remember(latents)
        self._ends = [*self._ends, {"sizes": sizes, "frames": self._frames}]
        settings = [self.settings.format, self.settings.fps, self.settings.context]
        files = [video.path.name for video in self.videos]
        self.checkpoint.note(video={"settings": settings, "files": files, "ends": self._ends})

    def _decode(self, latents: Tensor) -> Tensor:
        """Frames ``[B, F, H, W, 3]`` of new latents."""
        vae, before = self.settings.vae, self._tail
        given = latents if before is None else torch.cat((before.to(latents), latents), 2)
        try:
            images = vae.decode(self.to_latent(given))
        finally:
            comfy.model_management.load_models_gpu(
                [self.patcher], memory_required=self.patcher.memory_required(list(given.shape))
            )
        return images if before is None else images[:, -latents.shape[2] * (vae.temporal_compression_decode() or 1) :]

    def _remember(self, latents: Tensor) -> None:
        """Keeps the last latent frames, which the next segment is decoded with."""
        both = latents if self._tail is None else torch.cat((self._tail, latents.cpu()), 2)
        self._tail = both[:, :, -self.settings.context :].cpu().clone() if self.settings.context else None

    def _video(self, index: int) -> VideoFile:
        mark = f"clip{index + 1}" if index else ""
        path = Path(self.checkpoint.folder.parent, f"{self.name}_{mark}.{self.settings.format}")
        return VideoFile(path, self.settings.fps)

    def _metadata(self) -> dict[str, str]:
        """The workflow, so that the video can be dropped on the canvas."""
        if args.disable_metadata:
            return {}
        told = dict(getattr(self.hidden, "extra_pnginfo", None) or {})
        told |= {"prompt": getattr(self.hidden, "prompt", None)}
        return {key: json.dumps(value) for key, value in told.items() if value is not None}

    def _show(self, filename: str) -> None:
        self.results.append({"filename": filename, "subfolder": self.subfolder, "type": "output"})

    def _say(self, text: str) -> None:
        logging.info(text)
        context = get_executing_context()
        if context is not None:
            show_text(context.node_id, text)
