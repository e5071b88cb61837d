"""Trains the tiny models: ``python -m demo.train {codec,tiny-df,tiny-next-clip,tiny-causal} [--steps N]``.

Flow matching (target v = noise - x0) on clips drawn on the fly, then guidance distillation for the causal model
(``--distil``). Muon moves the block matrices, AdamW the rest; warm-up, then linear decay; an exponential moving average
is what gets written, after distillation its weighted mean with the teacher. Resumable: the state is saved every few
minutes. ``--mean`` trains nothing and writes the mean of weights instead (model soup, Wortsman et al. 2022).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec import WEIGHTS, TinyCodec
from .data import render, simulate
from .model import MODELS, TinyConfig, TinyWan, load_model, save_model
from .train_forward import HalfForward
from .train_muon import Muon, has_bfloat16
from .train_objective import Objective

STATE = Path(__file__).with_name("training")
TOGETHER = 5  # steps after which parallel workers average what they learned


class Together:
    """Parallel workers of one training: each learns from batches of its own and all take the mean of their parameters
    every few steps (local SGD), which costs next to nothing where waiting for each other at every step would not."""

    def __init__(self, workers: int, parameters: int) -> None:
        self.workers = workers
        self.board = torch.zeros(workers, parameters).share_memory_()
        self.barrier = torch.multiprocessing.get_context("spawn").Barrier(workers)

    def average(self, rank: int, model: nn.Module) -> None:
        """Gives every worker's ``model`` the mean parameters."""
        self.board[rank] = nn.utils.parameters_to_vector(model.parameters()).detach()
        self.barrier.wait()
        mean = self.board.mean(0)
        self.barrier.wait()
        nn.utils.vector_to_parameters(mean, model.parameters())


def newest(*kinds: str) -> Path | None:
    """The weights a training without a saved state starts from: of the first of these models that has any, those that
    were left in ``demo/training`` to be trained further, else the released ones."""
    files = (folder / f"{kind}.safetensors" for kind in kinds for folder in (STATE, MODELS))
    return next((file for file in files if file.exists()), None)


def curve_until(start: Path | None, title: str) -> list[tuple[int, float]]:
    """Loss curve of the weights that the training ``title`` starts from, where those are its own model's."""
    if start is None or start.stem != title:
        return []
    path = (WEIGHTS if start.parent == MODELS else STATE) / f"{title}.loss.json"
    return [tuple(point) for point in json.loads(path.read_text())["curve"]] if path.exists() else []


def between(teacher: dict[str, Tensor], distilled: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights on the straight line from a teacher (``share`` 0) to what was distilled from it (1): guidance is learnt
    at the cost of motion, and a mean of both does well at both (as Wortsman et al. 2022 found of fine-tuned models)."""
    return {name: value.lerp(distilled[name], share) for name, value in teacher.items()}


def train(rank: int, options: argparse.Namespace, together: Together) -> None:
    """Runs or resumes one worker of a training; the first one writes the weights and the loss curve."""
    kind, steps = options.kind, options.steps
    if together.workers > 1:
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {rank})
    STATE.mkdir(exist_ok=True)
    torch.manual_seed(options.seed)
    config = replace(TinyConfig(), kind=kind, causal_ar=kind == "tiny-causal")
    model = TinyWan(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = newest(options.start) if options.start else newest(kind, "tiny-df")
    if start is not None:
        model.load_state_dict(load_model(start).state_dict())
    model.to(device)
    teacher = None
    if options.distil:
        teacher = TinyWan(config)
        teacher.load_state_dict(model.state_dict())
        teacher.to(device).requires_grad_(False)
    half = HalfForward(not options.eager) if device.type == "cpu" and has_bfloat16(device) else None
    objective = Objective(kind, TinyCodec.load(), options.clips, device, teacher, half)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    rates = (0.02 * options.rate, 2e-3 * options.rate)
    optimisers = [Muon(matrices, rates[0]), torch.optim.AdamW(rest, rates[1], (0.9, 0.98), weight_decay=0.01)]
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    title = f"{kind}-distilled" if options.distil else kind
    curve = curve_until(start, title)
    earlier = curve[-1][0] if curve else 0
    first, path = 0, STATE / f"{title}.pt"
    if path.exists():
        saved = torch.load(path, device)
        model.load_state_dict(saved["model"])
        if teacher is not None:
            teacher.load_state_dict(saved["teacher"])
        average, first, curve, earlier = (saved[name] for name in ("average", "step", "curve", "earlier"))
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
    if half is None and not options.eager:
        for block in (*model.blocks, *(teacher.blocks if teacher else ())):
            block.compile(dynamic=False)
    running, since = [], time.time()

    def save(step: int) -> None:
        state = [optimiser.state_dict() for optimiser in optimisers]
        kept = {"average": average, "step": step, "curve": curve, "earlier": earlier, "optimisers": state}
        notes = {"steps": str(earlier + step), "seed": str(options.seed)}
        written = TinyWan(config)
        if teacher is None:
            written.load_state_dict(average)
        else:
            kept["teacher"] = teacher.state_dict()
            written.load_state_dict(between(kept["teacher"], average, options.share))
            notes["distilled"] = str(options.share)
        torch.save({"model": model.state_dict()} | kept, path)
        MODELS.mkdir(parents=True, exist_ok=True)
        save_model(written, MODELS / f"{kind}.safetensors", notes=notes)
        told = {"steps": earlier + steps, "seed": options.seed, "curve": curve}
        (WEIGHTS / f"{title}.loss.json").write_text(json.dumps(told))

    for step in range(first, steps):
        factor = min((step + 1) / min(150, steps / 10), max(0.02, (steps - step) / steps * 1.1), 1.0)
        for optimiser, value in zip(optimisers, rates, strict=True):
            optimiser.param_groups[0]["lr"] = value * factor
        loss = objective.loss(model, options.seed * 1_000_003 + ((earlier + step) * together.workers + rank) * 17)
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if together.workers > 1 and (step + 1) % TOGETHER == 0:
            together.average(rank, model)
        decay = min(0.998, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        running.append(loss.item())
        if rank == 0 and (step + 1) % 25 == 0:
            curve.append((earlier + step + 1, round(sum(running) / len(running), 5)))
            print(f"{title} {step + 1}/{steps} loss {curve[-1][1]:.4f} {time.time() - since:.0f}s", flush=True)
            running = []
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == steps):
            save(step + 1)


def soup(kind: str, files: list[Path]) -> None:
    """Writes the mean of these weights as those of ``kind``: ends of one training one after the other, each a good
    place in the same valley, whose middle is a better one."""
    states = [load_model(file).state_dict() for file in files]
    model = load_model(files[0])
    if model.config.kind != kind:
        raise SystemExit(f"{files[0].name} holds a {model.config.kind}; give weights of {kind}.")
    model.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    save_model(model, MODELS / f"{kind}.safetensors", notes={"mean of": str(len(files))})


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
    parser.add_argument("--workers", type=int, default=1, help="processes that train one model, one CPU core each")
    parser.add_argument(
        "--start", choices=("tiny-df", "tiny-next-clip", "tiny-causal"), help="model to start from, if not its own"
    )
    parser.add_argument(
        "--distil", action="store_true", help="tiny-causal: learn to need no guidance, from its weights"
    )
    parser.add_argument(
        "--share", type=float, default=0.25, help="of the distilled weights in what is written, the rest the teacher's"
    )
    parser.add_argument("--mean", nargs="+", type=Path, metavar="FILE", help="write the mean of these weights instead")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    arguments = parser.parse_args()
    if arguments.distil and arguments.kind != "tiny-causal":
        parser.error("--distil is for tiny-causal, whose sampler in ComfyUI takes four steps without guidance")
    if not 0 <= arguments.share <= 1:
        parser.error(f"--share is {arguments.share}; give a share from 0 (the teacher) to 1 (the distilled model)")
    if arguments.kind == "codec":
        fit_codec(arguments.seed)
    elif arguments.mean:
        soup(arguments.kind, arguments.mean)
    else:
        together = Together(arguments.workers, sum(p.numel() for p in TinyWan(TinyConfig()).parameters()))
        if arguments.workers == 1:
            train(0, arguments, together)
        else:
            torch.multiprocessing.spawn(train, (arguments, together), arguments.workers)


if __name__ == "__main__":
    main()
