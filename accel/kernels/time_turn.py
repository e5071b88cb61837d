"""Turning the time channels of stored keys, from the dtype they are kept in to the same, in float32 on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from .choose import Kernel, Traffic, Verdict, jitted

BLOCK = 1024
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def torch_form(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """The specification. Nothing wider than what is kept is made but the products with the even channels."""
    each = x.shape[1] // cos.shape[0]
    (even, odd), (new_even, new_odd) = (
        side.unflatten(1, (-1, each)).unflatten(-1, (-1, 2)).unbind(-1) for side in (x, out)
    )
    cos, sin = cos[:, None], sin[:, None]
    first, second = even * cos, even * sin
    torch.addcmul(first, odd, sin, value=-1, out=new_even)
    torch.addcmul(second, odd, cos, out=new_odd)
    return out


def triton_form(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """One launch; every scalar is read once and written once."""
    from . import time_turn_triton as device

    batch, tokens, heads, channels = x.shape
    grid = (-(-tokens * heads * channels // BLOCK), batch)
    jitted(device.turn, x.device)[grid](
        x, cos, sin, out, *x.stride()[:3], *out.stride()[:3], tokens, tokens // cos.shape[0], HEADS=heads,
        CHANNELS=channels, TURNED_HEADS=cos.shape[1], FLAT=x[0].is_contiguous(), BLOCK=BLOCK,
    )  # fmt: skip
    return out


def supports(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Verdict:
    """Whether the kernel takes these tensors, and if not, why."""
    if x.dtype not in DTYPES or out.dtype not in DTYPES:
        return False, f"no kernel from {x.dtype} to {out.dtype}"
    if x.stride(3) != 1 or out.stride(3) != 1 or not cos.is_contiguous() or not sin.is_contiguous():
        return False, "channels must lie one after another"
    if max(x.shape[1] * x.stride(1), out.shape[1] * out.stride(1)) >= 2**31:
        return False, f"{x.shape[1]} tokens"
    return True, ""


def traffic(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Traffic:
    """Counted from the shapes: time channels read once and written once, and the cosines and sines read."""
    return Traffic(1, x.numel() * x.element_size() + cos.nbytes + sin.nbytes, out.numel() * out.element_size())


turn_pairs = Kernel("time turn", torch_form, triton_form, supports)
"""``turn_pairs(x, cos, sin, out, backend="auto")`` -> ``out``: neighbouring channel pairs of ``x`` rotated.

Args:
    x: ``[B, n, heads, channels]``, any strides. cos, sin: fp32 ``[m, heads or 1, channels / 2]``, each for n / m
        neighbouring tokens. out: where the result goes, of x's shape; may be ``x`` itself.
"""
