"""What full-size models cost, by exact counting: schedules of SkyReels-V2 and MAGI-1, state of caching schemes.

``accel.flops.CONVENTION`` throughout. SkyReels-V2 DF at 544 x 960, 257 frames in segments of 97 with overlap 17, both
guidance branches, is 65 latent frames in segments of 25 with overlap 5 (SCOPE, arXiv 2604.02979, Table 1 "Original").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from accel.call import Decision
from accel.flops import WAN_1_3B, WanShape, attention_flops, linear_flops
from accel.sampling import SegmentPlan
from accel.schedule import chunk_forwards, chunk_pipeline, magi_times

TOKENS = 2040  # of a latent frame, 544 x 960
BRANCHES = 2
PIXELS, CHANNELS = 68 * 120, 16  # of a latent frame
SKYREELS = SegmentPlan(frames=65, segment=25, overlap=5, block=5, ar_step=5, steps=50)
FULL, SUFFIX, ACTIVE, CAUSAL = "full window", "suffix window", "active frames, frozen K/V", "block by block, causal K/V"
ACTIVE_WHOLE = "active frames, K/V of the whole window"
Forward = Callable[[int, int], int]  # FLOPs of a guided call of so many latent frames that reads so many as keys


def whole_forward(shape: WanShape) -> Forward:
    """A guided call, embeddings and head included."""
    return lambda frames, keys: shape.forward_flops(frames, TOKENS, keys * TOKENS, branches=BRANCHES)


def blocks_alone(shape: WanShape) -> Forward:
    """A guided call without embeddings and head, as published counts have it."""
    return lambda frames, keys: BRANCHES * shape.layers * shape.block_flops(frames * TOKENS, keys * TOKENS)


def calls(plan: SegmentPlan, scheme: str) -> Iterator[list[tuple[int, int]]]:
    """``(frames, key frames)`` of the forwards of every guided call; a causal segment's history goes through once."""
    for matrix in plan.matrices():
        block = plan.block
        rows = zip(matrix.active_intervals(), matrix.suffix_windows(), matrix.active.sum(1).tolist(), strict=True)
        for row, ((start, end), (left, right), active) in enumerate(rows):
            if scheme == CAUSAL:
                history = [(matrix.prefix, matrix.prefix)] if row == 0 and matrix.prefix else []
                yield history + [(block, first + block) for first in range(start, end, block)]
            else:
                yield [
                    {
                        FULL: (matrix.frames, matrix.frames),
                        SUFFIX: (right - left, right - left),
                        ACTIVE: (active, end),
                        ACTIVE_WHOLE: (active, matrix.frames),
                    }[scheme]
                ]


def run_flops(forward: Forward, plan: SegmentPlan, scheme: str) -> int:
    """FLOPs of a run that computes every call."""
    return sum(forward(*pair) for pairs in calls(plan, scheme) for pair in pairs)


def token_forwards(plan: SegmentPlan, scheme: str) -> int:
    """Tokens that go through the model in a run that computes every call, both branches."""
    return BRANCHES * TOKENS * sum(frames for pairs in calls(plan, scheme) for frames, _ in pairs)


def replayed(
    decisions: Sequence[Decision | str], windows: str = FULL, shape: WanShape = WAN_1_3B, plan: SegmentPlan = SKYREELS
) -> float:
    """Full-size FLOP ratio of a decision list, one entry a guided call: the full run over the calls computed.

    Args:
        decisions: as a run of the same schedule took them, on any model. windows: what a computed call is given:
            ``FULL``, ``SUFFIX``, ``ACTIVE`` or ``ACTIVE_WHOLE``.

    Raises:
        ValueError: a list of another length than the schedule's, or nothing computed.
    """
    if len(decisions) != plan.calls():
        raise ValueError(f"replayed: {len(decisions)} decisions for a schedule of {plan.calls()} calls.")
    forward, total = whole_forward(shape), 0
    for decision, pairs in zip(decisions, calls(plan, windows), strict=True):
        if Decision(decision) is Decision.RECOMPUTE:
            total += sum(forward(*pair) for pair in pairs)
    if not total:
        raise ValueError("replayed: no call is computed, so there is nothing to compare with.")
    return run_flops(forward, plan, FULL) / total


def states(shape: WanShape = WAN_1_3B, frames: int = 25) -> dict[str, int]:
    """Bytes that caching schemes keep between calls of one window, both branches where they keep them apart."""
    latents, hidden = frames * PIXELS * CHANNELS, frames * TOKENS * shape.dim
    modulation = 6 * shape.dim * 4
    return {
        "velocity, 3 points, guided, fp32": 3 * latents * 4,
        "velocity, 3 points, guided, bf16": 3 * latents * 2,
        "velocity, 3 points, per branch, fp32": 3 * latents * 4 * BRANCHES,
        "residual, bf16": hidden * 2 * BRANCHES,
        "residual, 2 points, bf16": 2 * hidden * 2 * BRANCHES,
        "three modules a layer, order 2, bf16": 3 * 3 * shape.layers * hidden * 2 * BRANCHES,
        "timestep modulation, expanded to tokens, fp32": frames * TOKENS * modulation * BRANCHES,
        "timestep modulation, one row a frame, fp32": frames * modulation * BRANCHES,
        "K/V of the window, bf16": 2 * shape.layers * hidden * 2 * BRANCHES,
    }


@dataclass(frozen=True, slots=True)
class MagiShape:
    """Shape of MAGI-1 4.5B at 480 x 480: self- and cross-attention share one output projection."""

    layers: int = 34
    dim: int = 3072
    kv_dim: int = 1024
    ffn_dim: int = 12288
    text_tokens: int = 800
    chunk_tokens: int = 6 * 900
    patch_channels: int = 64

    def linear(self) -> int:
        """Linear layers of one chunk, embedding and head included."""
        sizes = ((self.dim, self.dim), (self.dim, 2 * self.kv_dim), (self.dim, self.dim), (2 * self.dim, self.dim))
        widths = (*sizes, (self.dim, self.ffn_dim), (self.ffn_dim, self.dim))
        ends = 2 * linear_flops(self.chunk_tokens, self.patch_channels, self.dim)
        return self.layers * sum(linear_flops(self.chunk_tokens, *size) for size in widths) + ends

    def attention(self, chunks: int) -> int:
        """Self-attention of one chunk that reads ``chunks``."""
        return self.layers * attention_flops(self.chunk_tokens, chunks * self.chunk_tokens, self.dim)

    def cross_attention(self) -> int:
        """Cross-attention of one chunk and its prompt's keys and values."""
        keys = linear_flops(self.text_tokens, self.dim, 2 * self.kv_dim)
        return self.layers * (attention_flops(self.chunk_tokens, self.text_tokens, self.dim) + keys)


def magi(
    key_chunks: tuple[int, ...] = (), chunks: int = 10, steps: int = 64, window: int = 4, extra: bool = True
) -> dict[str, int]:
    """Counts of the distilled MAGI-1 for 240 frames in 64 steps: FLOPs by part, forwards and chunk forwards.

    Args:
        key_chunks: as ``accel.schedule.chunk_forwards``; empty reads all history, as published baselines do.
        extra: whether finished chunks run once more, clean, and nearly clean ones a second time on their own.
    """
    shape, matrix = MagiShape(), chunk_pipeline(chunks, 6, steps, window)
    forwards = chunk_forwards(matrix, magi_times(steps), key_chunks)
    ranges = [keys for forward in forwards for keys in forward.keys[0 if extra or forward.clean is None else 1 :]]
    lengths = [last - first for first, last in ranges] + [1] * sum(forward.twin for forward in forwards if extra)
    return {
        "forwards": len(forwards),
        "chunk forwards": len(lengths),
        "linear": len(lengths) * shape.linear(),
        "self-attention": sum(map(shape.attention, lengths)),
        "cross-attention": len(lengths) * shape.cross_attention(),
    }
