"""Dense attention with a bias per key, the reference of every sparse form.

A key that stands for n identical ones counts right when ``ln n`` is added to its logits (merged keys, collapsed
padding). Two exact ways, both here under their own names:

- ``masked_attend`` gives the bias to fused attention as a float mask that is broadcast over the queries. Nothing of
  the size of K or V is made. On a CPU the mask stays float32, so counts weigh exactly. On a GPU a float mask rules out
  flash attention (the memory-efficient kernel runs instead) and must have the type of the queries: in bfloat16 the
  logarithm of a count, and with it the count, is rounded to 8 bits.
- ``ratio_attend`` needs no mask: attention over V' = [n V, n] divided by its last channel. Flash attention wants
  queries, keys and values of one width, a multiple of 8, so all three are copied into head_dim + 8 channels.

``attend`` takes the mask, which copies nothing. ``ratio_attend`` is there for GPUs whose flash attention outweighs the
copies; that has not been measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention.

    Args:
        q: ``[B, queries, heads, head_dim]``. k, v: ``[B, keys, heads, head_dim]``, any strides, read in place.
        bias: ``[keys]`` or ``[heads, keys]`` added to the logits, None for none.

    Returns:
        ``[B, queries, heads, head_dim]``.

    Raises:
        ValueError: a bias of another shape.
    """
    if bias is not None:
        return masked_attend(q, k, v, bias)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def masked_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``attend`` with the bias as a float mask ``[1, heads or 1, 1, keys]``."""
    mask = per_head(bias, k).to(mask_dtype(q))[None, :, None]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return out.transpose(1, 2)


def ratio_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``attend`` as the ratio of two attentions without a bias, n = exp(bias) moved into the values.

    n is taken relative to the largest one of its head, so it cannot overflow. It may underflow: use this where the
    biases of a head lie within 9 of each other in float16 (counts from 1 to 8000), 80 in other types.
    """
    width = v.shape[-1]
    if q.shape[-1] != width:
        raise ValueError(f"ratio_attend: keys have {q.shape[-1]} channels and values {width}; use masked_attend.")
    bias = per_head(bias, k)
    count = (bias - bias.amax(-1, keepdim=True)).exp().to(v.dtype).T[None, ..., None]
    extra = -width % 8 or 8
    q, k = (F.pad(x, (0, extra)) for x in (q, k))
    counts = count.expand(v.shape[0], -1, v.shape[2], -1)
    v = torch.cat([v * count, counts, v.new_zeros(*v.shape[:-1], extra - 1)], -1)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=width**-0.5).transpose(1, 2)
    return out[..., :width] / out[..., width : width + 1]


def per_head(bias: Tensor, k: Tensor) -> Tensor:
    """A bias ``[keys]`` or ``[heads, keys]`` of the keys ``[B, keys, heads, head_dim]`` as ``[1 or heads, keys]``."""
    keys, heads = k.shape[1:3]
    if tuple(bias.shape) not in ((keys,), (1, keys), (heads, keys)):
        raise ValueError(
            f"attend: the bias has shape {tuple(bias.shape)}; use [{keys}] (keys) or [{heads}, {keys}] (heads, keys)."
        )
    return bias if bias.ndim == 2 else bias[None]


def mask_dtype(q: Tensor) -> torch.dtype:
    """Type of a float mask for these queries: theirs, but float32 on a CPU that computes in half precision."""
    return torch.float32 if q.device.type == "cpu" and q.dtype in (torch.float16, torch.bfloat16) else q.dtype
