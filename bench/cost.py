"""``python -m bench.cost``: what full-size models cost, counted exactly, without weights and without a GPU.

Writes ``bench/results/cost.json`` and ``cost.md``. The decision lists are those that the embedded ``tiny-df`` takes in
the full-size schedule, where they follow from noise levels alone.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.flops import CONVENTION, WAN_1_3B, WAN_14B

from . import fullsize as full
from .fullschedule import DECIDERS
from .methods import METHODS
from .rehearsal import rehearse
from .scenes import Scene

RESULTS = Path(__file__).with_name("results")
SHAPES = {"Wan 1.3B": WAN_1_3B, "Wan 14B": WAN_14B}
PLANS = {
    "ar_step 5, blocks of 5": full.SKYREELS,
    "ar_step 5, blocks of 1": replace(full.SKYREELS, block=1),
    "ar_step 2, blocks of 1": replace(full.SKYREELS, block=1, ar_step=2),
    "synchronous": replace(full.SKYREELS, block=1, ar_step=0),
}
SCHEMES = (full.FULL, full.SUFFIX, full.ACTIVE, full.CAUSAL)
WINDOWS = (full.FULL, full.SUFFIX, full.ACTIVE_WHOLE)
LISTS = ("high", "balanced", "5 in a row", "fast", "scope-slow", "scope-fast")


def schedules() -> list[dict[str, Any]]:
    """PFLOP and token forwards of every model, schedule and scheme."""
    return [
        {
            "model": model,
            "schedule": name,
            "calls": plan.calls(),
            "pflop": {scheme: full.run_flops(full.whole_forward(shape), plan, scheme) / 1e15 for scheme in SCHEMES},
            "token_forwards": {scheme: full.token_forwards(plan, scheme) for scheme in SCHEMES},
        }
        for model, shape in SHAPES.items()
        for name, plan in PLANS.items()
    ]


def lists() -> list[dict[str, Any]]:
    """Full-size FLOP ratios of decision lists by what a computed call is given."""
    scene, rows = Scene("tiny-df", full.SKYREELS), []
    for name in LISTS:
        options = METHODS[name].build(None, scene) if name in METHODS else {"acceleration": DECIDERS[name]}
        decisions = [record.decision for record in rehearse(scene, **options).records]
        calls = {kind: decisions.count(kind) for kind in ("recompute", "predict", "cache")}
        for model, shape in SHAPES.items():
            ratios = {windows: full.replayed(decisions, windows, shape) for windows in WINDOWS}
            rows.append({"model": model, "method": name, "calls": calls, "flop_ratio": ratios})
    return rows


def magi_rows() -> list[dict[str, Any]]:
    """MAGI-1's 240 frames in 64 steps, by what a chunk reads."""
    settings = {
        "all history": {},
        "all history, no clean pass, no twin": {"extra": False},
        "5, 4, 3, 2 chunks by quarter": {"key_chunks": (5, 4, 3, 2)},
    }
    rows = []
    for name, options in settings.items():
        counts = full.magi(**options)
        petaflop = {part: counts[part] / 1e15 for part in ("linear", "self-attention", "cross-attention")}
        rows.append(
            {"keys": name, "forwards": counts["forwards"], "chunk_forwards": counts["chunk forwards"]} | petaflop
        )
    return rows


def markdown(told: dict[str, Any]) -> str:
    """The tables for people."""
    lines = [
        f"FLOPs: {CONVENTION}.",
        "",
        "SkyReels-V2 DF, 544 x 960, 257 frames, 50 steps, guidance; PFLOP (ratio):",
        "",
    ]
    lines += _head("model", "schedule", "guided calls", *SCHEMES)
    for row in told["schedules"]:
        costs = (f"{row['pflop'][name]:.2f} ({row['pflop'][full.FULL] / row['pflop'][name]:.2f}x)" for name in SCHEMES)
        lines.append(_line(row["model"], row["schedule"], row["calls"], *costs))
    lines += ["", "Decision lists of `tiny-df` in the first schedule: FLOP ratio by what a computed call is given:", ""]
    lines += _head("model", "method", "computed / predicted / held", *WINDOWS)
    for row in told["lists"]:
        ratios = (f"{row['flop_ratio'][name]:.2f}x" for name in WINDOWS)
        lines.append(_line(row["model"], row["method"], " / ".join(map(str, row["calls"].values())), *ratios))
    lines += ["", "State between calls of a window of 25 latent frames, Wan 1.3B:", "", *_head("kept", "MB")]
    lines += [_line(name, f"{count / 1e6:,.1f}") for name, count in told["state_bytes"].items()]
    lines += ["", "MAGI-1 4.5B (distilled), 480 x 480, 240 frames, 64 steps, window of 4 chunks; PFLOP:", ""]
    lines += _head("keys", "forwards", "chunk forwards", "linear", "self-attention", "sum", "cross-attention")
    for row in told["magi"]:
        parts = (row["linear"], row["self-attention"], row["linear"] + row["self-attention"], row["cross-attention"])
        lines.append(_line(row["keys"], row["forwards"], row["chunk_forwards"], *(f"{part:.2f}" for part in parts)))
    return "\n".join(lines)


def _head(*names: str) -> list[str]:
    return [_line(*names), "|" + "-|" * len(names)]


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    folder = parser.parse_args().output
    told = {"convention": CONVENTION, "schedules": schedules(), "lists": lists(), "state_bytes": full.states()}
    told["magi"] = magi_rows()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    text = markdown(told)
    (folder / "cost.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
