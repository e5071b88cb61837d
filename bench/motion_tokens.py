"""``python -m bench.motion_tokens``: does recomputing tokens instead of chunks hold its promise (arXiv 2605.01725)?

MotionCache: every token has an accumulator ``A += d w`` and is computed where it reaches a threshold; ``w`` is larger
where the video moves. Tokens that are not computed take a line through their last two true velocities, and answer the
attention of the others with the keys and values of their last forward. Weights: ``motion`` (0.6 to 1 by the difference
of neighbouring frames), ``shuffled`` (the same numbers at other places, a negative control) and ``even`` (their mean
everywhere, which computes whole chunks, as Chunk Cache does). If moving tokens are what has to be computed, ``motion``
has more PSNR than the other two at equal FLOPs.

Reading: the change ``d`` is that of the ``log-signal``; motion is taken from the clip that the last velocities foresee;
a place is computed in all frames of a chunk when more than half of them ask for it (the paper's spatial vote); the
first ``WARMUP`` steps of a chunk and its last are computed whole.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch
from einops import rearrange
from torch import Tensor

from accel.call import Call, Decision
from accel.denoiser import Denoiser
from accel.kv.frozen import FrozenKV
from accel.metrics import psnr
from accel.sampling import SegmentPlan
from accel.signals import log_signal
from accel.timeline import Timeline
from demo.generate import load, sample, start_noise
from demo.model import PATCH

from .peers.base import MakeRun, PeerRun
from .runs import codec
from .scenes import prompt

RESULTS = Path(__file__).with_name("results")
PLAN = SegmentPlan(frames=28, segment=16, overlap=4, block=4, ar_step=5, steps=50)
WEIGHTINGS = ("motion", "shuffled", "even")
THRESHOLDS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
WARMUP, FLOOR = 5, 0.6


class TokenStore:
    """Kept keys and values that single tokens of the window can be written to."""

    def __init__(self, store: FrozenKV, index: Tensor, window: tuple[int, int]) -> None:
        self.store, self.index, self.window = store, index, window

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As an attention block asks: keeps those of the tokens, gives those of the window."""
        return self.store.exchange_tokens(layer, key, value, self.index, self.window)


class IndexedKV(FrozenKV):
    """``FrozenKV`` by token."""

    def exchange_tokens(
        self, layer: int, key: Tensor, value: Tensor, index: Tensor, window: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Keeps ``key`` and ``value`` ``[B, n, ...]`` of tokens ``index`` of the window and returns the window's."""
        first, last = (frame * self.tokens for frame in window)
        kept = self._slot(layer, key, value)
        for store, new in zip(kept, (key, value), strict=True):
            store[:, first + index] = new
        return tuple(store[:, first:last] for store in kept)


class TokenRun(PeerRun):
    """``threshold`` on what a token has accumulated; ``weighting`` is one of ``WEIGHTINGS``."""

    title, depth = "MotionCache", 0

    def __init__(self, denoiser: Denoiser, timeline: Timeline, threshold: float, weighting: str, block: int) -> None:
        super().__init__(denoiser, timeline)
        self.threshold, self.weighting, self.block = threshold, weighting, block
        self.dice = torch.Generator().manual_seed(0)

    def reset(self, frames: int) -> None:
        """A segment of ``frames`` latent frames starts."""
        self.levels: dict[int, float] = {}
        self.velocity: Tensor | None = None
        self.total = frames

    def decide(self, call: Call, x: Tensor) -> Decision:
        """Fills ``chosen``, the tokens ``[T, h, w]`` to compute."""
        height, width = x.shape[3] // PATCH, x.shape[4] // PATCH
        if self.velocity is None:
            self._open(x, height, width)
        first = call.frames[0]
        chosen = torch.zeros(x.shape[2], height, width, dtype=torch.bool)
        foreseen = (
            x
            - self.sigma[0][None, None, first : first + x.shape[2]] * self.velocity[0][:, :, first : first + x.shape[2]]
        )
        for start in range(0, x.shape[2], self.block):
            part = slice(start, min(start + self.block, x.shape[2]))
            if any(call.active[part]):
                chosen[part] = self._asked(call, part, foreseen)
            else:
                chosen[part] = ~self.seen[first + part.start : first + part.stop]
        self.levels.update(enumerate(call.sigmas, first))
        self.chosen = chosen
        return Decision.RECOMPUTE if chosen.any() else Decision.PREDICT

    def answer(self, call: Call, x: Tensor, decision: Decision) -> Tensor:
        """A line through the last two true velocities of every token, and the model where one was chosen."""
        window = slice(call.frames[0], call.frames[1])
        sigma = torch.tensor(call.sigmas)[:, None, None].expand(-1, *x.shape[3:])
        newest, older = (value[:, :, window] for value in self.velocity)
        last, before = (value[window] for value in self.sigma)
        slope = torch.where((last - before).abs() > 1e-6, (sigma - last) / (last - before), 0.0).clamp(-2, 2)
        line = torch.where(self.count[window] > 1, newest + slope * (newest - older), newest)
        if not self.chosen.any():
            return line
        computed = self._forward(call, x)
        mask = self._pixels(self.chosen)
        repeated = mask & ((sigma - last).abs() <= 1e-6) & (self.count[window] > 0)
        moved = mask & ~repeated
        self.velocity[1][:, :, window] = torch.where(moved, newest, older)
        self.sigma[1][window] = torch.where(moved, last, before)
        self.velocity[0][:, :, window] = torch.where(mask, computed, newest)
        self.sigma[0][window] = torch.where(mask, sigma, last)
        self.count[window] += moved
        self.seen[window] |= self.chosen
        self.sums[window] = torch.where(self.chosen, 0.0, self.sums[window])
        return torch.where(mask, computed, line)

    def learn(self, call: Call, x: Tensor, velocity: Tensor) -> None:
        """All is learned in ``answer``."""

    @property
    def state_bytes(self) -> int:
        """Bytes of the velocities and of the kept keys and values."""
        return 2 * self.velocity[0].nbytes + self.kept.nbytes

    def _open(self, x: Tensor, height: int, width: int) -> None:
        shape = (x.shape[0], x.shape[1], self.total, *x.shape[3:])
        self.velocity = [torch.zeros(shape), torch.zeros(shape)]
        self.sigma = [torch.ones(self.total, *x.shape[3:]), torch.ones(self.total, *x.shape[3:])]
        self.count = torch.zeros(self.total, *x.shape[3:], dtype=torch.int32)
        self.sums = torch.zeros(self.total, height, width)
        self.seen = torch.zeros(self.total, height, width, dtype=torch.bool)
        self.kept = IndexedKV(self.denoiser.shape.layers, self.total, height * width)

    def _asked(self, call: Call, part: slice, foreseen: Tensor) -> Tensor:
        """Tokens ``[T, h, w]`` of one active chunk to compute."""
        first = call.frames[0]
        frames = slice(first + part.start, first + part.stop)
        step, sigma = call.steps[part.start], call.sigmas[part.start]
        if step <= WARMUP or step == call.total_steps or not self.seen[frames].all():
            return torch.ones_like(self.seen[frames])
        change = abs(log_signal(sigma) - log_signal(self.levels[frames.start]))
        self.sums[frames] += change * self._weights(foreseen[:, :, part])
        over = self.sums[frames] >= self.threshold
        return (over.float().mean(0, keepdim=True) > 0.5).expand_as(over)

    def _weights(self, clip: Tensor) -> Tensor:
        """``[T, h, w]`` from the motion of ``clip`` ``[B, C, T, H, W]``."""
        moving = clip.diff(dim=2).abs().mean((0, 1))
        moving = torch.cat((moving[:1], moving))
        moving = rearrange(moving, "t (h p) (w q) -> t h w (p q)", p=PATCH, q=PATCH).mean(-1)
        weights = FLOOR + (1.0 - FLOOR) * moving / moving.max().clamp_min(1e-8)
        if self.weighting == "even":
            return weights.mean().expand_as(weights)
        if self.weighting == "shuffled":
            flat = weights.flatten(1)
            return flat[:, torch.randperm(flat.shape[1], generator=self.dice)].view_as(weights)
        return weights

    def _forward(self, call: Call, x: Tensor) -> Tensor:
        """Guided velocity of the window where a token was chosen, 0 elsewhere."""
        denoiser, frames = self.denoiser, x.shape[2]
        latents, sigma, context, positions, _ = denoiser.inputs(call, x)
        model, per_frame = denoiser.model, self.chosen[0].numel()
        tokens, rotations = model.embed(latents, positions)
        index = self.chosen.flatten().nonzero().flatten()
        e, modulation = (value[:, index // per_frame] for value in model.embed_time(sigma))
        text = model.text_embedding(context)
        some, store = tokens[:, index], TokenStore(self.kept, index, call.frames)
        for layer, block in enumerate(model.blocks):
            some = block(some, modulation, rotations[index], text, None, store, layer)
        out = tokens.new_zeros(len(latents), tokens.shape[1], x.shape[1] * PATCH * PATCH)
        out[:, index] = model.head(some, e)
        shape, branches = denoiser.shape, denoiser.size(1)[1]
        count = shape.patch_flops(len(index)) + shape.text_flops()
        count += shape.time_flops(int(self.chosen.any(2).any(1).sum()))
        count += shape.layers * shape.block_flops(len(index), tokens.shape[1]) + shape.head_flops(len(index))
        self.spent += branches * count
        height, width = self.chosen.shape[1:]
        return denoiser.guided(
            rearrange(
                out, "b (t h w) (p q c) -> b c t (h p) (w q)", t=frames, h=height, w=width, p=PATCH, q=PATCH
            ).contiguous()
        )

    @staticmethod
    def _pixels(tokens: Tensor) -> Tensor:
        return tokens.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)


def make(threshold: float, weighting: str, block: int = 4) -> MakeRun:
    """A run with this threshold and weighting."""
    return lambda denoiser, timeline: TokenRun(denoiser, timeline, threshold, weighting, block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, rows = load("tiny-df"), []
    for seed in range(1, arguments.seeds + 1):
        context, noise = prompt(seed), start_noise(seed, PLAN.frames)
        reference = codec().decode(sample(model, context, noise, plan=PLAN).latents)
        for weighting in WEIGHTINGS:
            for threshold in THRESHOLDS:
                made = sample(model, context, noise, plan=PLAN, make_run=make(threshold, weighting))
                rows.append({
                    "weights": weighting, "threshold": threshold, "seed": seed,
                    "flop_ratio": made.timeline.totals()["flop_ratio"],
                    "psnr": psnr(reference, codec().decode(made.latents)),
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    lines = ["| threshold | " + " | ".join(WEIGHTINGS) + " |", "|-" * (len(WEIGHTINGS) + 1) + "|"]
    for threshold in THRESHOLDS:
        cells = []
        for weighting in WEIGHTINGS:
            found = [row for row in rows if (row["weights"], row["threshold"]) == (weighting, threshold)]
            cells.append(f"{fmean(r['flop_ratio'] for r in found):.2f}x {fmean(r['psnr'] for r in found):.1f} dB")
        lines.append(f"| {threshold:g} | " + " | ".join(cells) + " |")
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "motion_tokens.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "motion_tokens.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
