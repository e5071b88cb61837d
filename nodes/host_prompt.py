"""Cross-attention of core's causal Wan model over fewer prompt tokens: padding as one key, and what a block looks at.

Core hands its cross-attention nothing of the run, so the patched one asks ``reading``: the run whose forward is being
made, None outside of ours, where it is core's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..accel.attention.prompt import PromptAttention, PromptConfig
from ..accel.flops import attention_flops
from ..accel.graphs import outside_graphs

TEXT_ATTENTION = "WanT2VCrossAttention"


class HostPrompt:
    """The prompt of one run, every layer and CFG branch.

    Attributes:
        branches: those in the batch of the call being made, in order. fresh: whether it is the first of its block.
    """

    def __init__(self, config: PromptConfig) -> None:
        self.attention = PromptAttention(config)
        self.branches: list[int] = [0]
        self.fresh = True
        self._unread = 0

    @outside_graphs
    def attend(self, layer: int, module: torch.nn.Module, x: Tensor, context: Tensor) -> Tensor:
        """Cross-attention of a layer before its output projection; ``x`` ``[branches * B, n, D]``."""
        count, heads = len(self.branches), module.num_heads
        queries = module.norm_q(module.q(x)).unflatten(-1, (heads, -1)).chunk(count)
        answers = []
        for branch, q, text in zip(self.branches, queries, context.chunk(count), strict=True):
            if not self.attention.holds(layer, branch):
                keys = module.norm_k(module.k(text)).unflatten(-1, (heads, -1))
                self.attention.put(layer, keys, module.v(text).unflatten(-1, (heads, -1)), branch)
            answers.append(self.attention(layer, q, self.fresh, branch))
            left = context.shape[1] - self.attention.keys_seen(layer, branch)
            self._unread += len(q) * attention_flops(q.shape[1], left, x.shape[2])
        return torch.cat(answers).flatten(2)

    def unread_flops(self) -> int:
        """What was saved since this was asked last."""
        unread, self._unread = self._unread, 0
        return unread


_reading: ContextVar[HostPrompt | None] = ContextVar("arva_prompt", default=None)


@contextmanager
def reading(prompt: HostPrompt | None) -> Iterator[None]:
    """The forwards inside read the prompt like this."""
    token = _reading.set(prompt)
    try:
        yield
    finally:
        _reading.reset(token)


def prompt_patches(network: torch.nn.Module) -> dict[str, Callable]:
    """Object patches for the cross-attention of every block that reads text alone."""
    return {
        f"diffusion_model.blocks.{layer}.cross_attn.forward": _attention(layer, block.cross_attn)
        for layer, block in enumerate(network.blocks)
        if type(block.cross_attn).__name__ == TEXT_ATTENTION
    }


def _attention(layer: int, module: torch.nn.Module) -> Callable:
    plain = type(module).forward

    def forward(x: Tensor, context: Tensor, **options: Any) -> Tensor:
        prompt = _reading.get()
        if prompt is None:
            return plain(module, x, context, **options)
        return module.o(prompt.attend(layer, module, x, context))

    return forward
