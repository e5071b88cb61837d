"""Nodes that describe what causal models keep in memory and read from it: KV Cache Budget, ANN Attention.

Like those of ``acceleration`` they only describe; the AR Segment Sampler reads it.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..accel.attention.ann import AnnConfig
from ..accel.attention.prompt import PromptConfig
from ..accel.kv.budget import KEEPS, NODE, STORAGES, KVBudgetConfig
from .acceleration import CATEGORY, OUTPUT, describe, inputs_of
from .inputs import checked

ANN = "ANN Attention"
SPARSE = AnnConfig()
FRAMES, GIGABYTES = "latent frames", "GB"
DEFAULT = KVBudgetConfig(frames=21)


class ARVAKVCacheBudget(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVAKVCacheBudget",
            display_name=NODE,
            category=CATEGORY,
            description="Keeps the keys and values of a causal model within a fixed budget, so that memory and time "
            "per block stay the same however long the video gets. The size is known before the run and stands in the "
            "report.",
            search_aliases=["kv cache", "long video", "rolling kv", "sliding window", "flowcache", "tempcache"],
            inputs=[
                io.Model.Input("model", tooltip="A causal autoregressive video model."),
                io.Float.Input("budget", default=float(DEFAULT.frames), min=0.01, max=100000.0, step=1.0, round=0.01,
                               tooltip="How much is kept, the block being denoised included. 21 latent frames are what "
                               "Wan's causal models were trained to look back."),
                io.Combo.Input("unit", options=[FRAMES, GIGABYTES], default=FRAMES,
                               tooltip="What the budget counts: latent frames, or gigabytes of all branches together."),
                io.Combo.Input("keep", options=list(KEEPS), default=DEFAULT.keep,
                               tooltip="What is kept between the first and the latest frames: nothing (window), the "
                               "tokens that are looked at and differ (importance-redundancy), one token for what stays "
                               "the same (temporal-merge), or nothing, with more frames for those attention heads that "
                               "look back (head-groups)."),
                io.Int.Input("sink", default=DEFAULT.sink, min=0, max=1000,
                             tooltip="First latent frames of the video that are never dropped; they hold the scene "
                             "together."),
                io.Int.Input("recent", default=DEFAULT.recent, min=0, max=100000, advanced=True,
                             tooltip="Latest latent frames that stay whole where something is kept in between; 0 takes "
                             "half of what sink and block leave."),
                io.Combo.Input("storage", options=list(STORAGES), default=DEFAULT.storage, advanced=True,
                               tooltip="8-bit takes half the memory of 16-bit models and changes the video a little."),
                io.Int.Input("offload", default=DEFAULT.offload, min=0, max=100000, advanced=True,
                             tooltip="Latent frames' worth of tokens between sink and recent frames that are kept in "
                             "main memory, beside the budget; 0 keeps them on the GPU, within it."),
                io.Int.Input("trained_frames", default=DEFAULT.span, min=1, max=100000, advanced=True,
                             tooltip="Latent frames the model was trained with: kept frames never stand further back "
                             "in time than that."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=OUTPUT)],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls, model: io.Model.Type, budget: float, unit: str, keep: str, sink: int, recent: int = 0,
        storage: str = STORAGES[0], offload: int = 0, trained_frames: int = DEFAULT.span,
    ) -> io.NodeOutput:  # fmt: skip
        size = {"frames": int(budget)} if unit == FRAMES else {"gigabytes": budget}
        with inputs_of(NODE, span="trained_frames"):
            if unit == FRAMES and budget != int(budget):
                raise ValueError(f"{NODE}: budget is {budget:g} latent frames; use a whole number.")
            config = KVBudgetConfig(
                **size, sink=sink, keep=keep, recent=recent, storage=storage, offload=offload, span=trained_frames
            )
        return io.NodeOutput(describe(model, kv_budget=config))


class ARVAANNAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVAANNAttention",
            display_name=ANN,
            category=CATEGORY,
            description="Lets a causal model read only the part of a long history that is like what it is making, and "
            "the prompt without its padding. It saves where much history is kept, and is off where that would not pay.",
            search_aliases=["sparse attention", "annsa", "annca", "fast attention", "long video"],
            inputs=[
                io.Model.Input("model", tooltip="A causal autoregressive video model."),
                io.Float.Input("density", default=SPARSE.density, min=0.01, max=1.0, step=0.01, round=0.001,
                               tooltip="Share of the history each query reads, beside the first and the latest frames; "
                               "1 reads all. Above 0.65 it cannot pay."),
                io.Int.Input("shortest", default=0, min=0, max=100000, advanced=True,
                             tooltip="Latent frames of history below which everything is read; 0 takes the length from "
                             "which it pays."),
                io.Int.Input("bits", default=SPARSE.bits, min=1, max=16, advanced=True,
                             tooltip="Random projections by which tokens are found to be alike."),
                io.Combo.Input("groups", options=["head", "all"], default=SPARSE.groups, advanced=True,
                               tooltip="Whether every head selects for itself, or all share one selection."),
                io.Boolean.Input("collapse_prompt", default=True, advanced=True,
                                 tooltip="Read the prompt's padding as one token that weighs as much; exact."),
                io.Float.Input("prompt_share", default=1.0, min=0.01, max=1.0, step=0.01, round=0.001, advanced=True,
                               tooltip="Share of the prompt's words a block reads in each layer, those it looks at "
                               "most; 1 reads all."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=OUTPUT)],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls, model: io.Model.Type, density: float, shortest: int = 0, bits: int = SPARSE.bits,
        groups: str = SPARSE.groups, collapse_prompt: bool = True, prompt_share: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        with inputs_of(ANN, keep="prompt_share", collapse="collapse_prompt"):
            ann = AnnConfig(density, bits, shortest=shortest or None, groups=groups)
            prompt = PromptConfig(collapse_prompt, prompt_share)
        return io.NodeOutput(describe(model, ann=ann, prompt=prompt))


MEMORY_NODES: list[type[io.ComfyNode]] = [ARVAKVCacheBudget, ARVAANNAttention]
