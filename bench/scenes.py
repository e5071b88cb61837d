"""What is sampled: the plan of each embedded model, the clips, and one run of a model on a clip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from accel.presets import digest
from accel.sampling import SegmentPlan
from demo.data import Scenes, simulate
from demo.generate import Result, load, sample, sample_causal, start_noise
from demo.model import MODELS, TinyWan
from demo.prompt import embed_scenes

PROMPTS = 4242
CALIBRATION = 0  # the clip that knobs are turned on; not among those measured
CAUSAL = "tiny-causal"
PLANS = {
    "tiny-df": SegmentPlan(frames=76, segment=16, overlap=4, block=4, ar_step=5, steps=50),
    "tiny-next-clip": SegmentPlan(frames=76, segment=16, overlap=4, block=4, steps=50),
    CAUSAL: SegmentPlan(frames=24, segment=4, block=4, steps=50),
}
QUICK_PLANS = {
    "tiny-df": SegmentPlan(frames=12, segment=8, overlap=4, block=4, ar_step=1, steps=12),
    "tiny-next-clip": SegmentPlan(frames=12, segment=8, overlap=4, block=4, steps=12),
    CAUSAL: SegmentPlan(frames=8, segment=4, block=4, steps=12),
}


@lru_cache
def shapes(seed: int) -> Scenes:
    """What the prompt of a clip asks for."""
    return simulate(PROMPTS + seed, 1, 1)


def prompt(seed: int) -> Tensor:
    """The prompt ``[1, 64, 64]`` that goes with a seed."""
    return embed_scenes(shapes(seed))


@lru_cache
def loaded(kind: str) -> TinyWan:
    """The embedded model, read once."""
    return load(kind)


_digest = lru_cache(digest)


@dataclass(frozen=True, slots=True)
class Scene:
    """One model and its plan. A clip is a seed: its start noise, and a prompt of its own.

    A causal model's segments are its blocks; its plan has no overlap, because a K/V store carries the history.
    """

    kind: str
    plan: SegmentPlan

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """New latent frames of each segment."""
        return [(start + prefix, end) for start, end, prefix in self.plan.intervals()]

    @property
    def weights(self) -> str:
        """First letters of the SHA-256 of the checkpoint."""
        return _digest(MODELS / f"{self.kind}.safetensors")

    def run(self, seed: int, prefix: Tensor | None = None, plan: SegmentPlan | None = None, **options: Any) -> Result:
        """One video, from the noise of ``seed``.

        Args:
            prefix: clean latents that the first segment continues. plan: another than the scene's (fewer steps).
            options: ``acceleration`` or ``make_run`` of ``demo.generate.sample`` and ``sample_causal``.
        """
        plan = plan or self.plan
        noise = start_noise(seed, plan.frames)
        if self.kind == CAUSAL:
            noise = noise if prefix is None else noise[:, :, : plan.frames]
            return sample_causal(loaded(self.kind), prompt(seed), noise, steps=plan.steps, prefix=prefix, **options)
        return sample(loaded(self.kind), prompt(seed), noise, plan=plan, prefix=prefix, **options)

    def timed(self) -> Scene:
        """The scene that times are taken on: one segment that continues clean history."""
        frames = 2 * self.plan.segment if self.kind == CAUSAL else self.plan.segment
        return replace(self, plan=replace(self.plan, frames=frames))
