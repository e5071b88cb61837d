"""Trains the tiny models: ``python -m demo.train {codec,tiny-df,tiny-next-clip,tiny-causal} [--steps N]``.

Flow matching (target v = noise - x0) on clips drawn on the fly. Muon moves the block matrices, AdamW the rest;
warm-up, then linear decay; an exponential moving average is what gets written. Resumable: the state is saved every few
minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.schedule import shifted

from .codec import WEIGHTS, TinyCodec
from .data import render, simulate
from .generate import SHIFT
from .model import MODELS, TinyConfig, TinyWan, load_model, save_model
from .prompt import embed_scenes

STATE = Path(__file__).with_name("training")
LENGTHS = (16, 16, 8, 4, 4)  # latent frames of a clip of tiny-df; shorter clips, more of them: more scenes a step


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz in fp32, matrices of one shape in one batch.

    ``torch.optim.Muon`` iterates in bfloat16 one matrix at a time, which takes as long as the whole step on a CPU
    without bfloat16 units.
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
                for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
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


def noise_levels(generator: torch.Generator, clips: int, frames: int, block: int = 4) -> Tensor:
    """Noise level of each latent frame ``[B, T]``: independent, shared or a staircase, half of the clips with a
    clean prefix."""
    independent = shifted(torch.sigmoid(torch.randn(clips, frames, generator=generator)), SHIFT)
    shared = shifted(torch.sigmoid(torch.randn(clips, 1, generator=generator)), SHIFT).expand(-1, frames)
    lag = torch.randint(1, 16, (clips, 1), generator=generator) / 50
    index = torch.arange(frames)[None] // block
    depth = (frames - 1) // block * lag
    start = torch.rand(clips, 1, generator=generator) * (1 + depth) - depth
    staircase = shifted((start + index * lag).clamp(0, 1), SHIFT)
    pick = torch.rand(clips, 1, generator=generator)
    sigma = torch.where(pick < 0.3, independent, torch.where(pick < 0.55, shared, staircase))
    prefix = torch.randint(1, max(2, frames // 2 + 1), (clips, 1), generator=generator)
    prefix = torch.where(
        torch.rand(clips, 1, generator=generator) < 0.6, torch.full_like(prefix, min(block, frames - 1)), prefix
    )
    prefix = prefix * (torch.rand(clips, 1, generator=generator) < 0.5)
    return torch.where(torch.arange(frames)[None] < prefix, torch.zeros(()), sigma)


class Objective:
    """Draws batches of one regime and gives the loss; ``model`` may be compiled."""

    def __init__(self, kind: str, codec: TinyCodec, clips: int, device: torch.device) -> None:
        self.kind, self.codec, self.count, self.device = kind, codec, clips, device

    def clips(self, seed: int, frames: int) -> tuple[Tensor, Tensor]:
        """Latents and prompts of a batch, as many frames in all whatever a clip's length."""
        scenes = simulate(seed, self.count * max(1, 16 // frames), frames)
        return self.codec.encode(render(scenes)), embed_scenes(scenes)

    def velocity(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """The model's answer, on its device and in its precision; on the host in fp32."""
        half = self.device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return model(*(value.to(self.device) for value in inputs)).float().cpu()

    def loss(self, model: nn.Module, seed: int) -> Tensor:
        """Flow-matching loss of one batch; the batch follows from the seed alone."""
        generator = torch.Generator().manual_seed(seed + 1)
        frames = {"tiny-causal": 32, "tiny-next-clip": 16}.get(self.kind)
        if frames is None:
            frames = LENGTHS[int(torch.randint(len(LENGTHS), (1,), generator=generator))]
        x0, context = self.clips(seed, frames)
        context = context * (torch.rand(len(context), 1, 1, generator=generator) >= 0.1)
        noise = torch.randn(x0.shape, generator=generator)
        if self.kind == "tiny-causal":
            return self.causal(model, x0, noise, context, generator)
        if self.kind == "tiny-next-clip":
            told = shifted(torch.sigmoid(torch.randn(len(x0), 1, generator=generator)), SHIFT).expand(-1, frames)
            history = 4 * (torch.rand(len(x0), 1, generator=generator) < 0.75)
            sigma = torch.where(torch.arange(frames)[None] < history, torch.zeros(()), told)
        else:
            told = sigma = noise_levels(generator, len(x0), frames)
        x = torch.lerp(x0, noise, sigma[:, None, :, None, None])
        out = self.velocity(model, x, told, context, torch.arange(frames))
        error = (out - (noise - x0)).square().mean((1, 3, 4))
        return (error * (sigma > 0)).sum() / (sigma > 0).sum().clamp(min=1)

    def causal(
        self, model: nn.Module, x0: Tensor, noise: Tensor, context: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Teacher forcing: clean blocks and noisy blocks in one sequence; a noisy block sees the clean ones before
        it."""
        clips, _, frames = x0.shape[:3]
        sigma = shifted(torch.sigmoid(torch.randn(clips, frames // 4, generator=generator)), SHIFT).repeat_interleave(
            4, 1
        )
        x = torch.lerp(x0, noise, sigma[:, None, :, None, None])
        slip = 0.08 * torch.rand(clips, 1, 1, 1, 1, generator=generator)  # clean history is never perfect when sampled
        history = x0 + slip * torch.randn(x0.shape, generator=generator)
        positions = torch.arange(frames).repeat(2)
        told = torch.cat((torch.zeros_like(sigma), sigma), 1)
        mask = teacher_mask(frames, 16, 4)
        out = self.velocity(model, torch.cat((history, x), 2), told, context, positions, mask)
        return (out[:, :, frames:] - (noise - x0)).square().mean()


def teacher_mask(frames: int, tokens: int, block: int) -> Tensor:
    """``[2N, 2N]`` bool for a clean copy followed by a noisy one."""
    index = (torch.arange(frames * tokens) // (tokens * block)).repeat(2)
    noisy = torch.arange(2 * frames * tokens) >= frames * tokens
    earlier, same = index[None] < index[:, None], index[None] == index[:, None]
    return torch.where(noisy[:, None], (~noisy[None] & earlier) | (noisy[None] & same), ~noisy[None] & (earlier | same))


def train(kind: str, steps: int, seed: int, rate: float, clips: int, compiled: bool) -> None:
    """Runs or resumes one training and writes ``demo/weights/diffusion_models/<kind>.safetensors`` and its loss curve.

    Without a saved state it starts from the model's own weights where there are any, else from those of ``tiny-df``.
    """
    STATE.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    config = replace(TinyConfig(), kind=kind, causal_ar=kind == "tiny-causal")
    model = TinyWan(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = next(
        (file for file in (MODELS / f"{kind}.safetensors", MODELS / "tiny-df.safetensors") if file.exists()), None
    )
    if start is not None:
        model.load_state_dict(load_model(start).state_dict())
    model.to(device)
    objective = Objective(kind, TinyCodec.load(), clips, device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimisers = [Muon(matrices, 0.02 * rate), torch.optim.AdamW(rest, 2e-3 * rate, (0.9, 0.98), weight_decay=0.01)]
    base = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    curve: list[tuple[int, float]] = []
    first, path = 0, STATE / f"{kind}.pt"
    if path.exists():
        saved = torch.load(path, device)
        model.load_state_dict(saved["model"])
        average, first, curve = saved["average"], saved["step"], saved["curve"]
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
    call = torch.compile(model, dynamic=False) if compiled else model
    running, since = [], time.time()

    def save(step: int) -> None:
        state = [optimiser.state_dict() for optimiser in optimisers]
        torch.save(
            {"model": model.state_dict(), "average": average, "step": step, "curve": curve, "optimisers": state}, path
        )
        averaged = TinyWan(config)
        averaged.load_state_dict(average)
        MODELS.mkdir(parents=True, exist_ok=True)
        save_model(averaged, MODELS / f"{kind}.safetensors", notes={"steps": str(step), "seed": str(seed)})
        (WEIGHTS / f"{kind}.loss.json").write_text(json.dumps({"steps": steps, "seed": seed, "curve": curve}))

    for step in range(first, steps):
        factor = min((step + 1) / min(150, steps / 10), max(0.02, (steps - step) / steps * 1.1), 1.0)
        for group, value in zip((g for o in optimisers for g in o.param_groups), base, strict=True):
            group["lr"] = value * factor
        loss = objective.loss(call, seed * 1_000_003 + step * 17)
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        running.append(loss.item())
        if (step + 1) % 25 == 0:
            curve.append((step + 1, round(sum(running) / len(running), 5)))
            print(f"{kind} {step + 1}/{steps} loss {curve[-1][1]:.4f} {time.time() - since:.0f}s", flush=True)
            running = []
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save(step + 1)


def fit_codec(seed: int) -> None:
    """Fits the codec and prints what it keeps of held-out clips."""
    codec = TinyCodec.fit(render(simulate(seed, 600, 4)))
    held_out = render(simulate(seed + 1, 100, 4))
    error = F.mse_loss(codec.decode(codec.encode(held_out)), held_out)
    WEIGHTS.mkdir(exist_ok=True)
    codec.save(WEIGHTS / "tiny-codec.safetensors")
    print(f"tiny-codec: {-10 * error.log10():.2f} dB on held-out clips")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("codec", "tiny-df", "tiny-next-clip", "tiny-causal"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--clips", type=int, default=16, help="clips of one step")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on both learning rates")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    arguments = parser.parse_args()
    if arguments.kind == "codec":
        fit_codec(arguments.seed)
    else:
        train(arguments.kind, arguments.steps, arguments.seed, arguments.rate, arguments.clips, not arguments.eager)


if __name__ == "__main__":
    main()
