"""``python -m bench.ablation``: which choice behind the defaults does what, one at a time, on ``tiny-df``.

Every variant runs in closed loop against the full run of the same seed. Writes ``bench/results/ablation.json`` (rows as
in ``bench``) and ``ablation.md``. The calls of one variant differ from another's, so compare along the curve: more PSNR
at the same FLOP ratio, or more ratio at the same PSNR.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from accel.call import Decision
from accel.correct import CorrectionConfig
from accel.engine import Acceleration, HistoryGuidedConfig, SchedulerConfig
from accel.presets import BALANCED, FAST
from demo.generate import PLAN, load, sample, start_noise

from .__main__ import RESULTS
from .runs import Reference, row
from .scenes import Scene, prompt

SIGNAL_LEVELS = {  # tau_predict on each signal, from mild to bold
    "log-snr": (1.0, 2.0, 4.0),
    "log-signal": (1.5, 3.0, 6.0),
    "timestep": (0.15, 0.3, 0.6),
    "current": (0.1, 0.2, 0.4),
    "latent": (0.2, 0.4, 0.8),
    "history-block0": (0.05, 0.1, 0.2),
}


def scheduled(**options: object) -> Acceleration:
    """The balanced setting with some of its choices changed; ``thresholds`` is a dict of ``TriModalConfig`` fields."""
    thresholds = replace(BALANCED.scheduler.thresholds, **options.pop("thresholds", {}))
    return replace(BALANCED, scheduler=replace(BALANCED.scheduler, thresholds=thresholds, **options))


def fixed_rule(first: tuple[int, ...], every: int) -> Acceleration:
    """A rule that measures nothing: given steps of each block and every n-th row are computed, the others
    predicted."""
    decisions = []
    for matrix in PLAN.matrices():
        for number, (index, active) in enumerate(zip(matrix.index.tolist(), matrix.active.tolist(), strict=True)):
            stepping = [step for step, flag in zip(index, active, strict=True) if flag]
            computed = number % every == 0 or number == matrix.rows - 1 or any(step in first for step in stepping)
            decisions.append(Decision.RECOMPUTE if computed else Decision.PREDICT)
    return Acceleration(scheduler=SchedulerConfig(reach=None), replay=tuple(decisions))


def variants() -> dict[str, dict[str, Acceleration]]:
    """Groups of variants by the choice they vary."""
    groups: dict[str, dict[str, Acceleration]] = {"presets": {"balanced": BALANCED, "fast": FAST}}
    groups["signal (tau_predict)"] = {
        f"{signal} {tau}": scheduled(signal=signal, thresholds={"tau_predict": tau})
        for signal, taus in SIGNAL_LEVELS.items()
        for tau in taus
    }
    groups["reach"] = {str(reach): scheduled(reach=reach) for reach in (None, 1.0, 1.5, 2.0, 3.0)}
    groups["order"] = {str(order): scheduled(order=order) for order in (1, 2, "newton2", "auto")}
    groups["most skips in a row"] = {str(cap): scheduled(thresholds={"max_skip": cap}) for cap in (2, 3, 4, 6, 9)}
    groups["decay"] = {str(decay): scheduled(thresholds={"decay": decay}) for decay in (0.8, 0.9, 1.0)}
    groups["hold instead of predict"] = {"hold": scheduled(thresholds={"tau_cache": 3.0})}
    guided = HistoryGuidedConfig()
    groups["correction of held calls"] = {"none": Acceleration(history_guided=guided)} | {
        source: Acceleration(history_guided=guided, correction=CorrectionConfig(source))
        for source in ("sigma_linear", "seg1_l1")
    }
    groups["fixed rules"] = {
        "steps 1, 2, 4, 6 and every 5th row": fixed_rule((1, 2, 4, 6), 5),
        "steps 1, 6 and every 5th row": fixed_rule((1, 6), 5),
        "steps 1 to 10 and every 5th row": fixed_rule(tuple(range(1, 11)), 5),
    }
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--groups", nargs="*", help="only the groups whose name begins so")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {
        name: group
        for name, group in variants().items()
        if not arguments.groups or any(name.startswith(start) for start in arguments.groups)
    }
    model, scene, rows = load("tiny-df"), Scene("tiny-df", PLAN), []
    for seed in range(1, arguments.seeds + 1):
        context, noise = prompt(seed), start_noise(seed, PLAN.frames)
        reference = Reference.of(sample(model, context, noise, plan=PLAN))
        for name, group in chosen.items():
            for label, acceleration in group.items():
                run = sample(model, context, noise, acceleration, PLAN)
                rows.append({"group": name} | row(scene, label, True, None, seed, reference, run))
        print(f"seed {seed} done", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "ablation.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    lines = [f"Means of {arguments.seeds} seeds, `tiny-df`, {PLAN.steps} steps."]
    for name, group in chosen.items():
        lines += ["", f"| {name} | FLOPs | PSNR dB |", "|-|-|-|"]
        for label in group:
            found = [entry for entry in rows if (entry["group"], entry["method"]) == (name, label)]
            ratio, values = fmean(entry["flop_ratio"] for entry in found), [entry["psnr"] for entry in found]
            told = "equal" if None in values else f"{fmean(values):.1f}"
            lines.append(f"| {label} | {ratio:.2f}x | {told} |")
    (arguments.output / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
