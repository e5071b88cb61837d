"""``python -m bench``: the accelerated runs of ``tiny-df`` against fewer steps at every budget.

Writes ``bench/results/quality.json``: ``{"rows": [...]}``, one row a method and seed, puts the presets' means into
``accel/presets.json``, and prints the means with a 95 % bootstrap interval over seeds. FLOPs are counted
(``accel.flops.CONVENTION``); seconds are process time on one thread.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from accel.engine import Acceleration
from accel.presets import MEASURED_ON, PRESETS, TABLE
from demo.codec import TinyCodec
from demo.generate import PLAN, fewer_steps, load, sample, start_noise

from .presets import mean, store
from .runs import prompt, row

RESULTS = Path(__file__).with_name("results")
BUDGETS = (2.0, 2.5, 3.0, 4.0, 4.5)


def measure(seeds: list[int], methods: dict[str, Acceleration]) -> list[dict]:
    """Rows of all methods and budgets, seed by seed (each seed with a prompt of its own)."""
    model, codec = load("tiny-df"), TinyCodec.load()
    rows = []
    for seed in seeds:
        context, noise = prompt(seed), start_noise(seed, PLAN.frames)
        full = sample(model, context, noise, plan=PLAN)
        rows.append(row(codec, "full", False, None, seed, full, full))
        for name, acceleration in methods.items():
            rows.append(row(codec, name, True, None, seed, full, sample(model, context, noise, acceleration, PLAN)))
        one = full.timeline.totals()["flops"] // PLAN.calls()
        for budget in BUDGETS:
            plan = fewer_steps(PLAN, int(full.timeline.totals()["flops"] / budget), one)
            run = sample(model, context, noise, plan=plan)
            rows.append(row(codec, "fewer-steps", False, budget, seed, full, run))
        print(f"seed {seed} done", flush=True)
    return rows


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    dice = random.Random(0)
    means = sorted(fmean(dice.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def table(rows: list[dict]) -> str:
    """Means over seeds as a Markdown table."""
    lines = ["| method | FLOPs | realised | PSNR (95 %) | SSIM | latent error | drift dB/segment |", "|-|-|-|-|-|-|-|"]
    groups: dict[tuple, list[dict]] = {}
    for entry in rows:
        groups.setdefault((entry["method"], entry["budget"]), []).append(entry)
    for (method, _), group in sorted(groups.items(), key=lambda item: item[1][0]["flop_ratio"]):
        if group[0]["psnr"] is None:
            continue
        values = [entry["psnr"] for entry in group]
        low, high = interval(values)
        means = {
            key: fmean(entry[key] for entry in group)
            for key in ("flop_ratio", "realised", "ssim", "latent_rel_l2", "drift_db_per_segment")
        }
        lines.append(
            f"| {method} | {means['flop_ratio']:.2f}x | {means['realised']:.2f} | {fmean(values):.2f} ({low:.2f} to "
            f"{high:.2f}) | {means['ssim']:.3f} | {means['latent_rel_l2']:.3f} | {means['drift_db_per_segment']:+.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods = {preset.name: preset.acceleration for preset in PRESETS if preset.model == MEASURED_ON}
    presets = tuple(methods)
    methods |= {f"{name}, suffix window": replace(methods[name], suffix_window=True) for name in ("balanced", "fast")}
    rows = measure(list(range(1, arguments.seeds + 1)), methods)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "quality.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if arguments.output == RESULTS:
        known = json.loads(TABLE.read_text(encoding="utf-8"))
        figures = {name: mean([entry for entry in rows if entry["method"] == name]) for name in presets}
        store(known, MEASURED_ON, figures, arguments.seeds, "make bench")
        TABLE.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    text = table(rows)
    (arguments.output / "quality.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
