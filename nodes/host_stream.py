"""Segments on their way out of a run: saved, and appended to a video, one after the other."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..accel.checkpoint import Checkpoint, Finished, saved
from ..accel.engine import Run
from ..accel.run_state import RunState
from ..accel.sampling import Segment
from ..accel.tensor_file import write_tensors
from .host_files import new_run, show_text, unfinished_runs
from .host_video import SegmentVideos, check_vae
from .stream import NODE, StreamSettings


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
        self.videos: SegmentVideos | None = None

    def begin(
        self, run: Run, description: dict[str, Any], patcher: Any, to_latent: Callable[[Tensor], Tensor],
        prefix: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Takes up a run that was cut off, or starts one; returns the latents of the finished segments.

        Args:
            run: goes on with the saved state where there is one. description: what the run is (``describe_run``).
            patcher, to_latent, prefix: as in ``SegmentVideos``.

        Raises:
            ValueError: a VAE that does not belong to the model.
        """
        if self.settings.vae is not None:
            check_vae(self.settings.vae, patcher.get_model_object("latent_format").latent_channels)
        finished = self._resume(description) if self.settings.resume else None
        if finished is None:
            finished = Finished()
            folder, self.name, self.subfolder = new_run(NODE, self.settings.prefix)
            self.checkpoint = Checkpoint.start(folder, description)
        elif finished.state is not None:
            self._take_over(run, finished.state)
        if self.settings.vae is not None:
            self.videos = SegmentVideos(self.settings, self.checkpoint, self.name, patcher, to_latent, prefix)
            self.videos.open(finished.latents)
        return finished.latents

    def carry(self, segments: Iterator[Segment], run: Run) -> Iterator[Segment]:
        """Hands on segments after they were saved and appended to the video; what is finished is kept however the run
        ends."""
        try:
            for segment in saved(segments, run, self.checkpoint, self.settings.every):
                if self.videos is not None:
                    self.videos.append(segment.latents)
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
        if self.videos is not None:
            for path in self.videos.finish(self._metadata()):
                self.results.append({"filename": path.name, "subfolder": self.subfolder, "type": "output"})
                self.lines.append(f"Video: {path}")
        else:
            path = self.checkpoint.folder.with_name(f"{self.name}_.latent")
            write_tensors(path, {"latent_tensor": latents, "latent_format_version_0": torch.zeros(0)})
            self.lines.append(f"Latents: {path}")
        self.checkpoint.remove()
        return "\n".join(self.lines)

    def _take_over(self, run: Run, state: RunState) -> None:
        try:
            run.load(state)
        except ValueError as error:
            raise ValueError(f"{NODE}: {self.checkpoint.folder} cannot be resumed. {error}") from error

    def _resume(self, description: dict[str, Any]) -> Finished | None:
        """The newest unfinished run of this prefix that is the same run."""
        reasons = []
        for folder, name, subfolder in unfinished_runs(NODE, self.settings.prefix):
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

    def _metadata(self) -> dict[str, str]:
        """The workflow, so that the video can be dropped on the canvas."""
        if args.disable_metadata:
            return {}
        told = dict(getattr(self.hidden, "extra_pnginfo", None) or {})
        told |= {"prompt": getattr(self.hidden, "prompt", None)}
        return {key: json.dumps(value) for key, value in told.items() if value is not None}

    def _say(self, text: str) -> None:
        logging.info(text)
        context = get_executing_context()
        if context is not None:
            show_text(context.node_id, text)
