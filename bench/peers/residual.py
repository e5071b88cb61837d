"""What TeaCache and MagCache reuse: the hidden residual, what the blocks add to the embedded tokens."""

from __future__ import annotations

from torch import Tensor

from accel.call import Call, Decision

from .base import PeerRun
from .parts import blocks_flops, close_forward, ends_flops, open_forward, run_blocks, text_flops


class ResidualRun(PeerRun):
    """Holds ``tokens out - tokens in`` of all blocks together, ``[branches * B, N, D]``.

    A skipped call runs the patch embedding, the time embedding and the head of its own noise levels, which are counted.
    """

    depth = 0
    residual: Tensor | None = None

    def reset(self, frames: int) -> None:
        self.residual = None

    def answer(self, call: Call, x: Tensor, decision: Decision) -> Tensor:
        opened, frames = open_forward(self.denoiser, call, x), x.shape[2]
        self.spent += ends_flops(self.denoiser, frames)
        if decision is not Decision.RECOMPUTE:
            return close_forward(opened, opened.tokens + self.residual)
        layers = self.denoiser.shape.layers
        self.spent += blocks_flops(self.denoiser, call, frames, layers) + text_flops(self.denoiser, frames)
        tokens = run_blocks(opened, opened.tokens, range(layers))
        residual = tokens - opened.tokens
        self.computed(call, residual)
        self.residual = residual
        return close_forward(opened, tokens)

    def computed(self, call: Call, residual: Tensor) -> None:
        """The residual of a computed call, before it takes the place of ``self.residual``."""

    @property
    def state_bytes(self) -> int:
        return 0 if self.residual is None else self.residual.nbytes
