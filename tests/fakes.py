"""A model whose velocity is known in closed form, for tests of the engine and the loops."""

from __future__ import annotations

import torch

from accel.call import Kind
from accel.engine import Acceleration, Run
from accel.timeline import Timeline


class SmoothDenoiser:
    """v = a(sigma) * x + b(sigma) per latent frame, with a weak pull towards the window's mean: a bidirectional model.

    Counts its calls; ``break_at`` returns NaN there.
    """

    branches = 2
    shares_time = False
    recomputes_history = True

    def __init__(self, break_at: int | None = None) -> None:
        self.calls: list = []
        self.break_at = break_at

    def velocity(self, call, x):
        self.calls.append(call)
        sigma = torch.tensor(call.sigmas, dtype=x.dtype)[None, None, :, None, None]
        v = torch.cos(2 * sigma) * x + 0.3 * torch.sin(3 * sigma) + 0.05 * x.mean(2, keepdim=True)
        if call.queries is not None:
            v = v[:, :, call.queries[0] - call.frames[0] : call.queries[1] - call.frames[0]]
        return v * float("nan") if self.break_at == len(self.calls) - 1 else v

    def keep(self, frames):
        self.kept = frames

    kept_bytes = 0

    def feature(self, kind, call, x):
        sigma = torch.tensor(call.sigmas, dtype=x.dtype)[None, :, None]
        return torch.cat((1 + sigma, x.mean((1, 3, 4))[..., None]), -1)

    def flops(self, call, frames):
        return 100 * frames

    full_flops = flops

    def feature_flops(self, kind, call, frames):
        return frames

    @property
    def denoised(self):
        return [call for call in self.calls if call.kind is Kind.DENOISE]


def make_run(acceleration: Acceleration | None = None, denoiser: SmoothDenoiser | None = None) -> Run:
    return Run(
        acceleration or Acceleration(), denoiser or SmoothDenoiser(), Timeline(row_unit="chunk", frames_per_row=2)
    )


def video(segments) -> torch.Tensor:
    return torch.cat([segment.latents for segment in segments], 2)
