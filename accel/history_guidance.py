"""History guidance: guidance that draws away from what the model would make if it had not seen the history.

"Vanilla history guidance" of Song et al. 2025 (History-Guided Video Diffusion, arXiv 2502.06764): the CFG branch that
is subtracted sees noise where the history is, v = v_without + g (v_with - v_without). To a model of diffusion forcing
that is noise of level 1; a causal model's branch reads nothing of the K/V store (``kv.memory``). Continuations then
keep closer to the motion of the history, since what the history says of it weighs g times as much. It costs no forward:
the branch is computed anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call


def history_frames(call: Call) -> list[bool]:
    """Which latent frames of a call's window are history: those finished before the segment began. Blocks that finish
    within it are not hidden then, which would change what all others are drawn to from one step to the next."""
    return [frame < call.given for frame in range(*call.frames)]


def history_noise(call: Call, shape: torch.Size, device: torch.device) -> Tensor:
    """Noise ``[1, C, T, H, W]`` for a window of latents of this ``shape``: the same for a latent frame of the video
    wherever the window lies and however often it is asked for. fp32."""
    _, channels, _, height, width = shape
    frames = []
    for frame in range(call.frames[0] + call.offset, call.frames[1] + call.offset):
        generator = torch.Generator().manual_seed(frame)
        frames.append(torch.randn(channels, height, width, generator=generator))
    return torch.stack(frames, 1)[None].to(device)


class HiddenHistory:
    """``without_history`` for one run, which draws the noise of a window once.

    Args:
        shares_time: whether the model is told one level for the whole window.
    """

    def __init__(self, shares_time: bool) -> None:
        self.shares_time = shares_time
        self._window: tuple | None = None

    def __call__(self, call: Call, x: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[B, C, T, H, W]`` and noise levels ``[B, T]`` as the branch without history is given them."""
        window = (call.frames, call.offset, x.shape, x.device)
        if window != self._window:
            self._window, self._noise = window, history_noise(call, x.shape, x.device)
        return without_history(call, x, told, self.shares_time, self._noise)


def without_history(call: Call, x: Tensor, told: Tensor, shares_time: bool, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What the branch without history is given.

    Args:
        x: window ``[B, C, T, H, W]``. told: noise level of each latent frame ``[B, T]`` in [0, 1]. shares_time: whether
            the model is told one level for the whole window, so that history can have no other. noise: ``[1, C, T, H,
            W]``.

    Returns:
        Latents and noise levels of the same shapes: noise of level 1 where history was, or as noisy as all else.
    """
    history = torch.tensor(history_frames(call), device=x.device)
    level = told if shares_time else torch.ones_like(told)
    hidden = torch.lerp(x, noise.to(x.dtype).expand_as(x), level[:, None, :, None, None].to(x.dtype))
    return torch.where(history[:, None, None], hidden, x), torch.where(history, level, told)
