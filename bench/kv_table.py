"""The K/V measurements for people, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from accel.flops import CONVENTION

from .kv_growth import BUDGETS, FULL_BLOCK, MOST_GIGABYTES
from .kv_quality import NEAR
from .kv_runs import UNBOUNDED
from .kv_speed import MOST_GROWTH, MOST_SLOWER

Told = dict[str, Any]


def markdown(told: Told) -> str:
    """Every part that was measured, under a heading of its own."""
    writers: dict[str, Callable[[Any], list[str]]] = {
        "quality": _quality, "growth": _growth, "endless": _endless, "speed": _speed, "append": _append,
    }  # fmt: skip
    lines = ["# K/V of bounded size", "", f"Latents are latent frames. FLOPs: {CONVENTION}."]
    for part, write in writers.items():
        if part in told:
            lines += [
                "",
                f"## {part.capitalize()}",
                "",
                f"Measured {told['conditions'][part]}.",
                "",
                *write(told[part]),
            ]
    return "\n".join(lines)


def _table(names: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    names = list(names)
    return [_line(names), "|" + "-|" * len(names), *(_line(row) for row in rows)]


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _growth(told: Told) -> list[str]:
    lines = [
        "Rollouts of `tiny-causal`; bytes are those allocated, bookkeeping and scratch included. Window + sink and "
        "importance-redundancy take the same bytes and FLOPs for every block from the latent named on; nothing takes "
        "more than its budget. Both are checked block by block.",
        "",
    ]
    latents = [block["latents"] for block in told["watched"][0]["blocks"]]
    rows = []
    for row in told["watched"]:
        blocks = {block["latents"]: block for block in row["blocks"]}
        cells = (f"{blocks[at]['bytes'] / 1e6:.2f} MB, {blocks[at]['flops'] / 1e9:.3f}" for at in latents)
        budget = f"{row['budget_bytes'] / 1e6:.2f} MB" if "budget_bytes" in row else "none"
        rows.append([row["strategy"], budget, row.get("full_from") or "-", *cells])
    lines += _table(["kept", "budget", "full from", *(f"latent {at}: K/V, GFLOP a block" for at in latents)], rows)
    lines += [
        "",
        f"Full size, counted: the last block ({FULL_BLOCK} latents, 4 steps and the commit) of a video, bfloat16, "
        f"no guidance. Budgets are windows with a sink; 13 latents of the 1.3B model must not take more than "
        f"{MOST_GIGABYTES:g} GB.",
        "",
    ]
    columns = (UNBOUNDED, *map(str, BUDGETS))
    names = ["model", "latents", UNBOUNDED, *(f"budget {frames}" for frames in BUDGETS)]
    lines += _table(names, (
        [row["model"], row["latents"]]
        + [f"{row[key]['gigabytes']:.2f} GB, {row[key]['petaflop']:.3f} PFLOP" for key in columns]
        for row in told["counted"]
    ))  # fmt: skip
    lines += [
        "",
        "What of a budget of 13 latents of Wan 1.3B (3.81 GB for all branches together) is not keys and values, and "
        "how many latents' worth of these each branch has:",
        "",
    ]
    return lines + _table(["kept", "storage", "no guidance", "guidance, two branches"], (
        [row["keep"], row["storage"]] + [
            f"{row[key]['overhead_percent']:.1f} %, {row[key]['latents']:.1f} latents"
            for key in ("branches_1", "branches_2")
        ]
        for row in told["overheads"]
    ))  # fmt: skip


def _endless(told: Told) -> list[str]:
    tenths = ", ".join(f"{1e3 * value:.0f}" for value in told["seconds_by_tenth"])
    return [
        f"{told['latents']:,} latents, window + sink of {told['budget']}, nothing of the video kept, "
        f"{told['blocks']:,} blocks with a full store.",
        f"Resident memory {told['resident_first'] / 1e6:.1f} MB at first, {told['resident_last'] / 1e6:.1f} MB at the "
        f"end: {100 * told['growth']:+.2f} %. The list of what was done (one record a call) holds "
        f"{told['timeline_bytes'] / 1e6:.1f} MB of that; without it {100 * told['growth_without_timeline']:+.2f} % "
        f"(less than {100 * MOST_GROWTH:g} % is asked for).",
        f"Process time of a block, medians of tenths in ms: {tenths}. Last over first: {told['slower']:.3f} (at most "
        f"{MOST_SLOWER} is asked for).",
    ]


def _speed(told: list[Told]) -> list[str]:
    lines = [
        f"Blocks of `tiny-causal` at a history, in turns in one process, process time, medians of {told[0]['rounds']} "
        f"blocks each; every bounded store has what {told[0]['budget']} latents take at full size. Ratios say how many "
        "times less.",
    ]
    names = ("kept", "GFLOP", "ms", "FLOPs to unbounded", "time to unbounded", "FLOPs to window", "time to window")
    columns = [f"{what}_ratio_to_{other}" for other in ("unbounded", "window") for what in ("flop", "time")]
    for one in told:
        lines += ["", f"History of about {one['history']} latents:", ""]
        lines += _table(names, (
            [row["strategy"], f"{row['flops'] / 1e9:.2f}", f"{1e3 * row['seconds']:.0f}"]
            + [f"{row[key]:.2f}x" for key in columns]
            for row in one["rows"]
        ))  # fmt: skip
    return lines


def _quality(told: Told) -> list[str]:
    seen = "1 clip" if told["clips"] == 1 else f"{told['clips']} clips"
    lines = [
        _verdict(told["verdict"]),
        "",
        f"{seen} of {told['frames']} latents, four steps; every bounded store has what {told['budget']} latents take "
        f"at full size (Wan 1.3B, bfloat16). Segments of {told['segment']} latents. Closed: PSNR to the video with all "
        "its K/V. Open: every block behind the same history as there, so that errors do not add up. Truth: "
        "continuation of 4 latents of a simulated clip, PSNR and centre error to the simulation. Closed and open count "
        f"the latents after the first {told['budget']}. Drift is the slope in dB per segment. In brackets the 95 % "
        "bootstrap interval of the mean over clips.",
        "",
    ]
    names = ("kept", "truth dB", "truth drift", "centre error px", "open dB", "open drift", "closed dB", "closed drift")
    keys = ("truth_psnr", "truth_drift", "centre_error", "open_psnr", "open_drift", "closed_psnr", "closed_drift")
    lines += _table([*names, "attribute accuracy"], (
        [row["strategy"], *(_interval(row[key]) for key in (*keys, "accuracy"))] for row in told["table"]
    ))  # fmt: skip
    curves = {
        "truth_curve": ("PSNR to the simulation", 1), "centre_curve": ("Centre error in pixels", 1),
        "accuracy_curve": ("Attribute accuracy", 2), "open_curve": ("PSNR of blocks behind the same history", 1),
    }  # fmt: skip
    for key, (title, digits) in curves.items():
        count = len(told["table"][0][key])
        lines += ["", f"{title}, segment by segment:", ""]
        lines += _table(["kept", *range(1, count + 1)], (
            [row["strategy"], *("-" if value is None else f"{value:.{digits}f}" for value in row[key])]
            for row in told["table"]
        ))  # fmt: skip
    return lines


def _verdict(told: Told) -> str:
    near = "within" if told["within"] else "not within"
    beats = "It beats" if told["beats"] else "It does not measurably beat"
    text = (
        f"At equal bytes {told['best']} is closest to the simulation, {_interval(told['to_unbounded'], sign=True)} dB "
        f"from unbounded K/V clip by clip: {near} {NEAR:g} dB. "
    )
    if told["best"] == "window + sink":
        text += "That is the window itself: no other strategy beats it. "
    else:
        text += f"{beats} window + sink ({_interval(told['to_window'], sign=True)} dB). "
    return text + (
        f"Block by block behind the same history, {told['open_best']} is closest to unbounded K/V "
        f"({_interval(told['open_to_window'], sign=True)} dB to window + sink)."
    )


def _interval(value: Told | None, sign: bool = False) -> str:
    if value is None:
        return "-"
    form = "+.2f" if sign else ".2f"
    return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


def _append(told: Told) -> list[str]:
    return [
        f"Wan 1.3B, 832 x 480, window of {told['frames']} latents, {told['forwards']} forwards of a block, every one "
        f"of which writes the block's keys and values. The ring writes {told['ring_bytes'] / 1e9:.2f} GB a block; "
        f"cloning what stays and copying it back by one block {told['roll_bytes'] / 1e9:.2f} GB ({told['ratio']:.2f} "
        f"times as much). Of what is there already the ring writes {told['ring_moves'] / 1e6:.0f} MB (time channels of "
        f"the sink, now and then those of the ring), the other {told['roll_moves'] / 1e6:,.0f} MB.",
    ]
