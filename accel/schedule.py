"""When each latent frame is denoised.

One closed form serves synchronous denoising, the staircase of diffusion forcing (SkyReels-V2) and the chunk pipeline
(MAGI-1): ``step_matrix``. Noise levels are a second, independent table looked up by the matrix; ``skyreels_sigmas``,
``flow_sigmas`` and ``magi_times`` make the usual ones.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Interval = tuple[int, int]
MOST_ENTRIES = 1 << 27  # of a step matrix: 1 GiB


@dataclass(frozen=True, slots=True, eq=False)
class StepMatrix:
    """Progress of every latent frame of a segment, one row per model call. Made by ``step_matrix``.

    Attributes:
        index: ``[rows, frames]`` int64 on the host: 0 not started, 1..steps about to take that solver step,
            steps + 1 clean.
        steps: N, solver steps of a latent frame.
        ar_step: rows by which each block runs behind its left neighbour, at most ``steps``.
        block: latent frames denoised together.
        prefix: latent frames at the start that are clean before the first row.
        window: most latent frames given to one forward.
    """

    index: Tensor
    steps: int
    ar_step: int
    block: int
    prefix: int
    window: int

    @property
    def rows(self) -> int:
        """Model calls of the segment."""
        return self.index.shape[0]

    @property
    def frames(self) -> int:
        """Latent frames of the segment."""
        return self.index.shape[1]

    @property
    def active(self) -> Tensor:
        """``[rows, frames]`` bool: which latent frames take a solver step in that row."""
        return (self.index >= 1) & (self.index <= self.steps)

    def active_intervals(self) -> list[Interval]:
        """Tightest ``[start, end)`` around the active latent frames of each row. No row is without one."""
        active = self.active.int()
        starts = active.argmax(1)
        ends = self.frames - active.flip(1).argmax(1)
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def suffix_windows(self) -> list[Interval]:
        """Window of each row without the latent frames that have not started yet (SCOPE eq. 8-9, arXiv 2604.02979).

        The end is the furthest end of any active interval so far, the start at most ``window`` before it.
        """
        ends = torch.tensor([end for _, end in self.active_intervals()]).cummax(0).values.tolist()
        return [(max(end - self.window, 0), end) for end in ends]

    def valid_intervals(self) -> list[Interval]:
        """Window of each row as SkyReels-V2 slides it: always ``window`` wide, one block further when the next starts.

        Left of it everything is clean, right of it nothing has started. A prefix longer than the window, where the
        reference never slides, starts with the window's end at the prefix's.
        """
        end = max(self.window, self.prefix)
        intervals = []
        for active in self.active.tolist():
            if end < self.frames and active[end]:
                end += self.block
            intervals.append((max(end - self.window, 0), end))
        return intervals

    def sigmas(self, table: Tensor | Sequence[float]) -> Tensor:
        """Noise level of every latent frame, ``[rows, frames]`` float64 on the host.

        Args:
            table: steps + 1 noise levels; step k goes from ``table[k - 1]`` to ``table[k]``. Latent frames not started
                are at ``table[0]``, clean ones at 0.

        Raises:
            ValueError: as ``noise_table``.
        """
        return noise_table(table, self.steps)[(self.index - 1).clamp_min(0)]


def step_matrix(
    frames: int, steps: int, ar_step: int = 0, block: int = 1, prefix: int = 0, window: int | None = None
) -> StepMatrix:
    """The step matrix of one segment; all counts but ``steps`` and ``ar_step`` are latent frames.

    With b the block, p the blocks of the prefix and lag = min(ar_step, steps), row r = 1, 2, ... of block b is
    ``clamp(r - (b - p) lag, 0, steps + 1)``; the last row is the last step of the last block. It equals SkyReels-V2's
    ``generate_timestep_matrix``, and MAGI-1's chunk ranges where ar_step = steps / window in chunks.

    Args:
        frames: latent frames of the segment, prefix included.
        steps: solver steps of each latent frame.
        ar_step: rows by which each block runs behind its left neighbour; 0 denoises all together, ``steps`` or more one
            block after the other.
        block: latent frames denoised together; divides ``frames``, ``prefix`` and ``window``.
        prefix: latent frames at the start that are already clean.
        window: most latent frames given to one forward; None means ``frames``, and so does anything larger.

    Raises:
        ValueError: for what cannot be denoised whole: counts that are not multiples of ``block``, nothing left to
            denoise, more blocks in flight than the window holds, or a matrix that is beyond all measure.
    """
    rows = step_rows(frames, steps, ar_step, block, prefix, window)
    window = frames if window is None else min(window, frames)
    lag = min(ar_step, steps)
    behind = (torch.arange(frames) - prefix).div(block, rounding_mode="floor") * lag
    index = (torch.arange(1, rows + 1)[:, None] - behind).clamp(0, steps + 1)
    index[:, :prefix] = steps + 1
    return StepMatrix(index, steps, lag, block, prefix, window)


def step_rows(
    frames: int, steps: int, ar_step: int = 0, block: int = 1, prefix: int = 0, window: int | None = None
) -> int:
    """Rows of the ``step_matrix`` of the same arguments, which are checked: its model calls. Raises as it does."""
    frames = _count("frames", frames, 1)
    steps = _count("steps", steps, 1)
    ar_step = _count("ar_step", ar_step, 0)
    block = _count("block", block, 1)
    prefix = _count("prefix", prefix, 0)
    window = frames if window is None else min(_count("window", window, 1), frames)
    if frames % block:
        raise ValueError(
            f"Step matrix: frames is {frames}, which leaves {frames % block} latent frames over after blocks of "
            f"{block}; use {_multiples(frames, block)} latent frames, or a block that divides {frames}."
        )
    if prefix >= frames:
        raise ValueError(
            f"Step matrix: prefix is {prefix} of {frames} latent frames, which leaves nothing to denoise; "
            f"use a prefix of at most {frames - block}."
        )
    if prefix % block:
        raise ValueError(
            f"Step matrix: prefix is {prefix} latent frames, not a multiple of the block of {block}, so part of it "
            f"would be denoised over; use a prefix of {_multiples(prefix, block, 0, frames - block)}, or a block that "
            f"divides {prefix}."
        )
    if window % block:
        raise ValueError(
            f"Step matrix: window is {window} latent frames, not a multiple of the block of {block}; "
            f"use {_multiples(window, block)}."
        )
    held = window // block
    if window < frames and ar_step * held < steps:
        raise ValueError(
            f"Step matrix: ar_step is {ar_step}, which at {steps} steps puts more blocks in flight than the {held} "
            f"that a window of {window} latent frames holds; use an ar_step of at least {-(-steps // held)}, or a "
            f"window of {frames}."
        )
    rows = steps + ((frames - prefix) // block - 1) * min(ar_step, steps)
    if rows * frames > MOST_ENTRIES:
        raise ValueError(
            f"Step matrix: {frames} latent frames in blocks of {block} at {steps} steps and ar_step {ar_step} take "
            f"{rows} model calls a segment; use a shorter segment, a larger block, a smaller ar_step or fewer steps."
        )
    return rows


def noise_table(table: Tensor | Sequence[float], steps: int | None = None) -> Tensor:
    """The table of noise levels as float64 on the host, ``[steps + 1]``, if a flow solver can follow it.

    Raises:
        ValueError: unless it holds ``steps`` + 1 (two or more where ``steps`` is None) falling levels in [0, 1] that
            end at 0.
    """
    levels = torch.as_tensor(table, dtype=torch.float64).detach().cpu()
    expected = "two or more" if steps is None else str(steps + 1)
    if levels.ndim != 1 or levels.numel() < 2 or (steps is not None and levels.numel() != steps + 1):
        raise ValueError(
            f"Noise table: needs {expected} noise levels in one row, one more than there are steps, "
            f"got shape {tuple(levels.shape)}; use the schedule of one run."
        )
    if not bool((levels[1:] < levels[:-1]).all()) or levels[0] > 1 or levels[-1] != 0:
        raise ValueError(
            f"Noise table: noise levels must fall from at most 1 to exactly 0, got {levels[0]:.6g} to {levels[-1]:.6g}"
            "; use a flow model's full schedule, not a part of one or one with repeated levels."
        )
    return levels


def shifted(levels: Tensor, shift: float) -> Tensor:
    """Noise levels in [0, 1] moved by ``shift s / (1 + (shift - 1) s)``, as ComfyUI's ModelSamplingDiscreteFlow."""
    if not shift > 0:
        raise ValueError(f"Noise table: shift is {shift}; use a number above 0 (1 leaves the levels as they are).")
    return shift * levels / (1 + (shift - 1) * levels)


def flow_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """``[steps + 1]`` float64 noise levels: 1 to 0 evenly, shifted."""
    return shifted(torch.linspace(1, 0, _count("steps", steps, 1) + 1, dtype=torch.float64), shift)


def skyreels_sigmas(steps: int, shift: float = 8.0) -> Tensor:
    """``[steps + 1]`` float64 noise levels of SkyReels-V2's flow UniPC schedule: 0.999 to 0 evenly, shifted.

    The model is shown ``timesteps`` of them. 0.999 is a single-precision number there, hence the rounding here.
    """
    first = torch.tensor(0.999, dtype=torch.float32).item()
    return shifted(torch.linspace(first, 0, _count("steps", steps, 1) + 1, dtype=torch.float64), shift)


def timesteps(sigmas: Tensor) -> Tensor:
    """Whole timesteps in 0..1000 that SkyReels-V2 shows the model for noise levels of any shape (rounded down)."""
    return (sigmas * 1000).long()


MAGI_SHORTCUTS = {"8,16,16": (0.0, 2.0, 3.0), "16,16,8": (0.0, 1.0, 2.0)}
"""Where the three steps of each quarter start when MAGI-1 is sampled in 12 steps, in 16ths of the whole."""


def magi_times(steps: int, shortcut: str = "8,16,16", transform: str = "sd3", shift: float = 3.0) -> Tensor:
    """``[steps + 1]`` float64 times of MAGI-1, 0 noise to 1 clean; ``1 - times`` are noise levels.

    Args:
        steps: solver steps of a chunk; 12 takes the uneven grid of ``shortcut``.
        shortcut: key of ``MAGI_SHORTCUTS``.
        transform: ``identity``, ``square``, ``sd3`` (square, then ``shift``; the default of the released models) or
            ``piecewise`` (half of the way in the first 7/8 of the steps).
        shift: flow shift of ``sd3``.
    """
    grid = _magi_grid(steps, shortcut)
    if transform == "identity":
        return grid
    if transform == "square":
        return grid**2
    if transform == "sd3":
        return 1 - shifted(1 - grid**2, shift)
    if transform == "piecewise":
        return torch.where(grid < 7 / 8, grid * 4 / 7, grid * 4 - 3)
    raise ValueError(f"MAGI times: transform is {transform!r}; use identity, square, sd3 or piecewise.")


def magi_intervals(steps: int, shortcut: str = "8,16,16") -> Tensor:
    """``[steps]`` lengths in shortest steps, which the distilled MAGI-1 models embed beside the time."""
    lengths = _magi_grid(steps, shortcut).diff()
    return (lengths / lengths.min()).round()


def chunk_pipeline(chunks: int, chunk_width: int, steps: int, window: int, offset: int = 0) -> StepMatrix:
    """MAGI-1's chunk pipeline as a step matrix: a chunk enters every ``steps / window`` forwards.

    Args:
        chunks: chunks of the whole video, those of ``offset`` included.
        chunk_width: latent frames of a chunk.
        steps: solver steps of a chunk.
        window: most chunks denoised at once; divides ``steps``.
        offset: clean chunks at the start (video continuation).

    Raises:
        ValueError: if ``window`` does not divide ``steps``, and as ``step_matrix``.
    """
    window, steps = _count("window", window, 1), _count("steps", steps, 1)
    if steps % window:
        raise ValueError(
            f"Chunk pipeline: steps is {steps}, not a multiple of the window of {window} chunks; "
            f"use {_multiples(steps, window)} steps."
        )
    return step_matrix(
        frames=_count("chunks", chunks, 1) * _count("chunk_width", chunk_width, 1),
        steps=steps,
        ar_step=steps // window,
        block=chunk_width,
        prefix=_count("offset", offset, 0) * chunk_width,
        window=window * chunk_width,
    )


@dataclass(frozen=True, slots=True)
class ChunkForward:
    """One forward of the chunk pipeline, in chunks.

    Attributes:
        chunks: ``[start, end)`` being denoised.
        clean: chunk that left the window in this forward and is run once more, clean, for its K/V; or None.
        steps: solver steps done, per chunk forwarded, oldest first; the clean chunk comes first with all of them.
        keys: ``[start, end)`` of the chunks each forwarded chunk attends to.
        twin: whether the oldest chunk being denoised is nearly clean, so that the distilled models run it a second time
            on its own.
    """

    chunks: Interval
    clean: int | None
    steps: tuple[int, ...]
    keys: tuple[Interval, ...]
    twin: bool


def chunk_forwards(
    matrix: StepMatrix,
    times: Tensor,
    key_chunks: Sequence[int] = (5, 4, 3, 2),
    clean_key_chunks: int = 1,
    twin_time: float = 0.3,
) -> list[ChunkForward]:
    """What MAGI-1 runs in each row of ``chunk_pipeline``.

    Args:
        matrix: from ``chunk_pipeline``.
        times: ``[steps + 1]`` from ``magi_times``.
        key_chunks: chunks attended to, itself included, in equal parts of the denoising; empty means all history.
        clean_key_chunks: the same for the clean chunk.
        twin_time: time from which the oldest chunk counts as nearly clean (inclusive, as 0.3 is above 0.3 in the
            reference's single precision).
    """
    by_chunk = matrix.index[:, :: matrix.block].tolist()
    forwards = []
    for row, (start, end) in enumerate(matrix.active_intervals()):
        first, last = start // matrix.block, end // matrix.block
        done = [index - 1 for index in by_chunk[row][first:last]]
        keys = []
        for chunk, step in enumerate(done, first):
            reach = key_chunks[step * len(key_chunks) // matrix.steps] if key_chunks else chunk + 1
            keys.append((max(0, chunk + 1 - reach), chunk + 1))
        twin = bool(times[done[0]] > twin_time - 1e-6)
        clean = first - 1 if row and first and by_chunk[row - 1][first - 1] == matrix.steps else None
        if clean is not None:
            done.insert(0, matrix.steps)
            keys.insert(0, (max(0, first - clean_key_chunks), first))
        forwards.append(ChunkForward((first, last), clean, tuple(done), tuple(keys), twin))
    return forwards


def _magi_grid(steps: int, shortcut: str) -> Tensor:
    if shortcut not in MAGI_SHORTCUTS:
        raise ValueError(f"MAGI times: shortcut is {shortcut!r}; use one of {', '.join(MAGI_SHORTCUTS)}.")
    if _count("steps", steps, 1) != 12:
        return torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    quarter = torch.tensor(MAGI_SHORTCUTS[shortcut], dtype=torch.float64) / 16
    starts = torch.arange(4, dtype=torch.float64)[:, None] / 4 + quarter
    return torch.cat([starts.flatten(), starts.new_ones(1)])


def _count(name: str, value: int, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"Schedule: {name} is {value!r}; use a whole number of at least {least}.")
    return number


def _multiples(value: int, block: int, least: int = 1, most: int | None = None) -> str:
    below = value // block * block
    allowed = [n for n in (below, below + block) if n >= least and (most is None or n <= most)]
    return " or ".join(map(str, allowed))
