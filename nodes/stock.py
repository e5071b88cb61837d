"""What core's samplers do between two model calls, which decides what may be reused under them.

A sampler that adds noise along the way leaves the trajectory that stored velocities belong to: the fresh noise would
come back as signal. There only x0 may be held, which equals one longer step, and nothing is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..accel.acceleration import Acceleration
from ..accel.call import Family
from ..accel.history import SAME_SIGMA
from ..accel.signals import HOST_SIGNALS
from .job import PARTS

STRAIGHT = ("euler", "euler_cfg_pp", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2", "dpm_fast")
MULTISTEP = (
    "lms", "dpmpp_2m", "dpmpp_2m_cfg_pp", "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp",
    "gradient_estimation", "gradient_estimation_cfg_pp", "uni_pc", "uni_pc_bh2",
)  # fmt: skip
NOISY = (
    "euler_ancestral", "euler_ancestral_cfg_pp", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu",
    "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp",
    "er_sde", "seeds_2", "seeds_3", "exp_heun_2_x0_sde", "sa_solver", "sa_solver_pece", "ar_video",
)  # fmt: skip
ADAPTIVE = "dpm_adaptive"
RENAMED = {"unipc": "uni_pc", "unipc_bh2": "uni_pc_bh2"}
CAUSAL = "ar_video"
ELSEWHERE = ("suffix_window", "frozen_window", "shared_prefix", "chunks", "kv_budget", "ann", "prompt")
"""Parts of an ``Acceleration`` that need our own loop."""


@dataclass(frozen=True, slots=True)
class SamplerKind:
    """A sampler as the engine needs to know it.

    Attributes:
        name: as core lists it, or the function's. family: what may be reused. note: for the report; None where there is
            nothing to say.
    """

    name: str
    family: Family
    note: str | None = None


def sampler_kind(function: str, options: Mapping[str, Any]) -> SamplerKind:
    """The kind of a sampler.

    Args:
        function: name of the function that core's sampler object runs. options: what it is run with.

    Raises:
        ValueError: one whose steps follow from differences of model outputs, which held outputs would fake.
    """
    name = function.removeprefix("sample_").removesuffix("_function")
    name = RENAMED.get(name, name)
    if name == ADAPTIVE:
        raise ValueError(
            f"sampler is {ADAPTIVE}, which sets its steps by how model outputs differ, and held outputs do not; use "
            "another sampler, or remove the node."
        )
    steady = name in NOISY and name != CAUSAL and 0.0 in (options.get("eta"), options.get("s_noise"))
    if (name in STRAIGHT and not options.get("s_churn")) or steady:
        return SamplerKind(name, Family.ODE)
    if name in MULTISTEP:
        return SamplerKind(name, Family.MULTISTEP)
    if name in NOISY or name in STRAIGHT:
        return SamplerKind(
            name, Family.RENOISE, f"{name} adds noise along the way, so x0 is held and nothing is predicted"
        )
    return SamplerKind(
        name, Family.RENOISE, f"{name} is not a sampler this pack knows, so x0 is held and nothing is predicted"
    )


def check_parts(acceleration: Acceleration, sampler: str) -> None:
    """Raises ValueError for what acts under our own sampler only."""
    for part in ELSEWHERE:
        if getattr(acceleration, part):
            raise ValueError(
                f"{PARTS[part]}: acts in AR Segment Sampler only, and this model goes to {sampler}; connect it to an "
                "AR Segment Sampler, or remove the node."
            )


def first_node(acceleration: Acceleration) -> str:
    """Display name of a node that set something."""
    return next((name for part, name in PARTS.items() if getattr(acceleration, part)), "AR Video Accelerator")


def steps_taken(sigma: float, table: Sequence[float]) -> int:
    """Which step of the schedule ``table`` (its levels, the last one included) a call at ``sigma`` belongs to, from 1;
    calls between two levels belong to the step that passes them."""
    return max(1, sum(level >= sigma - SAME_SIGMA for level in table[:-1]))


def with_signals(acceleration: Acceleration, network: str | None) -> tuple[Acceleration, str | None]:
    """The acceleration with signals that can be measured, and a sentence where they are other ones.

    Args:
        network: class of a model whose inside is not known here; None for a Wan model, which shows all of it.
    """
    scheduler, guided = acceleration.scheduler, acceleration.history_guided
    if network is None:
        return acceleration, None
    replaced = []
    if scheduler is not None and scheduler.quality is None and scheduler.signal not in (*HOST_SIGNALS, "latent"):
        replaced.append(f"{PARTS['scheduler']}'s {scheduler.signal}")
        acceleration = replace(acceleration, scheduler=replace(scheduler, signal="latent"))
    if guided is not None:
        replaced.append(f"{PARTS['history_guided']}'s {guided.signal}")
    if not replaced:
        return acceleration, None
    return acceleration, (
        f"{' and '.join(replaced)} cannot be read from {network}, so the change of the latents is measured, which "
        "needs thresholds of its own"
    )
