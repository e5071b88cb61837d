"""History guidance: guidance that draws away from what the model would make if it had not seen the history.

"Vanilla history guidance" of Song et al. 2025 (History-Guided Video Diffusion, arXiv 2502.06764): the CFG branch that
is subtracted sees noise where the history is, v = v_without + g (v_with - v_without). To a model of diffusion forcing
that is noise of level 1; a causal model's branch reads nothing of the K/V store (``kv.memory``). Continuations then
keep closer to the motion of the history, since what the history says of it weighs g times as much. It costs no forward:
the branch is computed anyway. Noise of a lower level hides the history in part only, which weakens this under a g that
the prompt wants high (ours; the paper's fractional guidance adds such a branch instead).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call


def history_frames(call: Call) -> list[bool]:
    """Which latent frames of a call's window are history: those finished before the segment began. Blocks that finish
    within it are not hidden then, which would change what all others are drawn to from one step to the next."""
    return [frame < call.given for frame in range(*call.frames)]


def check_strength(strength: float, branches: int, causal: bool) -> None:
    """Raises ValueError, without the name of who asks, where history guidance of this strength cannot be."""
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"history_guidance is {strength:g}; use a noise level from 0 (off) to 1 (history is hidden).")
    if strength and branches == 1:
        raise ValueError(
            f"history_guidance is {strength:g}, but cfg is 1, which runs no branch that could go without the history; "
            "use a cfg above 1, or 0 to turn it off."
        )
    if causal and strength not in (0.0, 1.0):
        raise ValueError(
            f"history_guidance is {strength:g}, but the K/V store of causal blocks can be read or not, nothing "
            "between; use 1, or 0 to turn it off."
        )


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
        strength: noise level that hides the history, above 0 to 1. shares_time: whether the model is told one level for
            the whole window.
    """

    def __init__(self, strength: float, shares_time: bool) -> None:
        self.strength, self.shares_time = strength, shares_time
        self._window: tuple | None = None

    def __call__(self, call: Call, x: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[B, C, T, H, W]`` and noise levels ``[B, T]`` as the branch without history is given them."""
        window = (call.frames, call.offset, x.shape, x.device)
        if window != self._window:
            self._window, self._noise = window, history_noise(call, x.shape, x.device)
        return without_history(call, x, told, self.strength, self.shares_time, self._noise)


def without_history(
    call: Call, x: Tensor, told: Tensor, strength: float, shares_time: bool, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """What the branch without history is given.

    Args:
        x: window ``[B, C, T, H, W]``. told: noise level of each latent frame ``[B, T]`` in [0, 1]. strength: noise
            level that hides the history. shares_time: whether the model is told one level for the whole window, so that
            history can have no other. noise: ``[1, C, T, H, W]``.

    Returns:
        Latents and noise levels of the same shapes: noise of level ``strength`` where history was; where the time is
        shared, the history at ``strength`` times the level of all else, which is told.
    """
    history = torch.tensor(history_frames(call), device=x.device)
    level = told * strength if shares_time else torch.full_like(told, strength)
    hidden = torch.lerp(x, noise.to(x.dtype).expand_as(x), level[:, None, :, None, None].to(x.dtype))
    return torch.where(history[:, None, None], hidden, x), told if shares_time else torch.where(history, level, told)
