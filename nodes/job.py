"""What one run of the AR Segment Sampler has to do, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from ..accel.engine import Acceleration, Run
from ..accel.history_guidance import check_strength
from ..accel.sampling import Progress, Segment, SegmentPlan, causal_blocks, diffusion_forcing, next_clip
from ..accel.schedule import flow_sigmas, noise_table
from ..accel.timeline import Timeline
from ..accel.timeline_report import HISTORY_GUIDANCE

NODE = "AR Segment Sampler"
FORCING, CLIP, CAUSAL = "diffusion forcing", "next clip", "causal blocks"
MODES = ("auto", FORCING, CLIP, CAUSAL)
SOLVERS = ("auto", "euler", "unipc", "re-noise")
PARTS = {
    "history_guided": "History-Guided Cache",
    "scheduler": "Tri-Modal Scheduler",
    "correction": "Residual Correction",
    "suffix_window": "Active Frame Window",
    "frozen_window": "Active Frame Window",
    "shared_prefix": "Shared Prefix Cache",
    "chunks": "Chunk Cache",
    "kv_budget": "KV Cache Budget",
    "ann": "ANN Attention",
    "prompt": "ANN Attention",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One run with nothing left to choose.

    Attributes:
        mode: ``diffusion forcing``, ``next clip`` or ``causal blocks``. solver: ``euler``, ``unipc`` or ``re-noise``.
        plan: how the video is cut; for causal blocks one segment, of which only frames and steps count.
        block: latent frames denoised together.
        table: steps + 1 noise levels, float64 on the host.
        history_guidance: noise level that hides the history from the negative branch, 0 for none.
    """

    mode: str
    solver: str
    plan: SegmentPlan
    block: int
    table: Tensor
    cfg: float
    seed: int
    history_noise: float
    history_guidance: float = 0.0

    def calls(self, given: int = 0) -> int:
        """Guided model calls, commits included, after ``given`` clean latent frames at the start (causal blocks)."""
        if self.mode != CAUSAL:
            return self.plan.calls()
        return -(-(self.plan.frames - given) // self.block) * (self.plan.steps + 1)

    def check(self, acceleration: Acceleration) -> None:
        """Raises ValueError for an acceleration that could do nothing here."""
        signal = acceleration.scheduler.signal if acceleration.scheduler else ""
        if self.mode == CAUSAL and signal.startswith("history"):
            raise ValueError(
                f"{PARTS['scheduler']}: signal is {signal}, but causal blocks take history from the K/V store, which "
                "never changes; use log-snr, current or latent."
            )
        for part in ("kv_budget", "ann"):
            if self.mode != CAUSAL and getattr(acceleration, part) is not None:
                raise ValueError(
                    f"{PARTS[part]}: mode is {self.mode}, which keeps no K/V from segment to segment; use a causal "
                    "model, or remove the node (Active Frame Window keeps K/V within a segment)."
                )

    def own_store(self, acceleration: Acceleration) -> bool:
        """Whether causal blocks need our K/V store: core's keeps everything, and one branch."""
        asked = (acceleration.kv_budget, acceleration.ann, acceleration.prompt)
        return self.mode == CAUSAL and (self.cfg != 1.0 or any(part is not None for part in asked))

    def segments(
        self, run: Run, noise: Tensor, progress: Progress, prefix: Tensor | None, finished: Sequence[Tensor] = ()
    ) -> Iterator[Segment]:
        """Runs it: finished segments as they come. ``prefix`` is a clean start of the video, for causal blocks;
        ``finished`` are the latents of segments made before."""
        if self.mode == CAUSAL:
            seed = self.seed if self.solver == "re-noise" else None
            return causal_blocks(run, noise, self.block, self.table, seed, prefix, progress, finished)
        loop = next_clip if self.mode == CLIP else diffusion_forcing
        options = {"solver": self.solver, "history_noise": self.history_noise, "progress": progress}
        options["finished"] = finished
        return loop(run, noise, self.plan, self.table, **options)

    def timeline(self, acceleration: Acceleration) -> Timeline:
        """An empty timeline that says what was asked for."""
        cut = {} if self.mode == CAUSAL else {key: getattr(self.plan, key) for key in ("segment", "overlap", "ar_step")}
        schedule = {"mode": self.mode, "latent frames": self.plan.frames, "block": self.block, **cut}
        schedule |= {"steps": self.plan.steps, "solver": self.solver, "cfg": self.cfg, "seed": self.seed}
        schedule["sigmas"] = [round(level, 4) for level in self.table.tolist()]
        settings = told_settings(acceleration)
        if acceleration.suffix_window:
            idle = "; causal blocks run one after the other, so there is nothing to leave out" * (self.mode == CAUSAL)
            settings[PARTS["suffix_window"]] = "suffix" + idle
        if self.history_guidance:
            idle = self.mode != CAUSAL and not any(prefix for *_, prefix in self.plan.intervals())
            settings[HISTORY_GUIDANCE] = (
                f"{self.history_guidance:g}" + idle * "; no segment continues another here, so it changes nothing"
            )
        return Timeline(
            rows=-(-self.plan.frames // self.block), row_unit="chunk", frames_per_row=self.block,
            title=f"{self.mode.capitalize()}, {self.plan.frames} latent frames", schedule=schedule, settings=settings,
        )  # fmt: skip


def told_settings(acceleration: Acceleration) -> dict[str, object]:
    """What an acceleration sets, by the node that sets it, for a timeline."""
    return {PARTS[key]: value for key, value in asdict(acceleration).items() if value and key in PARTS}


def make_job(
    regime: str, frames: int, model_shift: float, *, mode: str, steps: int, cfg: float, seed: int, segment: int,
    overlap: int, block: int, ar_step: int, solver: str, shift: float, history_noise: float, sigmas: Tensor | None,
    history_guidance: float = 0.0,
) -> Job:  # fmt: skip
    """Checks the widgets of the sampler against the model and the latent.

    Args:
        regime: ``causal`` for a model with a K/V store, else ``frames``. frames: latent frames of the video.
        model_shift: the model's own flow shift. The rest are the inputs of the node.

    Raises:
        ValueError: one sentence with the node, the value and the remedy.
    """
    mode = mode if mode != "auto" else CAUSAL if regime == "causal" else FORCING
    causal = mode == CAUSAL
    solver = solver if solver != "auto" else "re-noise" if causal else "euler"
    if causal and regime != "causal":
        _refuse(
            "mode is causal blocks, which this model cannot do: it has no K/V store; use diffusion forcing or auto, or "
            "load it with Load AR Video Model if it was trained to be causal"
        )
    if causal and solver == "unipc":
        _refuse("solver is unipc, which keeps a history that causal blocks do not have; use euler, re-noise or auto")
    if not causal and solver == "re-noise":
        _refuse(f"solver is re-noise, which {mode} does not have; use euler, unipc or auto")
    if causal and history_noise:
        _refuse(f"history_noise is {history_noise:g}, but causal blocks keep clean history in the K/V store; use 0")
    if not 0.0 <= history_noise < 1.0:
        _refuse(f"history_noise is {history_noise:g}; use a noise level from 0 to below 1")
    if block < 1:
        _refuse(f"block is {block}; use 1 or more latent frames")
    try:
        check_strength(history_guidance, 1 if cfg == 1.0 else 2, causal)
        table = flow_sigmas(steps, shift or model_shift) if sigmas is None else noise_table(sigmas)
        steps = table.numel() - 1
        if causal:
            plan = SegmentPlan(frames, frames, steps=steps)
        else:
            plan = SegmentPlan(frames, segment, overlap, block, 0 if mode == CLIP else ar_step, steps)
        plan.calls()
    except ValueError as error:
        raise ValueError(f"{NODE}: {str(error)[0].lower()}{str(error)[1:]}") from None
    return Job(mode, solver, plan, block, table, cfg, seed, history_noise, history_guidance)


def _refuse(reason: str) -> None:
    raise ValueError(f"{NODE}: {reason}.")
