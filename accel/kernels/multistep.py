"""One step of any linear multistep method, each latent frame with coefficients of its own.

``x_next = x + sum_k c[k] v[k]``: Euler is one velocity and the length of the step, a prediction with Euler behind it
the weights of the stored velocities times that length. Without x it is the weighted sum alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .choose import Kernel, Traffic, Verdict, jitted

BLOCK = 1024
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def torch_form(
    velocities: Tensor, table: Tensor, x: Tensor | None = None, moving: Sequence[bool] | None = None
) -> Tensor:
    """The specification."""
    precision = torch.promote_types(velocities.dtype, torch.float32)
    precision = precision if x is None else torch.promote_types(precision, x.dtype)
    used = [point for point, row in enumerate(table.flatten(1).tolist()) if any(row)]
    weights = _spread(table).to(velocities.device, precision, non_blocking=True)
    if used:
        total = velocities[used[0]] * weights[used[0]]
    else:
        total = torch.zeros(velocities.shape[1:], dtype=precision, device=velocities.device)
    for point in used[1:]:
        total.addcmul_(velocities[point], weights[point])
    if x is None:
        return total
    moved = (x.to(precision) + total).to(x.dtype)
    moves = torch.tensor(moving, dtype=torch.bool).to(x.device, non_blocking=True)
    return torch.where(moves[:, None, None], moved, x)


def triton_form(
    velocities: Tensor, table: Tensor, x: Tensor | None = None, moving: Sequence[bool] | None = None
) -> Tensor:
    """One launch; a velocity is read where its coefficient is not 0."""
    from . import multistep_triton as device

    points, batch, channels, frames, height, width = velocities.shape
    like = velocities if x is None else x
    flags = torch.ones(frames) if moving is None else torch.tensor(moving, dtype=torch.float32)
    rows = table.reshape(points, -1, frames).to(torch.float32)
    rows = torch.cat((rows, flags.expand(1, rows.shape[1], -1))).to(like.device, non_blocking=True)
    dtype = torch.float32 if x is None else x.dtype
    out = torch.empty((batch, channels, frames, height, width), dtype=dtype, device=like.device)
    size = height * width
    jitted(device.linear_step, like.device)[(batch * channels * frames, -(-size // BLOCK))](
        velocities, rows, like, out, *velocities.stride()[:4], *like.stride()[-5:-2], channels, frames, size,
        POINTS=points, ENTRIES=rows.shape[1], FROM_X=x is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return out


def supports(
    velocities: Tensor, table: Tensor, x: Tensor | None = None, moving: Sequence[bool] | None = None
) -> Verdict:
    """Whether the kernel takes these tensors, and if not, why."""
    for tensor in (velocities,) if x is None else (velocities, x):
        if tensor.dtype not in DTYPES:
            return False, f"no kernel for {tensor.dtype}"
        if tensor.stride(-1) != 1 or tensor.stride(-2) != tensor.shape[-1]:
            return False, "the scalars of a latent frame must lie one after another"
    return True, ""


def traffic(
    velocities: Tensor, table: Tensor, x: Tensor | None = None, moving: Sequence[bool] | None = None
) -> Traffic:
    """Counted from the shapes and the coefficients that are not 0."""
    points, batch, channels, frames, height, width = velocities.shape
    entries = table.reshape(points, -1, frames)
    pieces = int((entries != 0).sum()) * batch // entries.shape[1]
    read = pieces * channels * height * width * velocities.element_size()
    coefficients = 4 * entries.numel()
    out = batch * channels * frames * height * width
    if x is None:
        return Traffic(1, read + coefficients, 4 * out)
    return Traffic(1, read + coefficients + 4 * entries[0].numel() + out * x.element_size(), out * x.element_size())


linear_step = Kernel("multistep", torch_form, triton_form, supports)
"""``linear_step(velocities, table, x=None, moving=None, backend="auto")`` -> ``[B, C, T, H, W]``, a new tensor.

Args:
    velocities: ``[n, B, C, T, H, W]``. table: coefficients on the host, ``[n, T]`` or ``[n, B or 1, T]``. x: latents
        ``[B, C, T, H, W]`` the sum is added to; the result has their dtype, else it is float32. moving: which latent
        frames take the step (host values); the others are x's own.
"""


def _spread(table: Tensor) -> Tensor:
    """Coefficients ``[n, B or 1, 1, T, 1, 1]``."""
    return (table if table.ndim == 3 else table[:, None])[:, :, None, :, None, None]
