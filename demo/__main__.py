"""The demo: the tiny models make a video in full, accelerated and with fewer steps; what it cost and how close it is.

``python -m demo`` writes ``demo/output/``: videos, contact sheets, ``timeline.json``, ``timeline.svg`` and
``report.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from accel.flops import CONVENTION
from accel.metrics import psnr, ssim
from accel.presets import BALANCED, FAST, HISTORY_GUIDED

from .codec import TinyCodec
from .generate import CAUSAL_FRAMES, PLAN, Result, fewer_steps, load, sample, sample_causal, start_noise
from .pictures import contact_sheet, save_video
from .prompt import embed_text

OUTPUT = Path(__file__).with_name("output")
PROMPT = "red disc, blue square, gravity, pan"


class Report:
    """Collects the runs of one seed, compares each with the full one of its model and writes everything down."""

    def __init__(self, output: Path, seed: int) -> None:
        self.output, self.seed = output, seed
        self.codec = TinyCodec.load()
        self.runs: list[dict] = []
        self.sheets: dict[str, list[torch.Tensor]] = {}
        output.mkdir(parents=True, exist_ok=True)

    def add(self, model: str, method: str, result: Result, against: Result) -> None:
        """Saves one run's video and timeline and prints its line."""
        video, reference = self.codec.decode(result.latents), self.codec.decode(against.latents)
        totals = result.timeline.totals()
        full = result is against
        run = {
            "model": model,
            "method": method,
            "seed": self.seed,
            "calls": totals["calls"],
            "flops": totals["flops"],
            "flop_ratio": against.timeline.totals()["flops"] / totals["flops"],
            "seconds": round(result.seconds, 3),
            "psnr": None if full else round(psnr(reference, video), 3),
            "ssim": 1.0 if full else round(ssim(reference, video), 4),
        }
        self.runs.append(run)
        self.sheets.setdefault(model, []).append(video[0])
        stem = f"{model}-{method}"
        run["video"] = save_video(video[0], self.output / stem).name
        (self.output / f"{stem}.timeline.json").write_text(json.dumps(result.timeline.to_json()))
        (self.output / f"{stem}.timeline.svg").write_text(result.timeline.to_svg())
        calls = totals["calls"]
        quality = "reference" if full else f"{run['psnr']:6.2f} dB, SSIM {run['ssim']:.4f}"
        print(
            f"{model:15} {method:16} recompute {calls['recompute']:4} predict {calls['predict']:4} cache "
            f"{calls['cache']:4} "
            f"commit {calls['commit']:3} | {totals['flops'] / 1e12:6.3f} TFLOP, {run['flop_ratio']:5.2f}x fewer | "
            f"{run['seconds']:6.1f} s, {against.seconds / result.seconds:5.2f}x faster | {quality}",
            flush=True,
        )

    def close(self) -> None:
        """Contact sheets (one row a run, in the order printed) and ``report.json``."""
        for model, videos in self.sheets.items():
            contact_sheet(torch.stack(videos), self.output / f"{model}.png", columns=14, scale=2)
        (self.output / "report.json").write_text(
            json.dumps({"convention": CONVENTION, "runs": self.runs}, indent=1) + "\n"
        )
        print(f"FLOPs: {CONVENTION}.")


def diffusion_forcing(report: Report, seed: int) -> None:
    """``tiny-df`` on the staircase schedule, four segments."""
    model, context, noise = load("tiny-df"), embed_text(PROMPT), start_noise(seed, PLAN.frames)
    full = sample(model, context, noise, plan=PLAN)
    report.add("tiny-df", "full", full, full)
    fast = None
    for name, acceleration in (("balanced", BALANCED), ("fast", FAST), ("history-guided", HISTORY_GUIDED)):
        result = sample(model, context, noise, acceleration, PLAN)
        report.add("tiny-df", name, result, full)
        if name == "balanced":
            fast = result
            (report.output / "timeline.json").write_text(json.dumps(result.timeline.to_json()))
            (report.output / "timeline.svg").write_text(result.timeline.to_svg())
    row_flops = full.timeline.totals()["flops"] // PLAN.calls()
    shorter = fewer_steps(PLAN, fast.timeline.totals()["flops"], row_flops)
    report.add("tiny-df", "fewer-steps", sample(model, context, noise, plan=shorter), full)
    print(fast.timeline.summary(), flush=True)


def causal(report: Report, seed: int) -> None:
    """``tiny-causal``, block after block with a K/V store, 50-step Euler."""
    model, context, noise = load("tiny-causal"), embed_text(PROMPT), start_noise(seed, CAUSAL_FRAMES)
    full = sample_causal(model, context, noise)
    report.add("tiny-causal", "full", full, full)
    result = sample_causal(model, context, noise, BALANCED)
    report.add("tiny-causal", "balanced", result, full)
    calls = result.timeline.totals()["calls"]
    steps = -(-calls["recompute"] // (CAUSAL_FRAMES // model.config.block))
    report.add("tiny-causal", "fewer-steps", sample_causal(model, context, noise, steps=steps), full)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(arguments.output, arguments.seed)
    diffusion_forcing(report, arguments.seed)
    causal(report, arguments.seed)
    report.close()
    print(f"Videos, contact sheets, timelines and report.json are in {arguments.output}.")


if __name__ == "__main__":
    main()
