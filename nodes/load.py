"""Load AR Video Model: the files that AR video models are published as, on core's own loader."""

from __future__ import annotations

from comfy_api.latest import io

from ..accel.families import AUTO, CHOICES
from ..accel.wan_keys import FRAME_RATES
from .acceleration import CATEGORY
from .host_load import NODE, WEIGHT_DTYPES, load_model, model_files
from .inputs import checked

RATES = [str(rate) for rate in sorted(FRAME_RATES, reverse=True)]


class ARVALoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = model_files()
        return io.Schema(
            node_id="ARVALoadModel",
            display_name=NODE,
            category=CATEGORY,
            description="Loads an autoregressive video model from the file it was published as: SkyReels-V2 diffusion "
            "forcing, Self-Forcing, Causal-Forcing, CausVid, Krea Realtime, in Wan's or diffusers' layout, whole or in "
            "parts, from training too. found says what the file is; where it cannot tell, it asks.",
            search_aliases=["load skyreels", "self forcing", "causvid", "krea realtime", "causal forcing",
                            "diffusion model loader", "unet loader"],
            inputs=[
                io.Combo.Input("model_name", options=files, default=files[0] if files else None,
                               tooltip="A file of the diffusion_models folder; of a model in several files any one."),
                io.Combo.Input("family", options=list(CHOICES), default=AUTO,
                               tooltip="What the model is. auto finds out where the file says so, and asks where it "
                               "does not: a 14B diffusion forcing model looks like any Wan 14B, a causal one like a "
                               "bidirectional one."),
                io.Combo.Input("fps", options=RATES, default=RATES[0],
                               tooltip="Frames a second, for models that are told them (SkyReels-V2 DF 1.3B): 24, or "
                               "16. Others ignore it."),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", advanced=True,
                               tooltip="Precision the weights are kept in, as in core's loader."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="An ordinary model, for LoRA and every other node."),
                io.String.Output("found", display_name="found",
                                 tooltip="What the file holds, what it was taken for and why, and what to set the AR "
                                 "Segment Sampler to."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model_name: str, family: str, fps: str, weight_dtype: str = "default") -> io.NodeOutput:
        return io.NodeOutput(*load_model(model_name, family, int(fps), weight_dtype))


LOAD_NODES: list[type[io.ComfyNode]] = [ARVALoadModel]
