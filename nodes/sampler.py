"""AR Segment Sampler: makes an autoregressive video segment by segment, and reports what every model call did."""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui

from .acceleration import CATEGORY, described
from .host import model_regime, model_shift, sample_segments, video_latent
from .host_stream import SegmentStream
from .inputs import checked
from .job import MODES, SOLVERS, make_job
from .stream import StreamType
from .timeline import TimelineType


class ARVASegmentSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVASegmentSampler",
            display_name="AR Segment Sampler",
            category=CATEGORY,
            description="Samples an autoregressive video: diffusion forcing over overlapping segments, next-clip "
            "continuation, or causal blocks with a K/V store. Acceleration nodes before it say which calls to skip.",
            search_aliases=["diffusion forcing", "skyreels", "self forcing", "causal forcing", "long video"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan text-to-video model trained with diffusion forcing, or a causal "
                               "Wan model; with acceleration nodes in between."),
                io.Conditioning.Input("positive", tooltip="What the video should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show; unused where cfg is 1."),
                io.Latent.Input("latent_image", tooltip="An empty video latent, which sets size and length."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                             tooltip="Seed of the start noise, the same as in core's samplers."),
                io.Int.Input("steps", default=50, min=1, max=10000, tooltip="Solver steps of every latent frame."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Guidance scale; 1 runs the positive branch alone, as causal models distilled "
                               "to few steps want it."),
                io.Combo.Input("mode", options=list(MODES), default="auto",
                               tooltip="How the video is made. auto: causal blocks for causal models, else diffusion "
                               "forcing. next clip is for models whose history shares the time embedding."),
                io.Int.Input("segment", default=16, min=1, max=4096,
                             tooltip="Latent frames that the model sees at once. Unused in causal blocks."),
                io.Int.Input("overlap", default=4, min=0, max=4096, advanced=True,
                             tooltip="Finished frames that the next segment continues. Unused in causal blocks."),
                io.Int.Input("block", default=4, min=1, max=4096, advanced=True,
                             tooltip="Latent frames denoised together, as the model was trained."),
                io.Int.Input("ar_step", default=5, min=0, max=10000, advanced=True,
                             tooltip="Diffusion forcing: steps by which each block runs behind the one before; 0 "
                             "denoises a segment all at once."),
                io.Combo.Input("solver", options=list(SOLVERS), default="auto", advanced=True,
                               tooltip="auto: Euler, and re-noise in causal blocks (what distilled causal models were "
                               "trained for, and core's ar_video sampler does)."),
                io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01, advanced=True,
                               tooltip="Shift of the noise levels; 0 takes the model's own."),
                io.Float.Input("history_noise", default=0.0, min=0.0, max=0.99, step=0.01, round=0.001, advanced=True,
                               tooltip="Noise level that finished frames are shown to the model with; a little (0.02) "
                               "can steady long videos."),
                io.Float.Input("history_guidance", default=0.0, min=0.0, max=1.0, step=0.05, round=0.001, advanced=True,
                               optional=True, tooltip="Noise level that hides finished frames from the negative "
                               "branch, so that cfg also draws towards their motion, at no cost: 0 is off, 1 hides "
                               "them wholly, less is weaker. Needs a cfg above 1; causal blocks take 0 or 1. The same "
                               "prompt in both inputs guides by history alone."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels instead of steps and shift; end at 0."),
                StreamType.Input("stream", optional=True, tooltip="Stream Segments: the video on disk while it is "
                                 "made, and runs that can be resumed."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The finished video latent."),
                TimelineType.Output("timeline", display_name="timeline",
                                    tooltip="What every model call did, for AR Timeline."),
                io.String.Output("report", display_name="report", tooltip="The same in a few lines of text."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model, positive, negative, latent_image, stream=None, **widgets) -> io.NodeOutput:
        widgets.setdefault("sigmas", None)
        regime = model_regime(model)
        latent = video_latent(model, latent_image)
        job = make_job(regime, latent["samples"].shape[2], model_shift(model), **widgets)
        acceleration = described(model)
        job.check(acceleration)
        timeline = job.timeline(acceleration)
        outlet = None if stream is None else SegmentStream(stream, cls.hidden)
        latent = sample_segments(model, positive, negative, latent, job, acceleration, timeline, cls.hidden, outlet)
        logging.info(timeline.log_line())
        if outlet is None:
            return io.NodeOutput(latent, timeline, timeline.summary())
        report = f"{timeline.summary()}\n{outlet.finish(latent['samples'])}"
        shown = ui.PreviewVideo(outlet.results) if outlet.results else None
        return io.NodeOutput(latent, timeline, report, ui=shown)


SAMPLER_NODES: list[type[io.ComfyNode]] = [ARVASegmentSampler]
