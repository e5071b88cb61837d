"""How good the tiny models are: ``python -m demo.evaluate [MODEL ...]`` writes
``demo/weights/quality.json`` and the figures of the model card beside it.

Two questions. Asked for shapes in a prompt, does the model show them, still in segment 8, each as one thing that moves
as things move in the data? Given the start of a real clip, does it continue it as the simulation does?
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accel.metrics import psnr

from .codec import WEIGHTS, TinyCodec
from .data import Scenes, render, simulate
from .generate import CAUSAL_FRAMES, GUIDANCE, NEXT_CLIP_PLAN, PLAN, lasting, load, sample, sample_causal, start_noise
from .judge import LEAST_PIXELS, Reading, clear, load_judge, read, track
from .pictures import contact_sheet
from .prompt import embed_scenes

SEGMENTS = 8
FEW, BY_HISTORY = WAYS = "4_steps_", "history_guidance_"  # further ways to continue clips; begin their figures' names
STEADIED = "history_noise_"  # begins the names of the figures of prompted videos whose history is shown a little noisy
HISTORY_NOISE = 0.03
START, END = "<!-- figures -->", "<!-- end of figures -->"
COMPACT = 1.3  # spread over that of a disc of equal area above which a shape counts as torn


def segment_accuracy(reading: Reading, scenes: Scenes, bounds: list[tuple[int, int]]) -> list[float]:
    """Share of the prompted shapes that a segment shows: seen in a quarter of its frames, of the right kind in most of
    those (so that passing behind another shape is not an error)."""
    index = scenes.colour[:, None].expand(-1, reading.area.shape[1], -1)
    seen = reading.area.gather(2, index) >= LEAST_PIXELS
    right = seen & (reading.kind.gather(2, index) == scenes.kind[:, None])
    values = []
    for start, end in bounds:
        count = seen[:, start:end].sum(1)
        good = (count >= (end - start) / 4) & (right[:, start:end].sum(1) * 2 > count)
        values.append(float(good[scenes.present].float().mean()))
    return values


def motion(tracks: Tensor) -> float:
    """Mean pixels a shape moves from one frame to the next, over all pairs of frames where it is seen."""
    steps = (tracks[:, 1:] - tracks[:, :-1]).norm(dim=-1)
    return float(steps[~steps.isnan()].mean())


def compactness(reading: Reading) -> float:
    """Share of the shapes seen that are one thing: no wider than a disc of the same area allows."""
    disc = (reading.area / (2 * torch.pi)).sqrt()
    seen = reading.area >= LEAST_PIXELS
    return float(((reading.spread / disc) < COMPACT)[seen].float().mean())


def long_clips(
    kind: str, context: Tensor, seeds: list[int], steps: int = 50, few: bool = False, history_noise: float = 0.0
) -> tuple[Tensor, list]:
    """Eight segments of prompted video: latents and the ``(start, end)`` of each segment. ``few`` is for the causal
    model, ``history_noise`` for the others."""
    model = load(kind)
    if kind == "tiny-causal":
        noise = start_noise(seeds, CAUSAL_FRAMES)
        bounds = [(start, start + 4) for start in range(0, CAUSAL_FRAMES, 4)]
        options = few_steps(seeds) if few else {"steps": steps}
        return sample_causal(model, context, noise, **options).latents, bounds
    plan = PLAN if kind == "tiny-df" else NEXT_CLIP_PLAN
    plan = replace(lasting(plan, SEGMENTS), steps=steps)
    bounds = [(start + prefix, end) for start, end, prefix in plan.intervals()]
    noise = start_noise(seeds, plan.frames)
    return sample(model, context, noise, plan=plan, history_noise=history_noise).latents, bounds


def few_steps(seeds: list[int]) -> dict[str, Any]:
    """How the causal model is sampled in four steps, as ComfyUI's ``ar_video`` sampler does."""
    return {"renoise_seed": seeds[0], "shift": 5.0, "steps": 4}


def continuation(kind: str, scenes: Scenes, latents: Tensor, seeds: list[int], way: str = "") -> Tensor:
    """Latents ``[B, 16, 16, 8, 8]``: the first four of real clips, and the model's continuation; ``way`` is one of
    ``WAYS``: four steps, or guided by the history alone, with the prompt in both branches."""
    model, context, prefix = load(kind), embed_scenes(scenes), latents[:, :, :4]
    by_history = {"guidance": GUIDANCE, "history_guidance": 1.0, "negative": context}
    options: dict[str, Any] = {FEW: few_steps(seeds), BY_HISTORY: by_history}.get(way, {})
    if kind == "tiny-causal":
        return sample_causal(model, context, start_noise(seeds, 16), prefix=prefix, **options).latents
    plan = replace(PLAN if kind == "tiny-df" else NEXT_CLIP_PLAN, frames=16)
    noise = start_noise(seeds, 16)
    return sample(model, context, noise, plan=plan, prefix=prefix, **options).latents


def continued(kind: str, clips: int, seed: int, way: str = "") -> dict:
    """How near to the simulation a model continues the first four frames of real clips, all shapes and frames that can
    be seen pooled: centre error in pixels, mean and median, beside that of shapes that stay where they are."""
    codec, scenes = TinyCodec.load(), simulate(seed, clips, 16, cuts=0.0)
    latents = codec.encode(render(scenes))
    made = codec.decode(continuation(kind, scenes, latents, list(range(seed, seed + clips)), way))
    truth = codec.decode(latents)
    tracks, visible = track(read(load_judge(), made), scenes.colour)[:, 4:], clear(scenes)[:, 4:]
    error = (tracks - scenes.centre[:, 4:]).norm(dim=-1)
    still = (scenes.centre[:, 3:4] - scenes.centre[:, 4:]).norm(dim=-1)
    counted = visible & ~error.isnan()
    return {
        "continued_clips": clips,
        "continuation_psnr": psnr(truth[:, :, 4:], made[:, :, 4:]),
        "centroid_error": float(error[counted].mean()),
        "centroid_error_median": float(error[counted].median()),
        "centroid_error_if_nothing_moves": float(still[counted].mean()),
        "centroid_error_if_nothing_moves_median": float(still[counted].median()),
        "lost": 1 - float(counted.sum() / visible.sum()),
    }


def continuations(kind: str, clips: int, seed: int = 900) -> dict:
    """Figures of the continued clips, in all ways."""
    ways = ("", *(way for way in WAYS if way != FEW or kind == "tiny-causal"))
    return {way + key: value for way in ways for key, value in continued(kind, clips, seed, way).items()}


def prompted(kind: str, clips: int, seed: int = 900) -> dict:
    """Figures of the prompted videos; writes their contact sheets."""
    codec, scenes = TinyCodec.load(), simulate(seed, clips, 16, cuts=0.0)
    real = read(load_judge(), codec.decode(codec.encode(render(scenes))))
    figures = {"model": kind, "clips": clips, "real_motion": motion(track(real, scenes.colour))}
    figures["real_accuracy"] = segment_accuracy(real, scenes, [(0, 16)])[0]
    for few in (False, True) if kind == "tiny-causal" else (False,):
        told, video = judged(kind, scenes, seed, few=few)
        figures |= {(FEW if few else "") + name: value for name, value in told.items()}
        contact_sheet(video[:6], WEIGHTS / f"{kind}{'-4-steps' if few else ''}.png", columns=17)
    return figures


def steadied(kind: str, clips: int, seed: int = 900) -> dict:
    """Figures of the same videos where the finished frames are shown to the model with a little noise; none for a
    causal model, whose K/V are of clean frames."""
    if kind == "tiny-causal":
        return {}
    told, _ = judged(kind, simulate(seed, clips, 16, cuts=0.0), seed, history_noise=HISTORY_NOISE)
    return {STEADIED + name: value for name, value in told.items()}


def judged(kind: str, scenes: Scenes, seed: int, **options: Any) -> tuple[dict, Tensor]:
    """Figures of videos of these scenes' prompts, and the videos; ``options`` of ``long_clips``."""
    seeds = list(range(seed, seed + len(scenes.colour)))
    latents, bounds = long_clips(kind, embed_scenes(scenes), seeds, **options)
    video = TinyCodec.load().decode(latents)
    reading = read(load_judge(), video)
    figures = {"attribute_accuracy": segment_accuracy(reading, scenes, bounds)}
    figures["motion"] = motion(track(reading, scenes.colour))
    return figures | {"one_thing": compactness(reading)}, video


FIGURES = {"prompted": prompted, "steadied": steadied, "continued": continuations}


def figures_table(known: dict[str, dict]) -> str:
    """The figures of all models as Markdown, for the model card."""
    models = [kind for kind in ("tiny-df", "tiny-next-clip", "tiny-causal") if kind in known]

    def line(name: str, cell: Callable[[dict], str]) -> str:
        return f"| {name} | " + " | ".join(cell(known[kind]) for kind in models) + " |"

    def accuracy(figures: dict, name: str = "attribute_accuracy") -> str:
        if name not in figures:
            return ""
        first, *_, last = shares = [round(100 * share) for share in figures[name]]
        return f"{first} %, {last} % (mean {sum(shares) / len(shares):.0f} %)"

    def centre(figures: dict, name: str = "", way: str = "") -> str:
        if way + "centroid_error" not in figures:
            return ""
        error = figures[way + "centroid_error" + name]
        still = figures[way + "centroid_error_if_nothing_moves" + name]
        return f"{error:.2f} px of {still:.2f} if nothing moves, {100 * error / still:.0f} %"

    def guided(figures: dict) -> str:
        value = figures.get(BY_HISTORY + "continuation_psnr")
        return "" if value is None else f"{value:.1f} dB"

    def steady(figures: dict) -> str:
        return accuracy(figures, STEADIED + "attribute_accuracy")

    rows = [
        line("", lambda one: f"`{one['model']}`, {one['clips']} clips"),
        "|-" * (len(models) + 1) + "|",
        line("prompted shapes shown with the right kind, segments 1 and 8", accuracy),
        line("the same with four steps", lambda one: accuracy(one, FEW + "attribute_accuracy")),
        line(f"the same with history noise {HISTORY_NOISE:g}", steady),
        line("of real clips", lambda one: f"{100 * one['real_accuracy']:.0f} %"),
        line("clips continued", lambda one: f"{one['continued_clips']}"),
        line("their centre error against the simulation, mean", centre),
        line("the same, median", lambda one: centre(one, "_median")),
        line("the mean with four steps", lambda one: centre(one, way=FEW)),
        line("the mean with history guidance", lambda one: centre(one, way=BY_HISTORY)),
        line("their PSNR", lambda one: f"{one['continuation_psnr']:.1f} dB"),
        line("their PSNR with history guidance", guided),
        line("motion, pixels a frame (real clips)", lambda one: f"{one['motion']:.2f} ({one['real_motion']:.2f})"),
        line("shapes that are one thing", lambda one: f"{100 * one['one_thing']:.0f} %"),
    ]
    return "\n".join(rows)


def renew_card(known: dict[str, dict]) -> None:
    """Writes the figures into the model card, between its two marks."""
    card = WEIGHTS / "README.md"
    before, _, rest = card.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    card.write_text(f"{before}{START}\n\n{figures_table(known)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["tiny-df", "tiny-next-clip", "tiny-causal"])
    parser.add_argument("--clips", type=int, default=48, help="prompted videos of eight segments")
    parser.add_argument("--continued", type=int, default=48, help="real clips to continue")
    parser.add_argument("--only", choices=FIGURES, help="leave the other figures as they are")
    arguments = parser.parse_args()
    path = WEIGHTS / "quality.json"
    for kind in arguments.models:
        figures = {}
        for part in (arguments.only,) if arguments.only else FIGURES:
            figures |= FIGURES[part](kind, arguments.continued if part == "continued" else arguments.clips)
        print(json.dumps(figures, indent=1))
        known = json.loads(path.read_text()) if path.exists() else {}
        known[kind] = known.get(kind, {}) | figures if arguments.only else figures
        path.write_text(json.dumps(known, indent=1) + "\n")
        renew_card(known)


if __name__ == "__main__":
    main()
