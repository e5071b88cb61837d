"""How much K/V a rollout may keep, and what that buys: sizes are known, to the byte, before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .head_groups import HeadGroupsConfig
from .ring import Layout
from .rotary import TimeRotary

NODE = "KV Cache Budget"
WINDOW, IMPORTANCE, MERGE, HEADS = "window", "importance-redundancy", "temporal-merge", "head-groups"
KEEPS = (WINDOW, IMPORTANCE, MERGE, HEADS)
STORAGES = ("model", "8-bit")
LOGIT_BYTES = 8  # float32, twice: see ``importance_redundancy.column_mass``
SLACK = 1.02  # of a budget in latent frames, for the unturned time channels of the sink


@dataclass(frozen=True, slots=True)
class KVBudgetConfig:
    """What to keep of a rollout's K/V.

    Attributes:
        frames: latent frames of each CFG branch, those being denoised included; 0 where ``gigabytes`` says it.
        gigabytes: 10^9 bytes of all branches together; 0 where ``frames`` says it.
        sink: first latent frames of the video that are never dropped.
        keep: what is kept between sink and recent frames: ``window`` nothing; ``importance-redundancy`` the tokens
            that the block looks at and that differ from the rest (FlowCache); ``temporal-merge`` one token for what
            stays the same over time (TempCache); ``head-groups`` nothing, but heads that never look back give their
            room to the others (Dummy Forcing).
        recent: latent frames of history that stay whole where there is something in between; 0 takes half of what is
            left beside sink and block.
        storage: ``model`` keeps the model's dtype, ``8-bit`` signed bytes with a scale a token and head.
        offload: latent frames' worth of middle that lie in main memory, beside the budget, and come to the device
            layer by layer; 0 keeps the middle on the device, within the budget.
        near_share, near: with ``head-groups``, the share of all heads that become near heads and how many committed
            latent frames these still see, as in ``HeadGroupsConfig``.
        span: latent frames that the model was trained with (21 are Wan's 81 frames): nothing stands further back in
            time than this, or than sink and ring together where those are more.

    Raises:
        ValueError: a value out of range, both or neither of frames and gigabytes, an offload without a middle, or
            8-bit storage with head groups.
    """

    frames: int = 0
    gigabytes: float = 0.0
    sink: int = 1
    keep: str = WINDOW
    recent: int = 0
    storage: str = "model"
    offload: int = 0
    span: int = 21
    near_share: float = 0.5
    near: int = 1

    def __post_init__(self) -> None:
        HeadGroupsConfig(self.near_share, self.near)
        if self.keep not in KEEPS or self.storage not in STORAGES:
            raise ValueError(
                f"{NODE}: keep is {self.keep!r} and storage {self.storage!r}; use one of {', '.join(KEEPS)} and one of "
                f"{', '.join(STORAGES)}."
            )
        counts = (self.frames, self.sink, self.recent, self.offload, self.span - 1)
        if min(counts) < 0 or not (math.isfinite(self.gigabytes) and self.gigabytes >= 0):
            raise ValueError(
                f"{NODE}: frames {self.frames}, gigabytes {self.gigabytes}, sink {self.sink}, recent {self.recent} and "
                f"offload {self.offload} must be 0 or more, span {self.span} 1 or more."
            )
        if self.offload and (not self.has_middle or self.storage != STORAGES[0]):
            raise ValueError(
                f"{NODE}: offload is {self.offload}, which moves what is kept between sink and recent frames in the "
                f"model's dtype; set keep to {IMPORTANCE} or {MERGE} and storage to model, or offload to 0."
            )
        if self.keep == HEADS and self.storage != STORAGES[0]:
            raise ValueError(
                f"{NODE}: storage is {self.storage!r}, but {HEADS} moves keys and values as the model makes them; set "
                f"storage to model, or keep to another rule."
            )
        if (self.frames > 0) == (self.gigabytes > 0):
            raise ValueError(
                f"{NODE}: frames is {self.frames} and gigabytes {self.gigabytes:g}; set one of them and leave the "
                "other at 0."
            )

    @property
    def has_middle(self) -> bool:
        return self.keep in (IMPORTANCE, MERGE)

    @property
    def groups_heads(self) -> bool:
        """Whether some heads are to give up room."""
        return self.keep == HEADS and self.near_share > 0


@dataclass(frozen=True, slots=True)
class StoreShape:
    """What one CFG branch stores.

    Attributes:
        layers: transformer blocks. heads, head_dim: of each. grid: rows and columns of tokens of a latent frame.
        batch: videos at once.
        element: bytes of a number in the model's dtype. rotary: how time turns keys.
    """

    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    batch: int
    element: int
    rotary: TimeRotary

    @property
    def tokens(self) -> int:
        """Tokens of a latent frame."""
        return self.grid[0] * self.grid[1]

    def token_bytes(self, storage: str) -> int:
        """Bytes of a token's key and value in one layer."""
        numbers = 2 * self.batch * self.heads
        return numbers * (self.head_dim + 2) if storage == "8-bit" else numbers * self.head_dim * self.element

    def frame_bytes(self, storage: str = "model") -> int:
        """Bytes of a latent frame's keys and values in all layers."""
        return self.layers * self.tokens * self.token_bytes(storage)

    def bytes(self, layout: Layout, config: KVBudgetConfig) -> int:
        """Bytes of a store on the device: keys and values, bookkeeping, and what is needed for a moment."""
        middle, there = layout.middle, layout.places - (layout.middle if config.offload else 0)
        far = layout.sink * self.tokens + middle
        plain = far * self.batch * self.heads * self.rotary.channels * self.element
        notes = middle * (4 * self.heads + 4) + (4 * layout.places if middle else 0)
        kept = there * self.token_bytes(config.storage) + plain + notes
        return self.layers * kept + self.scratch_bytes(layout, config)

    def logits(self, layout: Layout) -> int:
        """Logits that may be held at once while a middle is chosen by importance: one part in a hundred of the keys and
        values, so that what they take does not count. Head groups, which do this once a run, take a quarter of it."""
        return max(64, self.layers * layout.places * self.token_bytes("model") // (100 * LOGIT_BYTES))

    def scratch_bytes(self, layout: Layout, config: KVBudgetConfig) -> int:
        """Bytes needed for a moment, of one layer at a time: widened or fetched keys and values, a middle while it is
        chosen anew, a store while its heads are given other room."""
        wide = self.token_bytes("model")
        chosen = (2 * layout.middle + self.tokens * layout.ring) * wide if layout.middle else 0
        if config.keep == IMPORTANCE and layout.middle:
            chosen += LOGIT_BYTES * self.logits(layout)
        if config.groups_heads:
            moved = max(config.near, 1) * self.tokens * wide // 2
            chosen = max(moved, LOGIT_BYTES * self.logits(layout) // 4)
        read = 2 * (config.offload > 0) + (config.storage == "8-bit")
        return chosen + read * layout.places * wide


def plan(config: KVBudgetConfig, shape: StoreShape, branches: int, block: int, total: int) -> Layout:
    """The largest store that the budget pays for.

    Args:
        config: the budget. shape: of one branch. branches: CFG branches, each with a store of its own. block: latent
            frames denoised together. total: latent frames of the whole video; a store never has room for more.

    Raises:
        ValueError: the budget has no room for the sink, one block and one latent frame of history.
    """
    whole = Layout(shape.tokens, 0, total, 0, max(total, config.span))
    limit = config.gigabytes * 1e9 / branches
    if config.frames >= total or shape.bytes(whole, replace(config, keep=WINDOW, offload=0)) <= limit:
        return whole
    if config.frames:
        limit = config.frames * shape.frame_bytes(config.storage) * SLACK
    most = config.frames or int(limit // shape.frame_bytes(config.storage))
    frames = config.sink + block + 1
    least = Layout(shape.tokens, config.sink, block + 1, config.offload * shape.tokens, frames)
    if most < frames or shape.bytes(least, config) > limit:
        given = f"{config.frames} latent frames" if config.frames else f"{config.gigabytes:g} GB"
        needed = shape.bytes(least, config)
        enough = max(frames, math.ceil(needed / (shape.frame_bytes(config.storage) * SLACK)))
        raise ValueError(
            f"{NODE}: {given} have no room for {config.sink} sink frame(s), a block of {block} and one frame of "
            f"history; give {enough} or more latent frames ({needed * branches / 1e9:.3g} GB), or a smaller sink or "
            "block."
        )
    if not config.has_middle or config.offload:
        return _largest_window(config, shape, limit, most, block)
    recent = config.recent or max(1, (most - config.sink - block) // 2)
    ring = min(recent + block, most - config.sink)
    layout = Layout(shape.tokens, config.sink, ring, 0, max(most, config.span))
    if shape.bytes(layout, config) > limit:
        return _largest_window(config, shape, limit, layout.whole_frames, block)
    return _largest_middle(config, shape, layout, limit)


def _largest_window(config: KVBudgetConfig, shape: StoreShape, limit: float, most: int, block: int) -> Layout:
    for frames in range(most, config.sink + block, -1):
        middle = config.offload * shape.tokens
        layout = Layout(shape.tokens, config.sink, frames - config.sink, middle, max(frames, config.span))
        if shape.bytes(layout, config) <= limit:
            return layout
    raise AssertionError("the least layout was checked before")


def _largest_middle(config: KVBudgetConfig, shape: StoreShape, layout: Layout, limit: float) -> Layout:
    low, high = 0, int(limit // (shape.layers * shape.token_bytes(config.storage)))
    while low < high:
        middle = (low + high + 1) // 2
        if shape.bytes(replace(layout, middle=middle), config) <= limit:
            low = middle
        else:
            high = middle - 1
    return replace(layout, middle=low)
