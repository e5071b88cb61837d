"""Causal blocks with a K/V store of ours: core's ``CausalWanModel``, whose self-attention reads and writes it.

Core's own store holds the whole video, one branch and one dtype. Ours takes its place through object patches on a clone
of the model: the patched attention does what core's does up to the rotated queries and keys and leaves the rest to the
store it is handed; handed none, it is core's. All state travels in the call (``ar_state``), none stays in the model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from types import MethodType
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.ldm.flux.math import apply_rope1
from torch import Tensor

from ..accel.acceleration import Acceleration
from ..accel.attention.prompt import PromptConfig
from ..accel.call import Call, Kind
from ..accel.graphs import outside_graphs
from ..accel.kv.budget import StoreShape
from ..accel.kv.memory import KVMemory, make_memory
from ..accel.kv.rotary import TimeRotary
from .host_denoiser import HostDenoiser, velocity_of
from .host_prompt import HostPrompt, prompt_patches, reading
from .job import NODE

WRAPPER = "arva_kv"
PARTS = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads", "head_dim")
EXPECTED = {"forward": ("x", "freqs", "kv_cache"), "forward_block": ("start_frame", "kv_caches", "crossattn_caches")}


class LayerStore:
    """One layer's share of the K/V memory, where core expects a dictionary with a full-length buffer."""

    def __init__(self, memory: KVMemory, layer: int) -> None:
        self.memory, self.layer = memory, layer
        self.branches: list[int] | None = None
        self.written = 0

    @outside_graphs
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.written += len(k)
        return self.memory.attend(self.layer, q, k, v, self.branches)


def with_own_store(model: Any) -> Any:
    """A clone of the causal MODEL whose self-attention takes a ``LayerStore``.

    Raises:
        ValueError: core's causal model is not the one this was written for.
    """
    network = model.model.diffusion_model
    _probe(network)
    clone = model.clone()
    patches = {
        f"diffusion_model.blocks.{layer}.self_attn.forward": _attention(block.self_attn)
        for layer, block in enumerate(network.blocks)
    }
    for path, patch in (patches | prompt_patches(network)).items():
        clone.add_object_patch(path, patch)
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    clone.remove_wrappers_with_key(kind, WRAPPER)
    clone.add_wrapper_with_key(kind, WRAPPER, _tell_branches)
    return clone


def take_patches_off(model: Any) -> None:
    """Puts back what the object patches of a clone took the place of, once its run is over.

    Core would leave them until it loads another model, and puts a method back as an attribute of its own module: a
    circle, which would keep the weights of a model that nobody needs any more until the next garbage collection.
    """
    model.unpatch_model(unpatch_weights=False)
    for path in model.object_patches:
        owner, _, name = path.rpartition(".")
        module = comfy.utils.get_attr(model.model, owner) if owner else model.model
        left = vars(module).get(name)
        if isinstance(left, MethodType) and left.__self__ is module and left.__func__ is getattr(type(module), name):
            delattr(module, name)


def _probe(network: Any) -> None:
    blocks = list(getattr(network, "blocks", []))
    attention = getattr(blocks[0], "self_attn", None) if blocks else None
    missing = [part for part in PARTS if not hasattr(attention, part)]
    for name, owner in (("forward", attention), ("forward_block", network)):
        known = inspect.signature(getattr(owner, name)).parameters if hasattr(owner, name) else {}
        missing += [f"{name}({parameter})" for parameter in EXPECTED[name] if parameter not in known]
    if not hasattr(getattr(network, "rope_embedder", None), "axes_dim"):
        missing.append("rope_embedder")
    if missing:
        raise ValueError(
            f"{NODE}: this ComfyUI's causal Wan model has changed (no {', '.join(missing)}), so its K/V cannot be "
            "bounded and cfg above 1 does not run; remove KV Cache Budget and set cfg to 1, or update this pack."
        )


def _attention(module: torch.nn.Module) -> Any:
    """Forward of core's causal self-attention that hands a ``LayerStore`` what it would write into a buffer."""
    plain = type(module).forward

    def forward(x: Tensor, freqs: Tensor, kv_cache: Any = None, **options: Any) -> Tensor:
        if not isinstance(kv_cache, LayerStore):
            return plain(module, x, freqs, kv_cache=kv_cache, **options)
        shape = (*x.shape[:2], module.num_heads, module.head_dim)
        q = apply_rope1(module.norm_q(module.q(x)).view(shape), freqs)
        k = apply_rope1(module.norm_k(module.k(x)).view(shape), freqs)
        return module.o(kv_cache.attend(q, k, module.v(x).view(shape)).flatten(2))

    return forward


def _tell_branches(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Tells the stores which CFG branches the batch of this call holds, in their order."""
    given = [*args, *kwargs.values()]
    options = next((one for one in given if isinstance(one, dict) and "cond_or_uncond" in one), {})
    state = options.get("ar_state", {})
    for kept in (*state.get("kv_caches", ()), state.get("arva_prompt")):
        if isinstance(kept, LayerStore | HostPrompt):
            kept.branches = list(options["cond_or_uncond"])
    return executor(*args, **kwargs)


class BoundedHostDenoiser(HostDenoiser):
    """Causal blocks on core's ``CausalWanModel`` with the K/V in ``KVMemory``: any cfg, any batch, a budget.

    Args:
        guider, extra_args, x: as of ``HostDenoiser``. acceleration: says the budget and what is read of it; without,
            all K/V are kept and read. block: latent frames denoised together. calls: forwards of a block.
        forgetful: the negative branch reads its own block alone and keeps nothing.
    """

    recomputes_history = False

    def __init__(
        self, guider: Any, extra_args: dict[str, Any], x: Tensor, acceleration: Acceleration, block: int, calls: int,
        forgetful: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(guider, extra_args, x)
        rows, columns = self.shape.patch[1:]
        embedder = self.network.rope_embedder
        shape = StoreShape(
            self.shape.layers, self.shape.heads, self.shape.dim // self.shape.heads,
            (-(-x.shape[3] // rows), -(-x.shape[4] // columns)), self.batch,
            self.model.get_dtype_inference().itemsize, TimeRotary(embedder.axes_dim[0], embedder.theta),
        )  # fmt: skip
        self.memory = make_memory(
            acceleration.kv_budget, shape, self.branches, block, x.shape[2], acceleration.ann, calls, forgetful
        )
        self._forgetful = forgetful
        logging.info("AR Video Accelerator: K/V of %s", self.memory.note())
        self._stores = [LayerStore(self.memory, layer) for layer in range(self.shape.layers)]
        self._block = block
        self._prompt = HostPrompt(acceleration.prompt or PromptConfig(collapse=False))

    def forget_prompt(self) -> None:
        self._prompt.attention.forget()

    def velocity(self, call: Call, x: Tensor) -> Tensor:
        self.show_prompt(call.segment)
        first = call.offset + call.frames[0]
        self.transformer_options["ar_state"] = {
            "start_frame": self.memory.begin(first, x.shape[2]),
            "kv_caches": self._stores,
            "crossattn_caches": [None] * self.shape.layers,  # the prompt's keys and values are kept in arva_prompt
            "arva_prompt": self._prompt,
        }
        self._prompt.fresh = call.iteration == 0
        for store in self._stores:
            store.written = 0
        try:
            levels = self._levels(call, x)
            with reading(self._prompt):
                denoised = self.guider(x, levels[:1].expand(self.batch), **self.extra_args)
        finally:
            self.transformer_options.pop("ar_state", None)
        if any(store.written != self.batch * self.branches for store in self._stores):
            raise RuntimeError(
                "AR Segment Sampler: something on the model skipped or repeated a forward, which breaks the K/V store "
                "of causal blocks; remove other cache nodes (such as LazyCache) and use those of AR Video."
            )
        if call.kind is not Kind.DENOISE:
            self.memory.commit()
        return velocity_of(x, denoised, levels)

    def flops(self, call: Call, frames: int) -> int:
        return super().flops(call, frames) - self.memory.unread_flops - self._prompt.unread_flops()

    def notes(self) -> dict[str, str]:
        """What the report says of the K/V."""
        sparse = self.memory.sparse_note()
        return {"K/V": self.memory.note()} | ({"attention": sparse} if sparse else {})

    @property
    def most_frames(self) -> int:
        return self.memory.layout.ring

    @property
    def kept_bytes(self) -> int:
        return self.memory.nbytes

    def lower(self) -> str | None:
        comfy.model_management.soft_empty_cache()
        return self.memory.lower(self._block)

    def state(self) -> dict[str, Tensor]:
        return self.memory.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.memory.load(state)

    def _keys(self, call: Call, frames: int) -> int | None:
        return round(self.memory.keys)

    def _full_keys(self, call: Call, frames: int) -> int | None:
        if self._forgetful:
            return (call.offset + 2 * frames) * self.tokens // 2
        return (call.offset + frames) * self.tokens
