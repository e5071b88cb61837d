"""Acceleration under core's own samplers: KSampler, SamplerCustomAdvanced with any guider, SamplerARVideo.

The nodes leave one wrapper on the MODEL. When sampling starts it puts the state of the run (``StockRun``) and two more
wrappers into the guider's options, which core makes for that run and throws away after it. Held is what core's
``calc_cond_batch`` gives, a velocity per CFG branch, so guiders, guidance functions and CFG++ samplers go on working on
it.
"""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_sampling
import comfy.samplers
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..accel.acceleration import Acceleration
from .host_live import Audience, running_prompt
from .host_neighbours import check_other_caches
from .host_runs import remember
from .host_stock_run import StockRun
from .names import OPTION
from .stock import SamplerKind, check_parts, first_node, sampler_kind

KEY = "arva"


def under_stock_samplers(model: Any, acceleration: Acceleration | None) -> None:
    """Has core's samplers follow the acceleration that ``model``, a clone of its own, carries; None has them not."""
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    if acceleration is not None:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)


def outer_sample(executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs):
    """Core's OUTER_SAMPLE wrapper: one run from its start to its end, however it ends.

    Raises:
        ValueError: before sampling, what cannot be accelerated, in a sentence that names node, value and remedy.
    """
    guider = executor.class_obj
    options = guider.model_options
    acceleration = options.get("transformer_options", {}).get(OPTION)
    if acceleration is None or getattr(sampler, "drives_acceleration", False) or sigmas.numel() < 2:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    node = first_node(acceleration)
    kind = _kind(node, sampler)
    check_parts(acceleration, kind.name)
    check_other_caches(node, options)
    _check_flow(node, guider.model_patcher)
    run = StockRun(acceleration, kind, sigmas.tolist(), noise.shape, sampler.extra_options, guider)
    graph, extra = running_prompt()
    run.audience = audience = Audience(run.timeline, graph, extra)
    add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, run.predict_noise, options, is_model_options=True)
    add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, run.calc_cond_batch, options, is_model_options=True)
    try:
        out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        run.finish()
        audience.tell(done=True)
        remember(out, graph, audience.node, run.timeline)
        logging.info(run.timeline.log_line())
        return out
    finally:
        for place in (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH):
            options["transformer_options"]["wrappers"].get(place, {}).pop(KEY, None)
        run.drop()


def _kind(node: str, sampler: Any) -> SamplerKind:
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise ValueError(
            f"{node}: sampler is {type(sampler).__name__}, which this pack knows nothing of; use one of KSampler's, or "
            "AR Segment Sampler, or remove the node."
        )
    try:
        function = sampler.sampler_function
        return sampler_kind(getattr(function, "__name__", type(function).__name__), sampler.extra_options)
    except ValueError as error:
        raise ValueError(f"{node}: {error}") from None


def _check_flow(node: str, patcher: Any) -> None:
    sampling = patcher.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        kinds = " and ".join(kind.__name__ for kind in type(sampling).__bases__)
        raise ValueError(
            f"{node}: model is {type(patcher.model).__name__}, sampled with {kinds}; velocities can be held and "
            "predicted on flow models only, so remove the node, or use a flow model such as Wan, HunyuanVideo or LTXV."
        )
