"""AR Timeline: saves and shows what every model call of a run did."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..accel.timeline import Timeline
from .host_files import check_prefix, save_texts
from .inputs import checked, kind_of

NODE = "AR Timeline"
TimelineType = io.Custom("ARVA_TIMELINE")
kind_of(TimelineType.io_type, Timeline, "the timeline of an AR Segment Sampler")


class ARVATimeline(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVATimeline",
            display_name=NODE,
            category="AR Video",
            description="Saves the timeline of an AR video run as JSON, as a picture and in words: which model calls "
            "were recomputed, predicted or served from the cache, why, and what that saved.",
            search_aliases=["cache report", "skipped steps", "ar video report", "timeline"],
            is_output_node=True,
            inputs=[
                TimelineType.Input("timeline", tooltip="Timeline of an AR Segment Sampler, or from Run Timeline."),
                io.String.Input(
                    "filename_prefix",
                    default="ar_timeline",
                    tooltip="How the names of the saved files begin, inside ComfyUI's output folder; a slash makes a "
                    "folder.",
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The run in a few lines of text."),
                io.String.Output("json", display_name="json", tooltip="The whole timeline as JSON."),
            ],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str = "") -> bool | str:
        try:
            check_prefix(NODE, filename_prefix or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(cls, timeline: Timeline, filename_prefix: str) -> io.NodeOutput:
        text, report = json.dumps(timeline.to_json()), timeline.summary()
        saved = save_texts(NODE, filename_prefix, {"json": text, "svg": timeline.to_svg(), "txt": report})
        return io.NodeOutput(
            report,
            text,
            ui={"arva_timeline": [saved], "text": [report]},
        )


TIMELINE_NODES: list[type[io.ComfyNode]] = [ARVATimeline]
