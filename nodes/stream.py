"""Stream Segments: what becomes of the segments of an AR Segment Sampler while the video is still being made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from .acceleration import CATEGORY
from .host_files import check_prefix
from .inputs import checked, kind_of
from .video_file import FORMATS

NODE = "Stream Segments"
StreamType = io.Custom("ARVA_STREAM")


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What Stream Segments describes.

    Attributes:
        vae: core's VAE, None for latents alone. prefix: of the files, in ComfyUI's output folder. fps: frames a second.
        format: a key of ``FORMATS``. resume: whether a run that was cut off goes on. every: segments from one saved
            state to the next. context: latent frames before a segment that are decoded with it.

    Raises:
        ValueError: one sentence with the node, the value and the remedy.
    """

    vae: Any
    prefix: str
    fps: float
    format: str
    resume: bool
    every: int
    context: int

    def __post_init__(self) -> None:
        check_prefix(NODE, self.prefix)
        if not 0.0 < self.fps <= 1000.0:
            raise ValueError(f"{NODE}: fps is {self.fps:g}; use frames a second above 0 and up to 1000.")
        if self.format not in FORMATS:
            raise ValueError(f"{NODE}: format is {self.format!r}; use one of {', '.join(FORMATS)}.")
        if self.every < 1 or self.context < 0:
            raise ValueError(f"{NODE}: every is {self.every} and context {self.context}; use 1 or more, and 0 or more.")


kind_of(StreamType.io_type, StreamSettings, "Stream Segments")


class ARVAStreamSegments(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVAStreamSegments",
            display_name=NODE,
            category=CATEGORY,
            description="Lets segments leave an AR Segment Sampler as they finish: appended to a video file that plays "
            "while it grows, and saved, so that a run that was cut off goes on where it stopped.",
            search_aliases=["resume", "checkpoint", "long video", "save while sampling", "append video"],
            inputs=[
                io.Vae.Input("vae", optional=True, tooltip="Decodes each finished segment for the video. Without it "
                             "only latents are saved."),
                io.String.Input("filename_prefix", default="ar_stream",
                                tooltip="How the names of the saved files begin, inside ComfyUI's output folder; a "
                                "slash makes a folder."),
                io.Float.Input("fps", default=16.0, min=0.1, max=1000.0, step=1.0, round=0.001,
                               tooltip="Frames a second of the video."),
                io.Combo.Input("format", options=list(FORMATS), default="mp4",
                               tooltip="Container of the video. Both, mp4 and mkv, can be played while they grow and "
                               "after a crash."),
                io.Boolean.Input("resume", default=True,
                                 tooltip="Goes on with an unfinished run of the same settings and prefix as if it had "
                                 "never stopped. Off, or where the settings differ: starts anew, beside it."),
                io.Int.Input("every", default=1, min=1, max=1000, advanced=True,
                             tooltip="Saves the state to go on from after every so many segments. With a large K/V "
                             "window more than 1 saves disk writes; the segments since are made again."),
                io.Int.Input("context", default=4, min=0, max=256, advanced=True,
                             tooltip="Latent frames before a segment that are decoded with it and left out, for a VAE "
                             "that looks back in time. More come closer to decoding the whole video at once. Wan 2.1's "
                             "VAE is carried on from segment to segment instead, which is exact."),
            ],
            outputs=[StreamType.Output("stream", display_name="stream", tooltip="For AR Segment Sampler.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, filename_prefix: str = "") -> bool | str:
        try:
            StreamSettings(None, filename_prefix or "", 16.0, "mp4", True, 1, 0)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(
        cls, filename_prefix: str, fps: float, format: str, resume: bool, every: int, context: int, vae: Any = None
    ) -> io.NodeOutput:
        return io.NodeOutput(StreamSettings(vae, filename_prefix, fps, format, resume, every, context))


STREAM_NODES: list[type[io.ComfyNode]] = [ARVAStreamSegments]
