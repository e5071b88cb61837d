"""ComfyUI's guided Wan models as the ``Denoiser`` that ``accel`` accelerates.

A noise level per latent frame reaches the model through its ``model_sampling``: outside of it core sees one level per
batch entry, as its conditioning, hooks and wrappers expect.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import comfy.ldm.common_dit
import comfy.model_management
import comfy.patcher_extension
import torch
from comfy.ldm.wan.model import repeat_e, sinusoidal_embedding_1d
from torch import Tensor

from ..accel.call import Call, Kind
from ..accel.flops import WanShape
from ..accel.history_guidance import HiddenHistory
from ..accel.kv.frozen import frozen_bytes
from ..accel.readback import on_device
from .host_attention import ATTENTION, KeptAttention
from .prompts import at_segment

APPLY = comfy.patcher_extension.WrappersMP.APPLY_MODEL
UNCONDITIONAL = 1  # what core's list of the branches in a batch calls the negative one
KEEP_SHARE = 0.8  # of the free memory that kept K/V may take


def per_frame_sampling(sampling: torch.nn.Module) -> torch.nn.Module:
    """A copy of a flow model's ``model_sampling`` that can give every latent frame a noise level of its own.

    Its ``levels`` ``[T]`` (or ``[1]``, shared; or ``[B, T]``, one row a batch entry) hold for the call being made; None
    is the original.
    """

    class PerFrame(type(sampling)):
        levels: Tensor | None = None

        def timestep(self, sigma: Tensor) -> Tensor:
            if self.levels is None:
                return super().timestep(sigma)
            return super().timestep(torch.atleast_2d(self.levels)).expand(sigma.shape[0], -1)

        def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
            if self.levels is None:
                return super().calculate_denoised(sigma, model_output, model_input)
            return model_input - model_output * over_frames(self.levels)

    patched = copy.deepcopy(sampling)
    patched.__class__ = PerFrame
    return patched


def over_frames(levels: Tensor) -> Tensor:
    """``[T]`` or ``[B, T]`` shaped to act on latents ``[B, C, T, H, W]``."""
    return torch.atleast_2d(levels)[:, None, :, None, None]


def velocity_of(x: Tensor, denoised: Tensor, levels: Tensor) -> Tensor:
    """v = (x - x0) / sigma; 0 in clean frames, whose velocity nobody asks for."""
    sigma = over_frames(levels)
    return torch.where(sigma > 0, (x - denoised) / sigma.clamp_min(1e-12), 0.0)


class HostDenoiser:
    """Diffusion forcing and next clip: core's ``WanModel``, clean history in the window.

    Args:
        guider: core's guider while it samples. extra_args: model options and seed, as core hands them to samplers.
        x: latents ``[B, C, T, H, W]`` of the whole video, for sizes. shares_time: one noise level for the whole window.
        history_guidance: noise level that hides the history from the negative branch (``accel.history_guidance``).
    """

    recomputes_history = True

    def __init__(
        self, guider: Any, extra_args: dict[str, Any], x: Tensor, shares_time: bool = False,
        history_guidance: float = 0.0,
    ) -> None:  # fmt: skip
        self.guider, self.extra_args, self.shares_time = guider, extra_args, shares_time
        self._prompts, self._segment = guider.conds, -1
        self.model = guider.inner_model
        self.network = self.model.diffusion_model
        options = extra_args["model_options"]
        self.transformer_options = options.setdefault("transformer_options", {})
        self.branches = 1 if guider.cfg == 1.0 and not options.get("disable_cfg1_optimization", False) else 2
        self.batch = x.shape[0]
        self.shape = _shape(self.network, self._context(1).shape[1])
        self.tokens = self.shape.tokens_per_frame(x.shape[3], x.shape[4])
        self._kept: KeptAttention | None = None
        self._hidden = HiddenHistory(history_guidance, shares_time) if history_guidance else None
        if history_guidance and self._shows_parts():
            raise ValueError(
                "AR Segment Sampler: history_guidance cannot serve conditioning that covers a part of the picture "
                "only; remove the conditioning area, or set history_guidance to 0."
            )

    def show_prompt(self, segment: int) -> None:
        """Gives the guider the prompts of a segment; see ``prompts.at_segment``."""
        if segment == self._segment:
            return
        shown = {name: at_segment(entries, segment) for name, entries in self._prompts.items()}
        told = [id(entry) for entries in shown.values() for entry in entries]
        if self._segment >= 0 and told != [id(entry) for entries in self.guider.conds.values() for entry in entries]:
            self.forget_prompt()
        self.guider.conds, self._segment = shown, segment

    def forget_prompt(self) -> None:
        """The prompt changes: drops what was computed from it."""

    def velocity(self, call: Call, x: Tensor) -> Tensor:
        self.show_prompt(call.segment)
        sampling, levels = self.model.model_sampling, self._levels(call, x)
        first, last = call.queries or call.frames
        asked = slice(first - call.frames[0], last - call.frames[0])
        before = {key: self.transformer_options.get(key) for key in ("rope_options", ATTENTION, "wrappers")}
        hidden = None if self._hidden is None else self._blind(call, x, levels, asked)
        x, levels = x[:, :, asked], levels if self.shares_time else levels[asked]
        try:
            sampling.levels = levels
            if first:
                rope = before["rope_options"] or {}
                self.transformer_options["rope_options"] = rope | {"shift_t": rope.get("shift_t", 0.0) + first}
            if call.queries is not None:
                self.transformer_options[ATTENTION] = self._kept.attention(call, before[ATTENTION])
            if hidden is not None:
                others = before["wrappers"] or {}
                apply = others.get(APPLY, {}) | {"arva_history_guidance": [hidden]}
                self.transformer_options["wrappers"] = others | {APPLY: apply}
            denoised = self.guider(x, levels.max().expand(self.batch), **self.extra_args)
        finally:
            sampling.levels = None
            for key, value in before.items():
                if value is None:
                    self.transformer_options.pop(key, None)
                else:
                    self.transformer_options[key] = value
        return velocity_of(x, denoised, levels)

    def _blind(self, call: Call, x: Tensor, levels: Tensor, asked: slice) -> Callable:
        """Wrapper of core's ``apply_model`` that shows the negative branch, wherever it is in the batch, the ``asked``
        frames of a window without its history."""
        sampling, told = self.model.model_sampling, levels.expand(len(x), x.shape[2])
        latents, blind = self._hidden(call, x, told)
        latents, blind, told = latents[:, :, asked], blind[:, asked], told[:, asked]

        def wrapper(executor: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            given = [*args, *kwargs.values()]
            options = next(one for one in given if isinstance(one, dict) and "cond_or_uncond" in one)
            branches, before = options["cond_or_uncond"], sampling.levels
            parts = zip(x.chunk(len(branches)), branches, strict=True)
            x = torch.cat([latents.to(part) if branch == UNCONDITIONAL else part for part, branch in parts])
            if not self.shares_time:
                sampling.levels = torch.cat([blind if branch == UNCONDITIONAL else told for branch in branches])
            try:
                return executor(x, *args, **kwargs)
            finally:
                sampling.levels = before

        return wrapper

    def keep(self, frames: int) -> str | None:
        self._check_areas()
        dtype, branches = self.model.get_dtype_inference(), self.branches * self.batch
        needed = frozen_bytes(self.shape.layers, frames * self.tokens, self.shape.dim, branches, dtype.itemsize)
        free = comfy.model_management.get_free_memory(comfy.model_management.get_torch_device())
        self._kept = KeptAttention(self.shape.layers, frames, self.tokens)
        if needed > KEEP_SHARE * free:
            return (
                f"off: keeping the K/V of {frames} latent frames takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB "
                "are free; use a shorter segment, a smaller video or cfg 1."
            )
        logging.info("AR Video Accelerator: frozen K/V take %.2f GB", needed / 1e9)
        return None

    @property
    def kept_bytes(self) -> int:
        return 0 if self._kept is None else self._kept.nbytes

    def _check_areas(self) -> None:
        if self._shows_parts():
            raise ValueError(
                "Active Frame Window: kept K/V cannot serve conditioning that covers a part of the picture only; "
                "remove the conditioning area, or this node, Shared Prefix Cache and Chunk Cache."
            )

    def _shows_parts(self) -> bool:
        """Whether some conditioning covers a part of the picture only."""
        return any(cond.get("area") is not None for conds in self.guider.conds.values() for cond in conds)

    def feature(self, kind: str, call: Call, x: Tensor) -> Tensor:
        """Of the conditional branch, through the model's own embedders and first block."""
        if kind == "latent":
            return x.transpose(1, 2)
        self.show_prompt(call.segment)
        network, frames, dtype = self.network, x.shape[2], self.model.get_dtype_inference()
        time = self.model.model_sampling.timestep(self._levels(call, x)).float()
        time = network.time_embedding(sinusoidal_embedding_1d(network.freq_dim, time).to(dtype))
        modulation = network.time_projection(time).unflatten(1, (6, network.dim)).expand(self.batch, frames, -1, -1)
        if kind == "timestep":
            return modulation
        tokens = comfy.ldm.common_dit.pad_to_patch_size(x.to(dtype), network.patch_size)
        tokens = network.patch_embedding(tokens.float()).to(dtype).flatten(2).transpose(1, 2)
        block = network.blocks[0]
        if kind == "modulated":
            base = comfy.model_management.cast_to(block.modulation, dtype=dtype, device=x.device)
            shift, scale = (base.unsqueeze(0) + modulation).unbind(2)[:2]
            features = torch.addcmul(repeat_e(shift, tokens), block.norm1(tokens), 1 + repeat_e(scale, tokens))
        else:
            start = call.frames[0] + (0 if self.recomputes_history else call.offset)
            options = {key: value for key, value in self.transformer_options.items() if key == "rope_options"}
            rotations = network.rope_encode(
                frames, *x.shape[3:], t_start=start, device=x.device, dtype=dtype, transformer_options=options
            )
            context = network.text_embedding(self._context(self.batch).to(x.device, dtype))
            features = block(tokens, e=modulation, freqs=rotations, context=context, context_img_len=None)
        return features.unflatten(1, (frames, -1))

    def flops(self, call: Call, frames: int) -> int:
        return self._forward_flops(frames, self._keys(call, frames))

    def full_flops(self, call: Call, frames: int) -> int:
        return self._forward_flops(frames, self._full_keys(call, frames))

    def _forward_flops(self, frames: int, keys: int | None) -> int:
        rows = 1 if self.shares_time else None
        return self.batch * self.shape.forward_flops(frames, self.tokens, keys, branches=self.branches, time_rows=rows)

    def feature_flops(self, kind: str, call: Call, frames: int) -> int:
        if kind == "latent":
            return 0
        count = self.shape.time_flops(1 if self.shares_time else frames)
        if kind != "timestep":
            count += self.shape.patch_flops(frames * self.tokens)
        if kind == "block0":
            count += self.shape.block_flops(frames * self.tokens, frames * self.tokens) + self.shape.text_flops()
        return self.batch * count

    def _keys(self, call: Call, frames: int) -> int | None:
        """Keys that a query reads; None for those of the frames that are forwarded."""
        return None if call.queries is None else (call.frames[1] - call.frames[0]) * self.tokens

    def _full_keys(self, call: Call, frames: int) -> int | None:
        """``_keys`` where nothing is dropped or left unread."""
        return None

    def _levels(self, call: Call, x: Tensor) -> Tensor:
        """What the model is told, ``[T]``, or ``[1]`` where all frames share it."""
        levels = on_device(call.sigmas, x.device, torch.float32)
        return levels.max()[None] if self.shares_time else levels

    def _context(self, batch: int) -> Tensor:
        """The positive prompt as the model reads it, ``[batch, tokens, text_dim]``."""
        cond = self.guider.conds["positive"][0]["model_conds"]["c_crossattn"]
        return cond.process_cond(batch_size=batch, area=None).cond


class CausalHostDenoiser(HostDenoiser):
    """Causal blocks: core's ``CausalWanModel`` with its K/V protocol.

    Only a commit or prefill moves the store's end, so a skipped forward leaves it as the forward would have.
    """

    recomputes_history = False

    def __init__(self, guider: Any, extra_args: dict[str, Any], x: Tensor) -> None:
        super().__init__(guider, extra_args, x)
        capacity, dtype = x.shape[2] * self.tokens, self.model.get_dtype_inference()
        self.kv_caches = self.network.init_kv_caches(self.batch, capacity, x.device, dtype)
        self.crossattn_caches = self.network.init_crossattn_caches(self.batch, x.device, dtype)

    def forget_prompt(self) -> None:
        self.network.reset_crossattn_caches(self.crossattn_caches)

    def velocity(self, call: Call, x: Tensor) -> Tensor:
        self.show_prompt(call.segment)
        end = self.kv_caches[0]["end"]
        written = end + x.shape[2] * self.tokens
        self.transformer_options["ar_state"] = {
            "start_frame": call.offset + call.frames[0],
            "kv_caches": self.kv_caches,
            "crossattn_caches": self.crossattn_caches,
        }
        try:
            levels = self._levels(call, x)
            denoised = self.guider(x, levels[:1].expand(self.batch), **self.extra_args)
        finally:
            self.transformer_options.pop("ar_state", None)
        if self.kv_caches[0]["end"] != written:
            raise RuntimeError(
                "AR Segment Sampler: something on the model skipped or repeated a forward, which breaks the K/V store "
                "of causal blocks; remove other cache nodes (such as LazyCache) and use those of AR Video."
            )
        if call.kind is Kind.DENOISE:
            for cache in self.kv_caches:
                cache["end"] = end
        return velocity_of(x, denoised, levels)

    def state(self) -> dict[str, Tensor]:
        kept = ((f"{layer}.{key}", cache[key][:, : cache["end"]]) for layer, cache in enumerate(self.kv_caches)
                for key in ("k", "v"))  # fmt: skip
        return dict(kept)

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in state.items():
            layer, _, key = name.partition(".")
            cache = self.kv_caches[int(layer)]
            cache[key][:, : tensor.shape[1]] = tensor.to(cache[key])
            cache["end"] = tensor.shape[1]

    def _keys(self, call: Call, frames: int) -> int | None:
        return (call.offset + frames) * self.tokens

    _full_keys = _keys


def _shape(network: torch.nn.Module, text_tokens: int) -> WanShape:
    return WanShape(
        network.dim, network.ffn_dim, network.num_layers, network.num_heads, text_tokens, tuple(network.patch_size),
        network.in_dim, network.out_dim, network.freq_dim, network.text_dim,
    )  # fmt: skip
