"""Does a quality target hold, and at what cost: ``python -m bench.auto [--seeds N] [--models ...] [--targets ...]``.

Every target, with one setting for all models, beside thresholds set by hand (``HAND``: settings of the table's
``tri-modal``, the presets among them). Each seed has a prompt of its own and is compared with its own full run. Prints,
for each model and target, the FLOP ratio, PSNR (mean, least, most) and what the hand-set curve has at the same FLOPs:
PSNR interpolated between its mean points over 1 / ratio. Writes ``bench/results/auto.json``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import torch

from accel.engine import Acceleration
from accel.metrics import psnr
from accel.presets import quality_target
from accel.sampling import SegmentPlan
from demo.codec import TinyCodec
from demo.generate import CAUSAL_FRAMES, MODELS, PLAN, Result, sample, sample_causal, start_noise
from demo.model import TinyWan, load_model

from .__main__ import RESULTS
from .methods import METHODS, PATH
from .scenes import PLANS, Scene, prompt

KINDS = ("tiny-df", "tiny-next-clip", "tiny-causal")
SHORT = SegmentPlan(frames=28, segment=16, overlap=4, block=4, ar_step=5, steps=50)


HAND = {f"{setting[0]} in a row": setting for setting in (PATH[0], PATH[1], PATH[3], PATH[5], PATH[7], PATH[9])}


def by_hand(kind: str) -> dict[str, Acceleration]:
    """Thresholds set by hand for a model, by name."""
    scene = Scene(kind, PLANS[kind])
    return {name: METHODS["tri-modal"].build(setting, scene)["acceleration"] for name, setting in HAND.items()}


def run(kind: str, model: TinyWan, seed: int, short: bool, acceleration: Acceleration | None = None) -> Result:
    """One video as the presets are measured; ``short`` ones have about half the latent frames."""
    if kind == "tiny-causal":
        noise = start_noise(seed, CAUSAL_FRAMES // 2 if short else CAUSAL_FRAMES)
        return sample_causal(model, prompt(seed), noise, acceleration)
    plan = SHORT if short else PLAN
    plan = replace(plan, ar_step=0) if kind == "tiny-next-clip" else plan
    return sample(model, prompt(seed), start_noise(seed, plan.frames), acceleration, plan)


def at_ratio(ratio: float, curve: list[tuple[float, float]]) -> float | None:
    """PSNR of a curve of (FLOP ratio, PSNR), straight in 1 / ratio between points; None beyond its ends."""
    points = sorted((1.0 / entry, value) for entry, value in curve)
    for (left, low), (right, high) in pairwise(points):
        if left <= 1.0 / ratio <= right:
            return low + (high - low) * (1.0 / ratio - left) / (right - left)
    return None


def table(rows: list[dict], kinds: list[str], targets: list[float]) -> list[str]:
    """Markdown lines."""
    lines = [
        "| model | target dB | FLOPs | PSNR dB, mean (least to most) | median | by hand at these FLOPs |",
        "|-|-|-|-|-|-|",
    ]
    for kind in kinds:
        found = {
            method: [row for row in rows if (row["model"], row["method"]) == (kind, method)]
            for method in {row["method"] for row in rows}
        }
        curve = [tuple(fmean(row[key] for row in found[name]) for key in ("flop_ratio", "psnr")) for name in HAND]
        for target in targets:
            chosen = found[f"target {target:g}"]
            ratio, values = fmean(row["flop_ratio"] for row in chosen), [row["psnr"] for row in chosen]
            hand = at_ratio(ratio, curve)
            lines.append(
                f"| {kind} | {target:g} | {ratio:.2f}x | {fmean(values):.2f} ({min(values):.1f} to {max(values):.1f}) "
                f"| {median(values):.2f} | {'-' if hand is None else f'{hand:.2f}'} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--targets", nargs="+", type=float, default=[30.0, 35.0, 40.0])
    parser.add_argument("--weights", type=Path, default=MODELS, help="folder of the checkpoints")
    parser.add_argument("--short", action="store_true", help="two segments, half the blocks")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    targets = {f"target {target:g}": quality_target(target) for target in arguments.targets}
    codec, rows = TinyCodec.load(), []
    for kind in arguments.models:
        model = load_model(arguments.weights / f"{kind}.safetensors")
        for seed in range(1, arguments.seeds + 1):
            full = run(kind, model, seed, arguments.short)
            reference = codec.decode(full.latents)
            for method, acceleration in (by_hand(kind) | targets).items():
                made = run(kind, model, seed, arguments.short, acceleration)
                rows.append({
                    "model": kind, "method": method, "seed": seed,
                    "flop_ratio": made.timeline.totals()["flop_ratio"],
                    "psnr": psnr(reference, codec.decode(made.latents)),
                    "note": made.timeline.settings.get("auto"),
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "auto.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(rows, arguments.models, arguments.targets)))


if __name__ == "__main__":
    main()
