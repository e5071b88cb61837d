"""Segment Prompt: another prompt from a segment on."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .inputs import checked
from .names import CATEGORY

NODE = "Segment Prompt"
SEGMENT = "arva_segment"


def segment_of(options: dict[str, Any]) -> int:
    """Segment from which a conditioning entry holds, by its options."""
    return options.get(SEGMENT, 0)


def at_segment(entries: list[dict[str, Any]], segment: int) -> list[dict[str, Any]]:
    """The entries that hold in a segment: those of the last prompt that has begun."""
    begun = max((segment_of(entry) for entry in entries if segment_of(entry) <= segment), default=0)
    return [entry for entry in entries if segment_of(entry) == begun]


class SegmentArea:
    """Stands where core's samplers look up the area of a conditioning first of all: they know no segments, and would
    mix the prompts of all. ``area`` is the conditioning's own, None where it has none."""

    def __init__(self, area: Any = None) -> None:
        self.area = area

    def __getitem__(self, index: Any) -> Any:
        raise ValueError(
            f"{NODE}: only AR Segment Sampler reads prompts that begin at a later segment, and another sampler would "
            f"mix them; use AR Segment Sampler, or remove {NODE}."
        )


def for_our_sampler(conditioning: list) -> list:
    """A conditioning whose entries have their own areas again."""
    out = []
    for text, options in conditioning:
        area = options.get("area")
        if isinstance(area, SegmentArea):
            options = {key: value for key, value in options.items() if key != "area"}
            if area.area is not None:
                options["area"] = area.area
        out.append([text, options])
    return out


def check_prompts(node: str, conditioning: list, most: int | None = None) -> None:
    """Raises ValueError where the first segment has no prompt, or one has more than ``most`` entries."""
    counts: dict[int, int] = {}
    for _, options in conditioning:
        counts[segment_of(options)] = counts.get(segment_of(options), 0) + 1
    if 0 not in counts:
        raise ValueError(
            f"{NODE}: the first prompt begins at segment {min(counts, default=0)}; connect one for the segments before "
            "it to the input conditioning."
        )
    number, count = max(counts.items(), key=lambda item: item[1])
    if most is not None and count > most:
        raise ValueError(
            f"{node}: causal blocks keep the K/V of a branch for one prompt, but from segment {number} on there are "
            f"{count} conditionings in one; use a single one."
        )


class ARVASegmentPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVASegmentPrompt",
            display_name=NODE,
            category=CATEGORY,
            description="Lets the video go on with another prompt from a segment on. Chain one node for each change; "
            "only the AR Segment Sampler reads it.",
            search_aliases=["prompt schedule", "prompt travel", "storyboard", "long video", "multi prompt"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt of the segments before, or another Segment "
                                      "Prompt."),
                io.Conditioning.Input("next", tooltip="The prompt from the segment on."),
                io.Int.Input("from_segment", default=1, min=1, max=1000000,
                             tooltip="First segment with the next prompt, counted from 0; a segment is a block where "
                             "the model is causal."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning",
                                            tooltip="Both prompts, for the AR Segment Sampler.")],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, conditioning: list, next: list, from_segment: int) -> io.NodeOutput:
        if any(segment_of(options) == from_segment for _, options in conditioning):
            raise ValueError(
                f"{NODE}: from_segment is {from_segment}, where another prompt begins already; give each a segment of "
                "its own."
            )
        later = ([text, options | _mark(options, from_segment)] for text, options in next)
        return io.NodeOutput([*conditioning, *later])


def _mark(options: dict[str, Any], segment: int) -> dict[str, Any]:
    area = options.get("area")
    return {SEGMENT: segment, "area": area if isinstance(area, SegmentArea) else SegmentArea(area)}


PROMPT_NODES: list[type[io.ComfyNode]] = [ARVASegmentPrompt]
