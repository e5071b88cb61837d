"""The tiny transformer's forward and backward pass as a CPU with units for bfloat16 wants them.

The same function of the same parameters as ``TinyWan.forward``, cut differently: matrix products alone in bfloat16,
each stretch of elementwise work between two of them compiled into one kernel in float32, residual stream and parameters
in float32. PyTorch 2.13 on a CPU gives NaN for whole blocks that are compiled in bfloat16, and spends more on the
backward pass of fused attention than on all matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Block, TinyWan, unpatch

HALF = torch.bfloat16
SHAPES = 32  # that one compiled stretch may meet: clip lengths, and how many keys a block of frames sees
GELU = (2 * (2 / torch.pi) ** 0.5, 0.044715)  # gelu (tanh) = y sigmoid(a y (1 + b y^2))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN of ``[F, S, D]``, one row of ``shift`` and ``scale`` ``[F, 1, D]`` a frame."""
    return (F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift).to(HALF)


def _turned(qkv: Tensor, bias: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Scaled queries, keys and values ``[B, heads, N, d]`` of ``[B, N, 3 D]``, whose q and k have the first channels of
    all pairs before the second."""
    dim, head = norm_q.shape[0], 2 * cos.shape[-1]
    q, k, v = (qkv.float() + bias).split(dim, -1)

    def turn(y: Tensor, norm: Tensor) -> Tensor:
        even, odd = F.rms_norm(y, (dim,), norm, 1e-6).unflatten(-1, (-1, 2, head // 2)).unbind(-2)
        return torch.cat((even * cos - odd * sin, even * sin + odd * cos), -1).transpose(1, 2)

    values = v.unflatten(-1, (-1, head)).transpose(1, 2).to(HALF).contiguous()
    return (turn(q, norm_q) * head**-0.5).to(HALF).contiguous(), turn(k, norm_k).to(HALF).contiguous(), values


def _prompted(q: Tensor, bias: Tensor, norm: Tensor, head: int) -> Tensor:
    """Scaled queries ``[B, heads, N, d]`` of ``[B, N, D]``."""
    y = F.rms_norm(q.float() + bias, norm.shape, norm, 1e-6) * head**-0.5
    return y.unflatten(-1, (-1, head)).transpose(1, 2).to(HALF).contiguous()


def _softmax(scores: Tensor, bias: Tensor | None) -> Tensor:
    scores = scores.float()
    return (scores if bias is None else scores + bias).softmax(-1).to(HALF)


def _joined(read: Tensor, weight: Tensor) -> Tensor:
    """What heads ``[B, heads, N, d]`` read, through the output matrix: ``[B, N, D]``."""
    return F.linear(read.transpose(1, 2).flatten(2), weight.to(HALF))


def stretches(mask: Tensor) -> tuple[list[int], list[list[tuple[int, list[int]]]]]:
    """What a mask ``[N, N]`` (True where a query token sees a key token) says, without its zeros.

    Returns:
        The lengths of the stretches of tokens that see, and are seen by, the same tokens; and these stretches, each
        with those it sees, in groups of equal length that see equally many tokens.
    """
    change = (mask[1:] != mask[:-1]).any(1) | (mask[:, 1:] != mask[:, :-1]).any(0)
    bounds = [0, *(change.nonzero().flatten() + 1).tolist(), len(mask)]
    lengths = [end - start for start, end in pairwise(bounds)]
    groups: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
    for index, start in enumerate(bounds[:-1]):
        seen = [other for other, first in enumerate(bounds[:-1]) if mask[start, first]]
        groups.setdefault((lengths[index], sum(lengths[other] for other in seen)), []).append((index, seen))
    return lengths, list(groups.values())


def _gated(x: Tensor, y: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """Residual stream ``[F, S, D]`` plus an answer times one ``gate`` ``[F, 1, D]`` a frame."""
    return x + (y.float() + bias) * gate


def _added(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return x + (y.float() + bias)


def _normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6).to(HALF)


def _gelu(y: Tensor) -> Tensor:
    y = y.float()
    return (y * torch.sigmoid(GELU[0] * y * (1 + GELU[1] * y * y))).to(HALF)


def _gelu_gradient(y: Tensor, gradient: Tensor) -> Tensor:
    y = y.float()
    gate = torch.sigmoid(GELU[0] * y * (1 + GELU[1] * y * y))
    return (gradient.float() * gate * (1 + y * (1 - gate) * GELU[0] * (1 + 3 * GELU[1] * y * y))).to(HALF)


class HalfForward:
    """``TinyWan.forward`` with matrix products in bfloat16; callable with the model and the same arguments.

    Args:
        compiled: whether the elementwise stretches are compiled, which takes a minute or two at the first steps.
    """

    def __init__(self, compiled: bool = True) -> None:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)

        def made(function: Callable) -> Callable:
            return torch.compile(function, dynamic=False) if compiled else function

        self.modulated, self.turned, self.prompted = made(_modulated), made(_turned), made(_prompted)
        self.softmax, self.normed = made(_softmax), made(_normed)
        self.gated, self.added = made(_gated), made(_added)
        gelu, gelu_gradient = made(_gelu), made(_gelu_gradient)

        class Gelu(torch.autograd.Function):
            """Gelu that keeps its input alone for the backward pass."""

            @staticmethod
            def forward(ctx, y: Tensor) -> Tensor:
                ctx.save_for_backward(y)
                return gelu(y)

            @staticmethod
            def backward(ctx, gradient: Tensor) -> Tensor:
                return gelu_gradient(*ctx.saved_tensors, gradient)

        self.gelu = Gelu.apply

    def __call__(
        self,
        model: TinyWan,
        x: Tensor,
        sigma: Tensor,
        context: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Velocity ``[B, C, T, H, W]`` in float32; arguments as in ``TinyWan.forward``."""
        clips, frames = x.shape[0], x.shape[2]
        tokens, rotations = model.embed(x, positions)
        e, e0 = model.embed_time(sigma)
        prompt = model.text_embedding(context)
        told = e0.flatten(0, 1)
        stream = tokens.unflatten(1, (frames, -1)).flatten(0, 1).contiguous()
        seen = None if mask is None else stretches(mask)
        turns = (rotations[None, :, None, :, 0], rotations[None, :, None, :, 1])
        for block in model.blocks:
            moves = (block.modulation + told).unsqueeze(2).unbind(1)
            stream = self.attend(block, stream, moves, clips, turns, seen)
            stream = self.attend_prompt(block, stream, clips, prompt, bias)
            y = self.modulated(stream, moves[3], moves[4])
            y = self.gelu(F.linear(y, block.ffn[0].weight.to(HALF), block.ffn[0].bias.to(HALF)))
            stream = self.gated(stream, F.linear(y, block.ffn[2].weight.to(HALF)), block.ffn[2].bias, moves[5])
        return unpatch(model.head(stream.view(clips, -1, stream.shape[-1]), e), x)

    def attend(
        self,
        block: Block,
        stream: Tensor,
        moves: tuple[Tensor, ...],
        clips: int,
        turns: tuple[Tensor, Tensor],
        seen: tuple[list[int], list] | None,
    ) -> Tensor:
        """Self-attention of the frames ``[F, S, D]`` of ``clips`` clips; ``seen``: which tokens see which, as
        ``stretches`` has it, or None where all see all."""
        layer, dim = block.self_attn, stream.shape[-1]
        # the product of two turned vectors does not depend on the order of channels: pairs apart, halves together
        order = torch.arange(dim).view(layer.heads, -1, 2).transpose(1, 2).flatten()
        weight = torch.cat((layer.q.weight[order], layer.k.weight[order], layer.v.weight))
        offset = torch.cat((layer.q.bias[order], layer.k.bias[order], layer.v.bias))
        y = self.modulated(stream, moves[0], moves[1]).view(clips, -1, dim)
        norms = (layer.norm_q.weight[order], layer.norm_k.weight[order])
        q, k, v = self.turned(F.linear(y, weight.to(HALF)), offset, *norms, *turns)
        heard = self.read(q, k, v) if seen is None else self.read_stretches(q, k, v, *seen)
        answer = _joined(heard, layer.o.weight).view(stream.shape)
        return self.gated(stream, answer, layer.o.bias, moves[2])

    def attend_prompt(self, block: Block, stream: Tensor, clips: int, prompt: Tensor, bias: Tensor | None) -> Tensor:
        """Cross-attention of ``[F, S, D]`` to prompts ``[B, L, D]``."""
        layer, dim = block.cross_attn, stream.shape[-1]
        head = dim // layer.heads
        y = self.normed(stream, block.norm3.weight, block.norm3.bias).view(clips, -1, dim)
        q = self.prompted(F.linear(y, layer.q.weight.to(HALF)), layer.q.bias, layer.norm_q.weight, head)
        k, v = layer.norm_k(layer.k(prompt)), layer.v(prompt)
        k, v = (part.unflatten(-1, (-1, head)).transpose(1, 2).to(HALF) for part in (k, v))
        answer = _joined(self.read(q, k, v, bias), layer.o.weight).view(stream.shape)
        return self.added(stream, answer, layer.o.bias)

    def read(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """What scaled queries ``[B, heads, N, d]`` read of all keys."""
        return self.softmax(q @ k.mT, bias) @ v

    def read_stretches(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], groups: list[list[tuple[int, list[int]]]]
    ) -> Tensor:
        """The same where each stretch of tokens sees some others only: nothing is computed that is not seen."""
        parts = [part.split(lengths, 2) for part in (q, k, v)]
        answers: dict[int, Tensor] = {}
        for group in groups:
            queries = torch.cat([parts[0][index] for index, _ in group])
            keys, values = (
                torch.cat([torch.cat([part[other] for other in seen], 2) for _, seen in group]) for part in parts[1:]
            )
            read = self.read(queries, keys, values).chunk(len(group))
            answers.update(zip((index for index, _ in group), read, strict=True))
        return torch.cat([answers[index] for index in range(len(lengths))], 2)
