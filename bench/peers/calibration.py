"""What MagCache has to know of a model before it can run, from one full run of it.

The run is of seed 0, which no comparison uses, over one segment of the model's own schedule. The result is kept by a
digest of the weights, in memory and in ``bench/results/calibration/``, and made anew when they change.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from accel.call import Call, Decision
from accel.engine import Denoiser
from accel.sampling import SegmentPlan
from accel.timeline import Timeline
from bench.scenes import prompt
from demo.denoiser import TinyDenoiser
from demo.generate import PLAN, sample, sample_causal, start_noise
from demo.model import TinyWan

from .base import active_frames
from .residual import ResidualRun

FOLDER = Path(__file__).parents[1] / "results" / "calibration"
STEPS = PLAN.steps
SEED = 0


@dataclass(frozen=True, slots=True)
class Calibration:
    """Figures of one model.

    Attributes:
        magnitudes: MagCache's gamma (arXiv 2506.09045) of every local solver step of a chunk: mean over tokens of
            ``|r_i| / |r_{i-1}|``, r the hidden residual of a token; 1 for the first step, which has no step before it.
    """

    magnitudes: tuple[float, ...]

    def magnitude(self, step: int, steps: int) -> float:
        """Gamma of local step ``step`` of ``steps``: the nearest one of the calibrated run."""
        last = len(self.magnitudes) - 1
        return self.magnitudes[round((step - 1) / max(1, steps - 1) * last)]


class FullRun(ResidualRun):
    """Computes every call and writes down how the residual of each local step compares with that of the one before."""

    def __init__(self, denoiser: Denoiser, timeline: Timeline) -> None:
        super().__init__(denoiser, timeline)
        self.ratios: dict[int, list[float]] = {}

    def reset(self, frames: int) -> None:
        super().reset(frames)
        self._before: set[int] = set()

    def decide(self, call: Call, x: Tensor) -> Decision:
        return Decision.RECOMPUTE

    def computed(self, call: Call, residual: Tensor) -> None:
        frames, width = self._before.intersection(active_frames(call)), len(call.active)
        self._before = set(active_frames(call))
        if not frames:
            return
        now, before = (value.unflatten(1, (width, -1)).norm(dim=-1) for value in (residual, self.residual))
        ratio = (now / before).mean((0, 2)).tolist()
        for frame in frames:
            self.ratios.setdefault(call.steps[frame - call.frames[0]], []).append(ratio[frame - call.frames[0]])


def calibrate(model: TinyWan, guidance: float, steps: int) -> Calibration:
    """Runs one full segment and reads the figures off it."""
    runs: list[FullRun] = []

    def make(denoiser: Denoiser, timeline: Timeline) -> FullRun:
        runs.append(FullRun(denoiser, timeline))
        return runs[0]

    if model.config.causal_ar:
        sample_causal(
            model, prompt(SEED), start_noise(SEED, 2 * model.config.block), None, steps, None, guidance, make_run=make
        )
    else:
        ar_step = 0 if model.config.kind == "tiny-next-clip" else max(1, round(PLAN.ar_step * steps / PLAN.steps))
        plan = SegmentPlan(PLAN.segment, PLAN.segment, 0, PLAN.block, ar_step, steps)
        sample(model, prompt(SEED), start_noise(SEED, plan.frames), None, plan, guidance, make_run=make)
    run = runs[0]
    magnitudes = tuple(fmean(run.ratios[step]) if step in run.ratios else 1.0 for step in range(1, steps + 1))
    return Calibration(magnitudes)


def calibration_of(denoiser: TinyDenoiser) -> Calibration:
    """The calibration of a denoiser's model and guidance, from memory, from its file or made now."""
    model = denoiser.model
    return _known(_digest(model), denoiser.guidance, model)


@lru_cache(maxsize=8)
def _known(digest: str, guidance: float, model: TinyWan) -> Calibration:
    path = FOLDER / f"{model.config.kind}-{digest}-cfg-{guidance:g}.json"
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Calibration(tuple(stored["magnitudes"]))
    made = calibrate(model, guidance, STEPS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(made)) + "\n", encoding="utf-8")
    return made


def _digest(model: TinyWan) -> str:
    total = sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().to("cpu", torch.float32).numpy().tobytes())
    return total.hexdigest()[:12]
