"""A tiny model's forward in parts, for methods that change what happens inside it.

``open_forward`` embeds, ``run_blocks`` runs transformer blocks whose three modules can be left out, ``close_forward``
is the head and the guidance. Run one after the other they are the model's own forward, operation by operation. FLOPs
are counted as ``accel.flops`` counts them, for all branches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from accel.call import Call
from accel.flops import attention_flops, linear_flops
from demo.denoiser import TinyDenoiser
from demo.model import PATCH, Block, attend, gated, modulate, rotate

MODULES = ("self", "cross", "feed-forward")
Provide = Callable[[int, str, Callable[[], Tensor]], Tensor]
"""From layer, module and the module's own computation to the module's output ``[B, N, D]`` before its gate."""


@dataclass(slots=True)
class Opened:
    """What the blocks of one forward share: ``tokens`` ``[B, N, D]`` as they leave the patch embedding, the time
    embedding ``e`` ``[B, T, D]`` and its projection ``e0`` ``[B, T, 6, D]``, the prompt and the K/V store."""

    denoiser: TinyDenoiser
    tokens: Tensor
    e: Tensor
    e0: Tensor
    rotations: Tensor
    prompt: Tensor
    store: object
    size: tuple[int, int, int]
    _context: Tensor | None = None

    @property
    def context(self) -> Tensor:
        """Embedded prompt; embedded when it is first needed."""
        if self._context is None:
            self._context = self.denoiser.model.text_embedding(self.prompt)
        return self._context


@torch.inference_mode()
def open_forward(denoiser: TinyDenoiser, call: Call, x: Tensor) -> Opened:
    """Everything before the first block, for latents ``[B, C, T, H, W]``."""
    x, sigma, prompt, positions, store = denoiser.inputs(call, x)
    tokens, rotations = denoiser.model.embed(x, positions)
    e, e0 = denoiser.model.embed_time(sigma)
    size = (x.shape[2], x.shape[3] // PATCH, x.shape[4] // PATCH)
    return Opened(denoiser, tokens, e, e0, rotations, prompt, store, size)


@torch.inference_mode()
def run_blocks(opened: Opened, tokens: Tensor, layers: range, provide: Provide | None = None) -> Tensor:
    """Tokens ``[B, N, D]`` after these blocks; ``provide`` may answer for their modules."""
    for layer in layers:
        block = opened.denoiser.model.blocks[layer]
        if provide is None:
            shared = (opened.e0, opened.rotations, opened.context, None, opened.store, layer)
            tokens = block(tokens, *shared)
        else:
            tokens = _block(block, tokens, opened, layer, provide)
    return tokens


@torch.inference_mode()
def close_forward(opened: Opened, tokens: Tensor) -> Tensor:
    """Guided velocity ``[B, C, T, H, W]`` of the tokens that leave the last block."""
    frames, height, width = opened.size
    out = opened.denoiser.model.head(tokens, opened.e)
    out = rearrange(
        out, "b (t h w) (p q c) -> b c t (h p) (w q)", t=frames, h=height, w=width, p=PATCH, q=PATCH
    ).contiguous()
    return opened.denoiser.guided(out)


def _block(block: Block, x: Tensor, opened: Opened, layer: int, provide: Provide) -> Tensor:
    shift, scale, gate, shift2, scale2, gate2 = (block.modulation[:, None] + opened.e0).unbind(2)

    def self_attention() -> Tensor:
        y = modulate(block.norm1(x), shift, scale)
        q, k, v = block.self_attn.project(y, y)
        q, k = rotate(q, opened.rotations), rotate(k, opened.rotations)
        if opened.store is not None:
            k, v = opened.store.append(layer, k, v)
        return block.self_attn.o(attend(q, k, v))

    x = x + gated(provide(layer, "self", self_attention), gate)
    before_cross = x
    x = x + provide(
        layer,
        "cross",
        lambda: block.cross_attn.o(attend(*block.cross_attn.project(block.norm3(before_cross), opened.context))),
    )
    before_last = x
    inner = provide(layer, "feed-forward", lambda: block.ffn(modulate(block.norm2(before_last), shift2, scale2)))
    return x + gated(inner, gate2)


def ends_flops(denoiser: TinyDenoiser, frames: int) -> int:
    """FLOPs of a forward without its blocks and its prompt: patch embedding, time embedding and head."""
    tokens, forwards = denoiser.size(frames)
    shape = denoiser.shape
    return forwards * (shape.patch_flops(tokens) + shape.time_flops(frames) + shape.head_flops(tokens))


def text_flops(denoiser: TinyDenoiser, frames: int) -> int:
    """FLOPs of the prompt's embedding."""
    return denoiser.size(frames)[1] * denoiser.shape.text_flops()


def module_flops(denoiser: TinyDenoiser, call: Call, frames: int, module: str) -> int:
    """FLOPs of one module of one block; the three of ``MODULES`` add up to ``WanShape.block_flops``."""
    tokens, forwards = denoiser.size(frames)
    shape = denoiser.shape
    square = linear_flops(1, shape.dim, shape.dim)
    if module == "self":
        keys = tokens + (call.offset * tokens // frames if denoiser.model.config.causal_ar else 0)
        count = 4 * tokens * square + attention_flops(tokens, keys, shape.dim)
    elif module == "cross":
        prompt = shape.text_tokens
        count = 2 * (tokens + prompt) * square + attention_flops(tokens, prompt, shape.dim)
    else:
        count = 2 * linear_flops(tokens, shape.dim, shape.ffn_dim)
    return forwards * count


def blocks_flops(denoiser: TinyDenoiser, call: Call, frames: int, blocks: int) -> int:
    """FLOPs of whole transformer blocks."""
    return blocks * sum(module_flops(denoiser, call, frames, module) for module in MODULES)
