"""What the presets do to the tiny models: ``python -m bench.presets [--seeds N] [--models ...] [--output FILE]``.

Measures every preset of ``accel/presets.json`` in closed loop, each seed with a prompt of its own against the full run
of the same seed, and rewrites the figures of the table; the settings stay as written. With ``--output`` the table goes
there instead.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from math import inf, isfinite
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from accel.engine import Acceleration
from accel.metrics import psnr, ssim
from accel.presets import TABLE, acceleration_of, digest
from accel.sampling import SegmentPlan
from demo.codec import TinyCodec
from demo.generate import (
    CAUSAL_FRAMES,
    GUIDANCE,
    NEXT_CLIP_PLAN,
    PLAN,
    Result,
    load,
    sample,
    sample_causal,
    start_noise,
)
from demo.model import MODELS, TinyWan

from .scenes import prompt

CAUSAL_STEPS = 50
PLANS = {"tiny-df": PLAN, "tiny-next-clip": NEXT_CLIP_PLAN}
DIGITS = {"flop_ratio": 2, "psnr": 2, "ssim": 4}


def plan_of(kind: str, block: int) -> SegmentPlan:
    """How ``run`` samples this model."""
    return PLANS[kind] if kind in PLANS else SegmentPlan(CAUSAL_FRAMES, block, 0, block, 0, CAUSAL_STEPS)


def schedule(kind: str, plan: SegmentPlan) -> str:
    """A plan of this model in words."""
    if kind == "tiny-causal":
        return f"causal blocks, {plan.frames} latent frames, blocks of {plan.block}, {plan.steps} Euler steps, cfg 1"
    mode = "next clip" if kind == "tiny-next-clip" else "diffusion forcing"
    return (
        f"{mode}, {plan.frames} latent frames in segments of {plan.segment} with overlap {plan.overlap}, blocks of "
        f"{plan.block}, ar_step {plan.ar_step}, {plan.steps} Euler steps, cfg {GUIDANCE:g}"
    )


def run(kind: str, model: TinyWan, context: Tensor, seed: int, acceleration: Acceleration | None = None) -> Result:
    """One video of this model as ``schedule`` says, from the noise of ``seed``."""
    if kind not in PLANS:
        return sample_causal(model, context, start_noise(seed, CAUSAL_FRAMES), acceleration, CAUSAL_STEPS)
    return sample(model, context, start_noise(seed, PLANS[kind].frames), acceleration, PLANS[kind])


def measure(kind: str, presets: dict[str, dict], seeds: list[int]) -> dict[str, dict[str, float]]:
    """Mean figures of every preset of one model over the seeds."""
    model, codec = load(kind), TinyCodec.load()
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in presets}
    for seed in seeds:
        context = prompt(seed)
        full = run(kind, model, context, seed)
        reference, cost = codec.decode(full.latents), full.timeline.totals()["flops"]
        for name, row in presets.items():
            result = run(kind, model, context, seed, acceleration_of(row["settings"]))
            video = codec.decode(result.latents)
            ratio = cost / result.timeline.totals()["flops"]
            one = {"flop_ratio": ratio, "psnr": psnr(reference, video), "ssim": ssim(reference, video)}
            figures[name].append(one)
            print(f"{kind} {name} seed {seed}: {ratio:.2f}x, {one['psnr']:.2f} dB, SSIM {one['ssim']:.4f}", flush=True)
    return {name: mean(rows) for name, rows in figures.items()}


def mean(rows: list[dict[str, float]]) -> dict[str, float | None]:
    """Rounded means over the seeds; a PSNR that is infinite, because the videos are equal, is left out of its mean,
    which is None where all are."""
    means = {
        key: fmean(finite) if (finite := [one[key] for one in rows if isfinite(one[key])]) else inf for key in DIGITS
    }
    return {key: round(means[key], digits) if isfinite(means[key]) else None for key, digits in DIGITS.items()}


def rewrite(table: dict, kinds: list[str], seeds: int, command: str) -> None:
    """Measures these models and puts their figures into ``table``."""
    for kind in kinds:
        figures = measure(kind, table["models"][kind]["presets"], list(range(1, seeds + 1)))
        store(table, kind, plan_of(kind, load(kind).config.block), figures, seeds, command)


def fill(table: dict, rows: list[dict], plans: dict[str, SegmentPlan], command: str) -> None:
    """Puts the means of ``rows`` (as in ``quality.json``) into ``table``."""
    for kind, plan in plans.items():
        found: dict[str, list[dict]] = {name: [] for name in table["models"][kind]["presets"]}
        for row in rows:
            if row["model"] == kind and row["method"] in found:
                found[row["method"]].append(row | {"psnr": inf if row["psnr"] is None else row["psnr"]})
        figures = {name: mean(group) for name, group in found.items() if group}
        store(table, kind, plan, figures, max(map(len, found.values())), command)


def store(table: dict, kind: str, plan: SegmentPlan, figures: dict[str, dict], seeds: int, command: str) -> None:
    """Puts the mean figures of a model's presets into ``table``, with what they rest on; what is as it was keeps its
    date."""
    entry = table["models"][kind]
    entry["schedule"] = schedule(kind, plan)
    told = {"seeds": seeds, "date": date.today().isoformat(), "command": command}
    told["weights"] = digest(MODELS / f"{kind}.safetensors")
    for name, values in figures.items():
        preset = entry["presets"][name]
        earlier = {"date": preset.get("measured", {}).get("date")}
        if preset.get("measured") != values | told | earlier:
            preset["measured"] = values | told


def main() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=list(table["models"]), default=list(table["models"]))
    parser.add_argument("--output", type=Path, default=TABLE)
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}; measure 1 seed or more")
    torch.set_num_threads(1)
    rewrite(table, arguments.models, arguments.seeds, f"python -m bench.presets --seeds {arguments.seeds}")
    arguments.output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
