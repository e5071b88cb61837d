"""TaylorSeer (arXiv 2503.06923): between computed calls, features follow their backward differences over step indices.

    F_j = (F_{j-1} now - F_{j-1} at the computed call before) / steps between;   after k steps: sum F_j k^j / j!

Two forms. ``lite`` forecasts the model's output alone; guidance is linear, so the guided velocity is one feature. ``per
layer`` forecasts the output of every attention and feed-forward module before its gate, as published, and runs patch
embedding, modulation, gates and head at every call; its memory is (order + 1) x modules x tokens.

Reading: the step index of a latent frame is the local solver step of its chunk. Every ``interval``-th call and the
first solver step of each chunk (published: 1 to 3) are computed; until a chunk has two computed steps its value is
held. Order 1, as published for video.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from accel.call import Call, Decision
from accel.engine import Denoiser
from accel.timeline import Timeline

from .base import MakeRun, Peer
from .differences import Differences
from .interval import IntervalRun
from .parts import blocks_flops, close_forward, ends_flops, open_forward, run_blocks, text_flops

ORDER = 1


class TaylorSeerRun(IntervalRun):
    """Forecasts the guided velocity with differences up to ``order``."""

    title = "TaylorSeer-lite"
    depth = 0
    skip = Decision.PREDICT

    def __init__(self, denoiser: Denoiser, timeline: Timeline, interval: int, order: int = ORDER) -> None:
        super().__init__(denoiser, timeline, interval)
        self.order = order
        self.reset(0)

    def reset(self, frames: int) -> None:
        self.features: dict[object, Differences] = {}

    def answer(self, call: Call, x: Tensor, decision: Decision) -> Tensor:
        if decision is Decision.RECOMPUTE:
            velocity = self.compute(call, x)
            self.keep("velocity", velocity, call, axis=2)
            return velocity
        self.told["order"] = self.order
        return self.features["velocity"].at(call.steps)

    def keep(self, name: object, value: Tensor, call: Call, axis: int) -> None:
        """A true value of a feature enters its differences."""
        self.features.setdefault(name, Differences(self.order, axis)).push(value, call.steps, call.active)

    @property
    def state_bytes(self) -> int:
        return sum(feature.nbytes for feature in self.features.values())


class LayerTaylorSeerRun(TaylorSeerRun):
    """Forecasts every module's output ``[branches * B, N, D]``; a forecast call is PREDICT, its embeddings and head
    counted."""

    title = "TaylorSeer per layer"

    def answer(self, call: Call, x: Tensor, decision: Decision) -> Tensor:
        frames, layers = x.shape[2], self.denoiser.shape.layers
        opened = open_forward(self.denoiser, call, x)
        self.spent += ends_flops(self.denoiser, frames)

        def computed(layer: int, module: str, run: Callable[[], Tensor]) -> Tensor:
            value = run()
            self.keep((layer, module), value.unflatten(1, (frames, -1)), call, axis=1)
            return value

        def forecast(layer: int, module: str, run: Callable[[], Tensor]) -> Tensor:
            return self.features[layer, module].at(call.steps).flatten(1, 2)

        if decision is Decision.RECOMPUTE:
            self.spent += blocks_flops(self.denoiser, call, frames, layers) + text_flops(self.denoiser, frames)
        else:
            self.told["order"] = self.order
        provide = computed if decision is Decision.RECOMPUTE else forecast
        return close_forward(opened, run_blocks(opened, opened.tokens, range(layers), provide))


def make_lite(interval: int) -> MakeRun:
    """TaylorSeer of the model's output with this interval."""
    return lambda denoiser, timeline: TaylorSeerRun(denoiser, timeline, interval)


def make_per_layer(interval: int) -> MakeRun:
    """TaylorSeer of every module's output with this interval."""
    return lambda denoiser, timeline: LayerTaylorSeerRun(denoiser, timeline, interval)


LITE = Peer(
    name="TaylorSeer-lite",
    source="arXiv 2503.06923",
    settings=(2, 3, 4, 5, 6),
    make=make_lite,
    note="output only, order 1, first solver step of each chunk computed, where the interval starts again",
)
PER_LAYER = Peer(
    name="TaylorSeer per layer",
    source="arXiv 2503.06923",
    settings=(2, 3, 4, 5, 6),
    make=make_per_layer,
    note="every attention and feed-forward output; otherwise as TaylorSeer-lite",
)
