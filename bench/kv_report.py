"""Writes what the K/V measurements found: ``kv.json``, ``kv.md`` and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accel.flops import CONVENTION

from .kv_findings import pictures, quality_text
from .kv_rollout import FORWARDS, UNBOUNDED, WINDOW, Extent
from .table import table_of

Told = dict[str, Any]
FLAT, LEVEL = 1.0, 1.05  # per cent of memory, and last decile of block times over the first


def write(folder: Path, told: dict[str, Told], extent: Extent) -> str:
    """Writes everything into ``folder`` and returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Callable[[Told], list[str]]] = {
        "growth": growth_text, "append": append_text, "speed": speed_text, "endless": endless_text,
        "quality": lambda part: quality_text(part, extent),
    }  # fmt: skip
    lines = [
        f"`tiny-causal`, blocks of 4 latent frames, 4 steps with fresh noise after each and a pass that commits clean "
        f"K/V; budgets count the latent frames being denoised. FLOPs: {CONVENTION}.",
        "",
    ]
    for name, text in sections.items():
        if name in told:
            part = told[name]
            lines += [f"## {name} ({part['date']}; {part['conditions']})", "", *text(part)]
    markdown = "\n".join(lines).rstrip()
    (folder / "kv.md").write_text(markdown + "\n", encoding="utf-8")
    (folder / "kv.json").write_text(compact(told) + "\n", encoding="utf-8")
    if "quality" in told:
        for name, picture in pictures(told["quality"], extent).items():
            (folder / f"{name}.svg").write_text(picture, encoding="utf-8")
    return markdown


def compact(told: Any) -> str:
    """JSON with six digits a number and a line a list of numbers."""
    text = json.dumps(_rounded(told), indent=1, allow_nan=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)


def _rounded(told: Any) -> Any:
    if isinstance(told, dict):
        return {key: _rounded(value) for key, value in told.items()}
    if isinstance(told, list):
        return [_rounded(value) for value in told]
    return float(f"{told:.6g}") if isinstance(told, float) else told


def growth_text(part: Told) -> list[str]:
    """Bytes and FLOPs of a block: really on the tiny model, counted at full size."""

    def span(low: float, high: float, scale: float) -> str:
        return f"{low / scale:.3f}" if low == high else f"{low / scale:.3f} to {high / scale:.3f}"

    rows = [
        (
            one["store"], f"{one['planned_bytes'] / 1e3:,.0f}", f"{one['kv_bytes'] / 1e3:,.0f}", one["full_from"],
            span(*one["flops"], 1e9), "exactly equal" if one["exactly_equal"] else "never above the budget",
        )
        for one in part["tiny"]
    ]  # fmt: skip
    one = part["tiny"][0]
    lines = [
        f"Every block of a rollout of {one['until']:,} latent frames ({one['denoised_until']} denoised, then clean "
        f"ones committed) with a budget of {part['budget']}:",
        "",
        *table_of(("store", "planned kB", "kept kB", "full at latent", "GFLOP a block", "blocks from there on"), rows),
    ]
    unbounded = ", ".join(f"{flops / 1e9:.1f} at latent {latent}" for latent, flops in one["unbounded_flops"].items())
    lines += [f"Unbounded K/V: GFLOP a block {unbounded}.", "", *full_size_text(part["full_size"])]
    return lines


def full_size_text(rows: list[Told]) -> list[str]:
    """Counts of full-size models."""
    lengths = sorted({one["latents"] for one in rows if one["store"] == UNBOUNDED})
    whole = {(one["model"], one["latents"]): one for one in rows if one["store"] == UNBOUNDED}
    cells = []
    for one in rows:
        ratios = (f"{whole[one['model'], length]['flops'] / one['flops']:.2f}x" for length in lengths)
        cells.append((
            one["model"], one["store"], one["latents"], f"{one['keys'] / 1560:.1f}", f"{one['kv_bytes'] / 1e9:.2f}",
            f"{one['flops'] / 1e12:,.1f}", *ratios,
        ))  # fmt: skip
    head = ("model", "store", "latents", "of them kept", "K/V GB", "TFLOP a block")
    against = (f"of unbounded at {length:,}" for length in lengths)
    return [
        f"Wan at 480 x 832, blocks of 3, {FORWARDS} forwards a block, one CFG branch, bfloat16; counted. Bytes are all "
        "that the store plans for, bookkeeping and scratch included; head groups as before their heads are divided:",
        "",
        *table_of((*head, *against), cells),
    ]


def append_text(part: Told) -> list[str]:
    """Bytes moved by an append, and what a store takes beside keys and values."""
    told = ("ring", "ring_with_sink_turned", "ring_with_sink_turned_fused")
    turns = ("ring_when_positions_turn", "ring_when_positions_turn_fused")
    moved = [
        (
            one["block"], *(f"{one[key] / 1e9:.2f}" for key in (*told, "clone_and_roll")),
            *(f"{one['clone_and_roll'] / one[key]:.1f}x" for key in told), *(f"{one[key] / 1e9:.2f}" for key in turns),
        )
        for one in part["moved"]
    ]  # fmt: skip
    beside = [
        (
            one["store"], one["frames"], one["branches"], f"{one['planned_bytes'] / 1e9:.2f}",
            f"{one['latents_kept']:.1f}", f"{one['beside_percent']:.1f}", f"{one['planned_percent']:.1f}",
        )
        for one in part["beside"]
    ]  # fmt: skip
    head = (
        "block", "ring", "ring and sink", "the same, kernel", "clone and roll", "over ring", "over ring and sink",
        "over the kernel", "positions turn", "the same, kernel",
    )  # fmt: skip
    return [
        "GB read and written to append one block to 21 latent frames of Wan 1.3B, all layers; counted, not timed "
        "(bytes of every tensor operation; *ring and sink* turns the sink to where it stands now, in plain torch with "
        "products in float32 on the way; *positions turn* is the one block in about 220 latent frames after which "
        "positions start low again; *kernel* has in place of the turning operations what the Triton kernel reads and "
        "writes):",
        "",
        *table_of(head, moved),
        "What a store takes beside keys and values (bookkeeping, unturned time channels, what is needed for a moment), "
        "Wan 1.3B, per cent of a budget's keys and values:",
        "",
        *table_of(("store", "latents", "branches", "planned GB", "latents kept", "beside %", "planned %"), beside),
    ]


def speed_text(part: Told) -> list[str]:
    """Blocks against the unbounded store and against the window."""
    rows = [
        (
            one["latents"], one["store"], f"{one['seconds'] * 1e3:.0f}", f"{one['flop_ratio']:.2f}x",
            f"{one['time_ratio']:.2f}x", f"{one['time_ratio'] / one['flop_ratio']:.2f}",
            f"{one['window_flop_ratio']:.2f}x", f"{one['window_time_ratio']:.2f}x",
        )
        for one in part["rows"]
    ]  # fmt: skip
    head = ("history", "store", "ms a block", "FLOPs", "time", "realised", f"FLOPs to {WINDOW}", f"time to {WINDOW}")
    return [
        f"Process time of a block, stores in turn, median ratio of {part['pairs']} rounds; budget {part['budget']}. "
        "FLOPs are those of the model: choosing, merging and widening count in the time alone.",
        "",
        *table_of(head, rows),
    ]


def endless_text(part: Told) -> list[str]:
    """The long rollout."""
    megabytes = " ".join(f"{size / 1e6:.1f}" for size in part["resident_by_decile"])
    seconds = " ".join(f"{one * 1e3:.0f}" for one in part["seconds_by_decile"])
    still = " ".join(f"{one * 1e3:.0f}" for one in part["still_seconds_by_decile"])
    flat = "yes" if part["growth_percent"] < FLAT else "no"
    level = "yes" if part["last_over_first_against_still"] <= LEVEL else "no"
    return [
        f"{part['latents']:,} latent frames with a budget of {part['budget']} ({part['kv_bytes'] / 1e6:.2f} MB of "
        f"K/V). Resident memory grew by {part['growth_percent']:.2f} % from "
        f"the moment the store was full ({part['resident_when_full'] / 1e6:.1f} MB) to the end, by "
        f"{part['growth_percent_of_deciles']:.2f} % from first to last decile, and was "
        f"{part['resident_most'] / 1e6:.1f} MB at most. Median block of the last decile over the first: "
        f"{part['last_over_first']:.3f}; over blocks of a store that stood still, timed in between: "
        f"{part['last_over_first_against_still']:.3f}. The timeline is part of it: "
        f"{part['timeline_bytes_a_call']:.0f} bytes a call.",
        "",
        f"Memory grows by less than {FLAT:g} %: {flat}. Blocks take at most {LEVEL:g} times as long, the "
        f"machine's own change taken out by the store that stood still: {level}.",
        "",
        f"By decile: MB {megabytes}; ms a block {seconds}; ms a block of the store that stood still {still}.",
        "",
    ]
