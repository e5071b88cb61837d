"""Nodes that describe an acceleration: History-Guided Cache, Tri-Modal Scheduler, Residual Correction.

Each returns a clone of the MODEL that carries one more part of a frozen ``Acceleration``. The AR Segment Sampler, or
the wrapper that comes with it for core's samplers, reads it and makes the state of a run; nothing here keeps any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from comfy_api.latest import io

from ..accel.correct import SOURCES, CorrectionConfig
from ..accel.engine import Acceleration, HistoryGuidedConfig, SchedulerConfig
from ..accel.late import WHEN
from ..accel.policy import TriModalConfig
from ..accel.signals import HISTORY_CHOICES, HOST_SIGNALS, SIGNALS
from .host_stock import under_stock_samplers
from .inputs import checked
from .names import CATEGORY, OPTION

ORDERS = {"1": 1, "2": 2, "newton2": "newton2", "auto": "auto"}
GUIDED, SCHEDULED = HistoryGuidedConfig(), SchedulerConfig()
THRESHOLDS = SCHEDULED.thresholds
OUTPUT = "The model with this acceleration described, for an AR Segment Sampler."
EVERYWHERE = "The model with this acceleration described, for an AR Segment Sampler or core's samplers."
ANY_MODEL = "An autoregressive video model; for core's samplers, any flow model."
MAX_SKIP = "Most calls in a row that may be skipped before one is computed."
ORDER = (
    "Of the prediction: a line through the last two velocities (1), the quadratic of SCOPE (2) or of Newton (newton2), "
    "or whichever the history allows (auto)."
)
REACH = "How far ahead a prediction may reach, in distances between the last two computed steps; 0 sets no limit."
DECISION = (
    "exact waits at every step until the change is measured; one step late decides with the change of the step before "
    "and its trend, so the GPU never runs dry, and the report counts the decisions that come out differently. Signals "
    "of the noise levels alone never wait."
)
WARMUP = "First steps of every block of latent frames that are always computed."


def described(model: io.Model.Type) -> Acceleration:
    """The acceleration that the nodes before described, or none."""
    return model.model_options.get("transformer_options", {}).get(OPTION, Acceleration())


def describe(model: io.Model.Type, **parts: object) -> io.Model.Type:
    """A clone of ``model`` with these parts of the acceleration changed."""
    return describe_all(model, replace(described(model), **parts))


def describe_all(model: io.Model.Type, acceleration: Acceleration | None) -> io.Model.Type:
    """A clone of ``model`` with this acceleration in place of any other; None leaves no trace of one."""
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    options.pop(OPTION, None)
    if acceleration is not None:
        options[OPTION] = acceleration
    under_stock_samplers(clone, acceleration)
    return clone


@contextmanager
def inputs_of(node: str, **names: str) -> Iterator[None]:
    """Words what a config refuses with the node's name and its inputs' names."""
    try:
        yield
    except ValueError as error:
        reason = str(error).partition(": ")[2]
        for field, name in names.items():
            reason = reason.replace(field, name)
        raise ValueError(f"{node}: {reason}") from None


class ARVAHistoryGuidedCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVAHistoryGuidedCache",
            display_name="History-Guided Cache",
            category=CATEGORY,
            description="Reuses the last velocity while the history frames that the model is conditioned on change "
            "little (ARCache). Connect the model to an AR Segment Sampler, or to one of core's samplers, where the "
            "whole input is measured.",
            search_aliases=["arcache", "teacache", "easycache", "ar video cache", "speed up video"],
            inputs=[
                io.Model.Input("model", tooltip=ANY_MODEL),
                io.Float.Input("threshold", default=GUIDED.delta, min=0.0, max=10.0, step=0.01, round=0.0001,
                               tooltip="Reuse while the accumulated relative change stays within this; higher is "
                               "faster and less exact, 0 is off."),
                io.Combo.Input("signal", options=list(HISTORY_CHOICES), default=GUIDED.signal, advanced=True,
                               tooltip="What is measured: the modulated input of the history tokens (mod), the first "
                               "block's output at them (block0), or the frames being denoised (current). auto picks by "
                               "model."),
                io.Int.Input("max_skip", default=GUIDED.max_skip, min=1, max=100, advanced=True,
                             tooltip=MAX_SKIP),
                io.Int.Input("warmup", default=GUIDED.warmup, min=1, max=100, advanced=True, tooltip=WARMUP),
                io.Combo.Input("decision", options=list(WHEN), default=GUIDED.decision, advanced=True, optional=True,
                               tooltip=DECISION),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=EVERYWHERE)],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls, model: io.Model.Type, threshold: float, signal: str, max_skip: int, warmup: int,
        decision: str = GUIDED.decision,
    ) -> io.NodeOutput:  # fmt: skip
        with inputs_of("History-Guided Cache", delta="threshold"):
            config = HistoryGuidedConfig(threshold, signal, max_skip, warmup, decision)
        return io.NodeOutput(describe(model, history_guided=config))


class ARVATriModalScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVATriModalScheduler",
            display_name="Tri-Modal Scheduler",
            category=CATEGORY,
            description="Decides at every step whether to reuse the last velocity, to predict the next one from the "
            "stored ones, or to run the model (SCOPE). Connect the model to an AR Segment Sampler, or to one of core's "
            "samplers.",
            search_aliases=["scope", "taylorseer", "predict recompute", "ar video scheduler", "speed up video"],
            inputs=[
                io.Model.Input("model", tooltip=ANY_MODEL),
                io.Float.Input("cache_below", default=THRESHOLDS.tau_cache, min=0.0, max=100.0, step=0.01,
                               round=0.0001, tooltip="Reuse the last velocity while the accumulated change is below "
                               "this; 0 never reuses."),
                io.Float.Input("predict_below", default=THRESHOLDS.tau_predict, min=0.0, max=100.0, step=0.01,
                               round=0.0001, tooltip="Predict the velocity while the accumulated change is below this, "
                               "compute it from there on; higher is faster and less exact, 0 computes every step."),
                io.Combo.Input("signal", options=[*HOST_SIGNALS, *SIGNALS], default=SCHEDULED.signal, advanced=True,
                               tooltip="What is measured; the two thresholds are in its units. log-snr and log-signal "
                               "need the noise levels alone and cost nothing."),
                io.Combo.Input("order", options=list(ORDERS), default=str(SCHEDULED.order), advanced=True,
                               tooltip=ORDER),
                io.Float.Input("decay", default=THRESHOLDS.decay, min=0.01, max=1.0, step=0.01, advanced=True,
                               tooltip="What a prediction leaves of the accumulated change; 1 keeps all of it."),
                io.Int.Input("max_skip", default=THRESHOLDS.max_skip, min=1, max=100, advanced=True,
                             tooltip=MAX_SKIP),
                io.Int.Input("warmup", default=SCHEDULED.warmup, min=1, max=100, advanced=True, tooltip=WARMUP),
                io.Float.Input("reach", default=SCHEDULED.reach, min=0.0, max=100.0, step=0.1, round=0.01,
                               advanced=True, tooltip=REACH),
                io.Combo.Input("decision", options=list(WHEN), default=SCHEDULED.decision, advanced=True, optional=True,
                               tooltip=DECISION),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=EVERYWHERE)],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls, model: io.Model.Type, cache_below: float, predict_below: float, signal: str, order: str, decay: float,
        max_skip: int, warmup: int, reach: float, decision: str = SCHEDULED.decision,
    ) -> io.NodeOutput:  # fmt: skip
        with inputs_of("Tri-Modal Scheduler", tau_cache="cache_below", tau_predict="predict_below"):
            thresholds = TriModalConfig(cache_below, predict_below, decay, max_skip)
            config = SchedulerConfig(
                thresholds, signal, ORDERS[order], warmup=warmup, reach=reach or None, decision=decision
            )
        return io.NodeOutput(describe(model, scheduler=config))


class ARVAResidualCorrection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVAResidualCorrection",
            display_name="Residual Correction",
            category=CATEGORY,
            description="Corrects every reused velocity by how far it should have moved (ARCache). It acts where "
            "History-Guided Cache or Tri-Modal Scheduler reuse; predictions are left alone.",
            search_aliases=["arcache", "erc", "enhanced residual correction"],
            inputs=[
                io.Model.Input("model", tooltip="A model with History-Guided Cache or Tri-Modal Scheduler."),
                io.Combo.Input("source", options=[SOURCES[0], *SOURCES[:0:-1]], default=CorrectionConfig().source,
                               tooltip="How far a reused velocity is moved: in proportion to the noise level "
                               "(sigma_linear), as the first segment moved (seg1_l1, the paper's), or not (hold)."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=EVERYWHERE)],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model: io.Model.Type, source: str) -> io.NodeOutput:
        with inputs_of("Residual Correction"):
            config = CorrectionConfig(source)
        return io.NodeOutput(describe(model, correction=config))


ACCELERATION_NODES: list[type[io.ComfyNode]] = [
    ARVAHistoryGuidedCache,
    ARVATriModalScheduler,
    ARVAResidualCorrection,
]
