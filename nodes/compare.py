"""Compare Runs: how close a video is to its reference, frame by frame, and what the two runs cost."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..accel.compare import NODE, compare, difference, plot, table
from ..accel.timeline import Timeline
from .acceleration import CATEGORY
from .host_files import show_text
from .inputs import checked
from .timeline import TimelineType


class ARVACompareRuns(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVACompareRuns",
            display_name=NODE,
            category=CATEGORY,
            description="Compares two runs from the same seed: PSNR and SSIM of the video against its reference, how "
            "they change over the clip, and with timelines what each run computed and how long it took.",
            search_aliases=["psnr", "ssim", "a/b", "quality", "benchmark", "video difference"],
            is_output_node=True,
            inputs=[
                io.Image.Input("reference", tooltip="Frames of the run to compare with, as VAE Decode makes them: the "
                               "one with quality exact, or without acceleration."),
                io.Image.Input("video", tooltip="Frames of the other run, as many and as large."),
                io.Float.Input("gain", default=4.0, min=0.1, max=1000.0, step=0.5, round=0.01,
                               tooltip="How much brighter the difference is shown than it is."),
                TimelineType.Input("reference_timeline", optional=True, tooltip="Timeline of the reference's AR "
                                   "Segment Sampler, for calls, FLOPs and time."),
                TimelineType.Input("timeline", optional=True,
                                   tooltip="Timeline of the other run's AR Segment Sampler."),
            ],
            outputs=[
                io.Image.Output("difference", display_name="difference",
                                tooltip="The absolute difference as a video, times gain; black where both are equal."),
                io.String.Output("table", display_name="table",
                                 tooltip="Closeness, calls, FLOPs and time as a Markdown table."),
                io.Image.Output("plot", display_name="plot", tooltip="PSNR and SSIM of every frame over the clip."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls, reference: Tensor, video: Tensor, gain: float, reference_timeline: Timeline | None = None,
        timeline: Timeline | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        comparison = compare(reference, video)
        text, picture = table(comparison, reference_timeline, timeline), plot(comparison)
        show_text(cls.hidden.unique_id, text)
        shown = {"text": [text], **ui.PreviewImage(picture, cls=cls).as_dict()}
        return io.NodeOutput(difference(reference, video, gain), text, picture, ui=shown)


COMPARE_NODES: list[type[io.ComfyNode]] = [ARVACompareRuns]
