"""Nodes that describe which latent frames a forward computes: Active Frame Window, Shared Prefix Cache, Chunk Cache.

Like those of ``acceleration`` they only describe; the AR Segment Sampler reads it.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..accel.chunks import CHUNK_SIGNALS, ChunkConfig
from ..accel.kv.frozen import FrozenConfig
from ..accel.policy import TriModalConfig
from .acceleration import CATEGORY, MAX_SKIP, ORDER, ORDERS, OUTPUT, REACH, WARMUP, describe, inputs_of
from .inputs import SHORT, checked

FROZEN = "frozen K/V"
CHUNKED = ChunkConfig()
REFRESH = 1.0
RENEWALS = ("log-signal", "log-snr", "history")
REFRESH_TIP = (
    "Compute the whole window again when the change since the last time is above this; lower is slower and closer to "
    "the exact video, 0 never does."
)
RENEWAL_TIP = (
    "What that change is: of the noise levels (log-signal, log-snr; free), or of the history tokens (history, costs a "
    "part of a forward)."
)


class ARVAActiveFrameWindow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVAActiveFrameWindow",
            display_name="Active Frame Window",
            category=CATEGORY,
            description="Runs the model on the latent frames that are being denoised only; finished and waiting ones "
            "answer with kept keys and values, or are left out (SCOPE). It saves where the blocks of a segment start "
            "one after the other (ar_step above 0).",
            search_aliases=["scope", "active frames", "skip idle frames", "frozen kv", "kv cache"],
            inputs=[
                io.Model.Input("model", tooltip="An autoregressive video model."),
                io.Combo.Input("mode", options=[FROZEN, "suffix"], default=FROZEN,
                               tooltip="frozen K/V keeps the keys and values of idle frames, which takes memory; "
                               "suffix leaves out the frames after the last one that has started, which changes more."),
                io.Float.Input("refresh", default=REFRESH, min=0.0, max=1000.0, step=0.1, round=0.001, advanced=True,
                               optional=True, tooltip=f"frozen K/V: {REFRESH_TIP[0].lower()}{REFRESH_TIP[1:]}"),
                io.Combo.Input("signal", options=list(RENEWALS), default=RENEWALS[0], advanced=True, optional=True,
                               tooltip=RENEWAL_TIP),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=OUTPUT)],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model: io.Model.Type, mode: str, refresh: float = REFRESH, signal: str = RENEWALS[0]):
        if mode == "suffix":
            return io.NodeOutput(describe(model, suffix_window=True, frozen_window=None))
        with inputs_of("Active Frame Window"):
            config = FrozenConfig(refresh, signal)
        return io.NodeOutput(describe(model, suffix_window=False, frozen_window=config))


class ARVASharedPrefixCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVASharedPrefixCache",
            display_name="Shared Prefix Cache",
            category=CATEGORY,
            description="Computes the history frames of a segment once and serves all its steps from their keys and "
            "values (Ca2-VDM). Exact for causal attention; elsewhere they are computed again when the frames have "
            "changed enough.",
            search_aliases=["ca2-vdm", "prefix kv", "history cache", "kv cache"],
            inputs=[
                io.Model.Input("model", tooltip="An autoregressive video model."),
                io.Float.Input("refresh", default=REFRESH, min=0.0, max=1000.0, step=0.1, round=0.001,
                               tooltip=REFRESH_TIP),
                io.Combo.Input("signal", options=list(RENEWALS), default=RENEWALS[0], advanced=True,
                               tooltip=RENEWAL_TIP),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=OUTPUT)],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model: io.Model.Type, refresh: float, signal: str) -> io.NodeOutput:
        with inputs_of("Shared Prefix Cache"):
            config = FrozenConfig(refresh, signal)
        return io.NodeOutput(describe(model, shared_prefix=config))


class ARVAChunkCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVAChunkCache",
            display_name="Chunk Cache",
            category=CATEGORY,
            description="Decides for every block of latent frames on its own whether to reuse, predict or compute it, "
            "and runs the model on the blocks to compute only (FlowCache). Takes the place of Tri-Modal Scheduler and "
            "History-Guided Cache.",
            search_aliases=["flowcache", "per chunk cache", "teacache", "chunkwise"],
            inputs=[
                io.Model.Input("model", tooltip="An autoregressive video model."),
                io.Float.Input("cache_below", default=CHUNKED.thresholds.tau_cache, min=0.0, max=1000.0, step=0.01,
                               round=0.0001, tooltip="Reuse a block's last velocity while its accumulated change is "
                               "below this; 0 never reuses. FlowCache sets both thresholds to the same number."),
                io.Float.Input("predict_below", default=CHUNKED.thresholds.tau_predict, min=0.0, max=1000.0, step=0.01,
                               round=0.0001, tooltip="Predict a block's velocity while its accumulated change is below "
                               "this, compute it from there on; 0 computes every step."),
                io.Combo.Input("signal", options=list(CHUNK_SIGNALS), default=CHUNKED.signal, advanced=True,
                               tooltip="What is measured; the thresholds are in its units. log-signal, log-snr and "
                               "timestep need the noise levels alone: the decisions are made before the first step."),
                io.String.Input("coefficients", default="1, 0", advanced=True,
                                tooltip="Polynomial that rescales a change before it is added, highest power first, as "
                                "TeaCache and FlowCache publish them; 1, 0 leaves it as it is."),
                io.Combo.Input("order", options=list(ORDERS), default=str(CHUNKED.order), advanced=True,
                               tooltip=ORDER),
                io.Int.Input("max_skip", default=CHUNKED.thresholds.max_skip, min=0, max=100, advanced=True,
                             tooltip=f"{MAX_SKIP} 0 sets no limit, as FlowCache has none."),
                io.Int.Input("warmup", default=CHUNKED.warmup, min=1, max=100, advanced=True, tooltip=WARMUP),
                io.Float.Input("reach", default=CHUNKED.reach, min=0.0, max=100.0, step=0.1, round=0.01, advanced=True,
                               tooltip=REACH),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=OUTPUT)],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, coefficients: str = "1, 0") -> bool | str:
        try:
            numbers(coefficients)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(
        cls, model: io.Model.Type, cache_below: float, predict_below: float, signal: str, coefficients: str, order: str,
        max_skip: int, warmup: int, reach: float,
    ) -> io.NodeOutput:  # fmt: skip
        with inputs_of("Chunk Cache", tau_cache="cache_below", tau_predict="predict_below"):
            thresholds = TriModalConfig(cache_below, predict_below, decay=1.0, max_skip=max_skip or None)
            config = ChunkConfig(
                thresholds, signal, numbers(coefficients), ORDERS[order], reach=reach or None, warmup=warmup
            )
            return io.NodeOutput(describe(model, chunks=config))


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated list."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"Chunk Cache: coefficients are {SHORT.repr(text)}; give numbers with commas between them, such as 1, 0."
        ) from None


WINDOW_NODES: list[type[io.ComfyNode]] = [ARVAActiveFrameWindow, ARVASharedPrefixCache, ARVAChunkCache]
