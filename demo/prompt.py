"""Prompts of the tiny models: a closed vocabulary, embedded by formula, zero-padded to 64 tokens.

A prompt names two or three shapes and how the scene moves: ``"red disc, blue square, gravity, pan"``. One token a
shape (its kind's plus its colour's vector) and one token for each word of motion; the unconditional prompt is all
zeros.
"""

from __future__ import annotations

import math
from reprlib import repr as shorten

import torch
from torch import Tensor

from .data import COLOURS, KINDS, MAX_OBJECTS, Scenes

TOKENS = 64
TEXT_DIM = 64
VOCABULARY = KINDS + COLOURS + ("gravity", "float", "pan", "still")


def _vectors() -> Tensor:
    """One vector per word, ``[words, 64]``: cosines whose frequencies differ by the golden angle, close to
    orthogonal."""
    word = torch.arange(1, len(VOCABULARY) + 1, dtype=torch.float64)[:, None]
    channel = torch.arange(1, TEXT_DIM + 1, dtype=torch.float64)[None]
    return (2.399963229728653 * word * channel + 0.5 * word).cos().float() * 1.4


VECTORS = _vectors()
_INDEX = {word: index for index, word in enumerate(VOCABULARY)}


def embed_scenes(scenes: Scenes) -> Tensor:
    """Prompt embeddings ``[B, 64, 64]`` of simulated scenes."""
    clips = scenes.kind.shape[0]
    prompt = torch.zeros(clips, TOKENS, TEXT_DIM)
    shapes = VECTORS[scenes.kind] + VECTORS[len(KINDS) + scenes.colour]
    prompt[:, 2 : 2 + MAX_OBJECTS] = shapes * scenes.present[..., None]
    prompt[:, 0] = VECTORS[torch.where(scenes.gravity, _INDEX["gravity"], _INDEX["float"])]
    prompt[:, 1] = VECTORS[torch.where(scenes.pan, _INDEX["pan"], _INDEX["still"])]
    return prompt


def pack(context: Tensor) -> tuple[Tensor, Tensor]:
    """The prompt tokens that differ ``[B, 6, 64]`` and the attention bias ``[1, 6]`` that makes the last, a zero, count
    for all the zeros of the padding: the same attention at a tenth of the keys."""
    used = 2 + MAX_OBJECTS + 1
    bias = torch.zeros(1, used)
    bias[0, -1] = math.log(TOKENS - used + 1)
    return context[:, :used], bias


def parse(text: str) -> tuple[list[tuple[int, int]], bool, bool]:
    """Shapes as ``(kind, colour)`` indices, gravity and pan, read from a prompt.

    Raises:
        ValueError: for a word outside the vocabulary, more than three shapes, a colour used twice or no shape at all.
    """
    shapes: list[tuple[int, int]] = []
    gravity = pan = False
    for part in (piece.strip().lower() for piece in text.replace(";", ",").split(",")):
        if not part:
            continue
        words = part.split()
        if len(words) == 2 and words[0] in COLOURS and words[1] in KINDS:
            shapes.append((KINDS.index(words[1]), COLOURS.index(words[0])))
        elif part in ("gravity", "float"):
            gravity = part == "gravity"
        elif part in ("pan", "still"):
            pan = part == "pan"
        else:
            raise ValueError(
                f"Tiny AR Prompt: cannot read {shorten(part)}; write shapes as '<colour> <kind>' with colours "
                f"{', '.join(COLOURS)} "
                f"and kinds {', '.join(KINDS)}, and optionally gravity or float, pan or still, separated by commas."
            )
    colours = [colour for _, colour in shapes]
    if not 1 <= len(shapes) <= MAX_OBJECTS or len(set(colours)) != len(colours):
        raise ValueError(
            f"Tiny AR Prompt: {shorten(text)} names {len(shapes)} shapes; the tiny models know one to {MAX_OBJECTS} "
            "shapes, each in "
            "a colour of its own."
        )
    return shapes, gravity, pan


def embed_text(text: str) -> Tensor:
    """Prompt embedding ``[1, 64, 64]``; an empty text is the unconditional prompt (all zeros). Raises as ``parse``."""
    prompt = torch.zeros(1, TOKENS, TEXT_DIM)
    if not text.strip():
        return prompt
    shapes, gravity, pan = parse(text)
    prompt[0, 0] = VECTORS[_INDEX["gravity" if gravity else "float"]]
    prompt[0, 1] = VECTORS[_INDEX["pan" if pan else "still"]]
    for slot, (kind, colour) in enumerate(shapes):
        prompt[0, 2 + slot] = VECTORS[kind] + VECTORS[len(KINDS) + colour]
    return prompt


def describe(scenes: Scenes, clip: int) -> str:
    """The prompt text of one simulated clip."""
    shapes = [
        f"{COLOURS[scenes.colour[clip, slot]]} {KINDS[scenes.kind[clip, slot]]}"
        for slot in range(MAX_OBJECTS)
        if bool(scenes.present[clip, slot])
    ]
    motion = ["gravity" if bool(scenes.gravity[clip]) else "float", "pan" if bool(scenes.pan[clip]) else "still"]
    return ", ".join(shapes + motion)
