"""The optimiser of the block matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for matrices in bfloat16; on a CPU AMX or AVX-512 BF16."""
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, matrices of one shape in one batch, in bfloat16 where the device has
    units for it.

    ``torch.optim.Muon`` iterates in bfloat16 one matrix at a time, which takes as long as the whole step on a CPU
    without such units.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                stacked = torch.stack(updates)
                if has_bfloat16(stacked.device):
                    stacked = stacked.bfloat16()
                for parameter, update in zip(parameters, orthogonalise(stacked), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest orthogonal matrices of a batch ``[n, rows, columns]`` by five Newton-Schulz steps."""
    flip = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if flip else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x.mT if flip else x
