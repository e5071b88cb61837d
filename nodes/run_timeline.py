"""Run Timeline: the timeline of a run that one of core's samplers made."""

from __future__ import annotations

from comfy_api.latest import io

from ..accel.timeline import Timeline
from .host_files import check_size
from .host_runs import run_of, source_of
from .inputs import checked
from .names import CATEGORY
from .timeline import TimelineType

NODE = "Run Timeline"
NOTHING = (
    f"{NODE}: no accelerated run made this latent. Connect the LATENT of the sampler itself, and an acceleration node "
    "to its model; without one, every model call was computed."
)


class ARVARunTimeline(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVARunTimeline",
            display_name=NODE,
            category=CATEGORY,
            description="What every model call of core's KSampler, SamplerCustomAdvanced or SamplerARVideo did, where "
            "its model has acceleration nodes. The AR Segment Sampler gives its timeline itself.",
            search_aliases=["ksampler timeline", "cache report", "skipped steps"],
            inputs=[
                io.Latent.Input("latent", tooltip="The LATENT that the sampler gave, straight from it."),
            ],
            outputs=[
                io.Latent.Output("latent_out", display_name="latent", tooltip="The same LATENT, to go on with."),
                TimelineType.Output("timeline", display_name="timeline",
                                    tooltip="What every model call did, for AR Timeline."),
                io.String.Output("report", display_name="report", tooltip="The same in a few lines of text."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, latent: io.Latent.Type) -> io.NodeOutput:
        samples = latent["samples"]
        if not getattr(samples, "is_nested", False):
            check_size(NODE, samples.shape, samples.device)
        graph, own = getattr(cls.hidden, "prompt", None), getattr(cls.hidden, "unique_id", None)
        timeline = run_of(latent, graph, source_of(graph, own, "latent"))
        if timeline is None:
            return io.NodeOutput(latent, Timeline(title="No accelerated run"), NOTHING)
        return io.NodeOutput(latent, timeline, timeline.summary())


RUN_NODES: list[type[io.ComfyNode]] = [ARVARunTimeline]
