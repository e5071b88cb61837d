"""``python -m bench.fullschedule``: SkyReels-V2's 257-frame schedule on ``tiny-df``, and what such runs cost full size.

Every setting samples the 65 latent frames of the schedule (segments of 25, overlap 5, blocks of 5, 50 steps) in closed
loop; PSNR is against the full run of the same seed. Full-size FLOPs follow from what every call forwarded: its latent
frames as queries over the keys of its window, in Wan 1.3B's shape at 544 x 960, both guidance branches. Writes
``bench/results/fullschedule.json`` and ``fullschedule.md``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from accel.chunks import ChunkConfig
from accel.engine import Acceleration, SchedulerConfig
from accel.flops import WAN_1_3B, WanShape
from accel.kv.frozen import FrozenConfig
from accel.metrics import psnr
from accel.policy import TriModalConfig
from accel.presets import BALANCED, FAST
from accel.timeline import StepRecord

from . import fullsize as full
from .runs import codec
from .scenes import Scene

RESULTS = Path(__file__).with_name("results")
SCENE = Scene("tiny-df", full.SKYREELS)
BETWEEN = Acceleration(scheduler=SchedulerConfig(TriModalConfig(0.0, 9.0, 1.0, 5), reach=None))
DECIDERS = {"balanced": BALANCED, "5 in a row": BETWEEN, "fast": FAST}
WINDOWS = {
    "whole window": {},
    "suffix window": {"suffix_window": True},
    "frozen K/V, refresh 1": {"frozen_window": FrozenConfig(1.0)},
    "frozen K/V, refresh 2": {"frozen_window": FrozenConfig(2.0)},
    "frozen K/V, never renewed": {"frozen_window": FrozenConfig()},
}
CHUNKS = {
    "Chunk Cache": Acceleration(chunks=ChunkConfig()),
    "Chunk Cache, 6 in a row": Acceleration(
        chunks=ChunkConfig(TriModalConfig(0.0, 4.0, 1.0, 6), reach=2.0), frozen_window=FrozenConfig(2.0)
    ),
}


def settings() -> dict[str, Acceleration]:
    """Every decider with every window, and Chunk Cache."""
    made = {
        f"{name}, {window}": replace(acceleration, **parts)
        for name, acceleration in DECIDERS.items()
        for window, parts in WINDOWS.items()
    }
    return made | CHUNKS


def fullsize_flops(records: Iterable[StepRecord], shape: WanShape = WAN_1_3B) -> int:
    """FLOPs of the calls of a run at full size: of every interval that was forwarded, once, over its window's keys."""
    seen, total = set(), 0
    for record in records:
        if record.decision != "recompute":
            continue
        for first, last in record.queries or (record.window,):
            call = (record.segment, record.iteration, first, last)
            if call not in seen:
                seen.add(call)
                keys = (record.window[1] - record.window[0]) * full.TOKENS
                total += shape.forward_flops(last - first, full.TOKENS, keys, branches=full.BRANCHES)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--settings", nargs="+", help="only those whose name begins so")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {
        name: acceleration
        for name, acceleration in settings().items()
        if not arguments.settings or any(name.startswith(start) for start in arguments.settings)
    }
    rows = []
    for seed in range(1, arguments.seeds + 1):
        plain = SCENE.run(seed)
        reference, whole = codec().decode(plain.latents), fullsize_flops(plain.timeline.records)
        for name, acceleration in chosen.items():
            made = SCENE.run(seed, acceleration=acceleration)
            rows.append({
                "setting": name, "seed": seed, "psnr": psnr(reference, codec().decode(made.latents)),
                "fullsize_flop_ratio": whole / fullsize_flops(made.timeline.records),
                "flop_ratio": made.timeline.totals()["flop_ratio"],
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    lines = ["| setting | full-size FLOPs | FLOPs on `tiny-df` | PSNR dB (least to most) |", "|-|-|-|-|"]
    for name in chosen:
        found = [row for row in rows if row["setting"] == name]
        ratio, own, values = ([row[key] for row in found] for key in ("fullsize_flop_ratio", "flop_ratio", "psnr"))
        lines.append(
            f"| {name} | {fmean(ratio):.2f}x | {fmean(own):.2f}x | {fmean(values):.1f} ({min(values):.1f} to "
            f"{max(values):.1f}) |"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    told = {"weights": SCENE.weights, "seeds": arguments.seeds, "rows": rows}
    (arguments.output / "fullschedule.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "fullschedule.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
