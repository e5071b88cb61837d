"""Accelerate AR Video: one choice between exact and fast, from settings that were measured, or a quality to hold."""

from __future__ import annotations

from comfy_api.latest import io

from ..accel.presets import EXACT, PRESETS, QUALITIES, TARGET, digest, quality_target, target_report
from .acceleration import CATEGORY, EVERYWHERE, describe_all
from .host import model_regime
from .host_files import embedded_model
from .inputs import checked

NODE = "Accelerate AR Video"


class ARVAAccelerate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVAAccelerate",
            display_name=NODE,
            category=CATEGORY,
            description="Makes an autoregressive video model faster with settings measured for it. Connect the model "
            "to an AR Segment Sampler, or to one of core's samplers; settings says what was set and on what "
            "measurement it rests.",
            search_aliases=["ar video cache", "speed up video", "teacache", "easycache", "faster wan", "preset"],
            inputs=[
                io.Model.Input("model", tooltip="An autoregressive video model. What acceleration nodes before this "
                               "one set is replaced; those after it change a part."),
                io.Combo.Input("quality", options=[*QUALITIES, TARGET], default="balanced",
                               tooltip="exact computes every model call; high, balanced and fast skip more and more of "
                               "them, and the video moves further from the exact one. target skips as many as "
                               "target_db allows, from the errors that the run measures, on any model."),
                io.Float.Input("target_db", default=40.0, min=20.0, max=60.0, step=0.5, round=0.01, optional=True,
                               advanced=True, tooltip="With quality target: how close the video is to be to the exact "
                               "one, PSNR in dB; higher is closer and slower. "
                               "The other qualities ignore it."),
            ],
            outputs=[
                io.Model.Output("accelerated", display_name="model", tooltip=EVERYWHERE),
                io.String.Output("settings", display_name="settings",
                                 tooltip="What was set, and the speed and closeness measured with it, in a few lines."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model: io.Model.Type, quality: str, target_db: float = 40.0) -> io.NodeOutput:
        regime = model_regime(model, NODE)
        if quality == TARGET:
            return io.NodeOutput(describe_all(model, quality_target(target_db)), target_report(target_db, regime))
        name, path = embedded_model(model) or (None, None)
        weights = digest(path) if PRESETS.knows(name) else None
        acceleration = None if quality == EXACT else PRESETS.find(quality, name, regime).acceleration
        return io.NodeOutput(describe_all(model, acceleration), PRESETS.report(quality, name, regime, weights))


ACCELERATE_NODES: list[type[io.ComfyNode]] = [ARVAAccelerate]
