"""The K/V of one run: a bounded store for every CFG branch, made from a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..attention.ann import AnnAttention, AnnConfig
from ..attention.dense import attend
from ..graphs import outside_graphs
from ..timeline_report import quantity
from .bounded import Attention, BoundedStore
from .budget import IMPORTANCE, MERGE, KVBudgetConfig, StoreShape, plan
from .grouping import HeadGrouping
from .head_groups import HeadGroupsConfig
from .importance_redundancy import ImportanceRedundancy, ImportanceRedundancyConfig
from .late import LateCounts
from .ring import Layout
from .slots import ByteSlots, Fetching, PlainSlots, Scratch, Slots, SplitSlots
from .temporal_merge import TemporalMerge, TemporalMergeConfig
from .tokens import Middle


def dense(
    layer: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, always: Sequence[tuple[int, int]], fresh: bool
) -> Tensor:
    """Attention over everything stored, as ``bounded.Attention``."""
    return attend(q, k, v, bias)


def make_memory(
    config: KVBudgetConfig | None, shape: StoreShape, branches: int, block: int, frames: int,
    ann: AnnConfig | None = None, calls: int = 1, forgetful: bool = False,
) -> KVMemory:  # fmt: skip
    """The K/V of a run as its configuration says.

    Args:
        config, shape, branches, block, frames, forgetful: as of ``KVMemory``; no ``config`` keeps all. ann: sparse
            attention, None for dense. calls: forwards of a block, which share a sparse selection.
    """
    config = config or KVBudgetConfig(frames=frames, sink=0)
    attention = (lambda: dense) if ann is None else lambda: AnnAttention(ann, shape.tokens, calls)
    return KVMemory(config, shape, branches, block, frames, attention, forgetful)


def _rule(config: KVBudgetConfig, shape: StoreShape, layout: Layout, late: LateCounts) -> Middle | None:
    """What is kept between sink and recent frames, for one branch; ``late`` is of all."""
    if config.keep == MERGE:
        return TemporalMerge(TemporalMergeConfig(), *shape.grid, late)
    if config.keep == IMPORTANCE:
        return ImportanceRedundancy(ImportanceRedundancyConfig(), shape.tokens, shape.logits(layout))
    return None


def _grouping(config: KVBudgetConfig, shape: StoreShape, layout: Layout, block: int) -> HeadGrouping | None:
    """What groups the heads of one branch."""
    if not config.groups_heads:
        return None
    return HeadGrouping(
        HeadGroupsConfig(config.near_share, config.near), shape.layers, block, max(1, shape.logits(layout) // 4)
    )


class Allocator:
    """Makes the slots of a layer as the budget says. It does not know the stores it makes them for: nothing of theirs
    is kept in a circle, so a run that ends, however it ends, gives its memory back at once.

    Attributes:
        layout: room of a layer from now on.
    """

    def __init__(self, config: KVBudgetConfig, layout: Layout, scratch: Scratch | Fetching) -> None:
        self.layout, self._config, self._scratch = layout, config, scratch

    def __call__(self, like: Tensor, tokens: int) -> Slots:
        """Slots for ``tokens`` tokens like ``[B, n, heads, head_dim]``."""
        if self._config.offload:
            return SplitSlots(like, tokens, self.layout.whole_frames * self.layout.tokens, self._scratch)
        if self._config.storage == "8-bit":
            return ByteSlots(like, tokens, self._scratch)
        return PlainSlots(like, tokens)


class KVMemory:
    """Stores of all branches, which advance together. Its size is known before anything is allocated.

    Args:
        config: the budget. shape: of one branch. branches: CFG branches. block: latent frames denoised together.
        frames: of the whole video. attention: makes what attends, one a branch.
        forgetful: the second branch keeps nothing and attends to its own block alone (``accel.history_guidance``).

    Attributes:
        layout: room of each layer. planned_bytes: of all branches on the device.

    Raises:
        ValueError: as ``budget.plan``.
    """

    def __init__(
        self, config: KVBudgetConfig, shape: StoreShape, branches: int, block: int, frames: int,
        attention: Callable[[], Attention], forgetful: bool = False,
    ) -> None:  # fmt: skip
        branches -= forgetful
        self._blind, self._block = forgetful, 0
        self.config, self.shape, self.layout = config, shape, plan(config, shape, branches, block, frames)
        self.planned_bytes = branches * shape.bytes(self.layout, config)
        self._scratch, self._late = Fetching() if config.offload else Scratch(), LateCounts()
        self._allocator = Allocator(config, self.layout, self._scratch)
        attentions = [attention() for _ in range(branches)]
        self._sparse = [one for one in attentions if isinstance(one, AnnAttention)]
        self._unread = 0
        self.stores = [
            BoundedStore(
                shape.layers, self.layout, shape.rotary, one, _rule(config, shape, self.layout, self._late),
                self._allocator,
                _grouping(config, shape, self.layout, block),
            )
            for one in attentions
        ]  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the device now."""
        selections = sum(one.nbytes for one in self._sparse)
        return sum(store.nbytes for store in self.stores) + self._scratch.nbytes + selections

    @property
    def branches(self) -> int:
        """CFG branches that attend, the one that keeps nothing among them."""
        return len(self.stores) + self._blind

    @property
    def keys(self) -> float:
        """Tokens that a query reads, the mean over layers, heads and branches."""
        counts = [store.keys for store in self.stores] + [self._block * self.layout.tokens] * self._blind
        return sum(counts) / len(counts)

    def begin(self, first: int, frames: int) -> int:
        """As ``BoundedStore.begin``, for all branches; what their layers kept is sent for together."""
        self._unread, self._block = self._saved(), frames
        positions = [store.begin(first, frames) for store in self.stores]
        self._late.send()
        return positions[0]

    @property
    def unread_flops(self) -> int:
        """What sparse attention has saved since ``begin``, all branches and layers."""
        return self._saved() - self._unread

    @outside_graphs
    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, branches: Sequence[int] | None = None
    ) -> Tensor:
        """As ``BoundedStore.attend``; the batch ``[branches * B, n, heads, head_dim]`` holds one branch after another.

        Args:
            branches: which ones, in the batch's order; None for all.
        """
        if branches is None:
            branches = range(self.branches)
        sides = (side.chunk(len(branches)) for side in (queries, keys, values))
        parts = [self._attend(layer, branch, *own) for branch, *own in zip(branches, *sides, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, layer: int, branch: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of one branch."""
        if branch == len(self.stores):
            return attend(queries, keys, values)
        return self.stores[branch].attend(layer, queries, keys, values)

    def commit(self) -> None:
        """As ``BoundedStore.commit``, for all branches."""
        for store in self.stores:
            store.commit()

    def lower(self, block: int) -> str | None:
        """Gives up a quarter of the places, the middle first; see ``denoiser.LowersMemory``."""
        layout = self.layout
        middle, ring = layout.middle, layout.ring
        if self.config.groups_heads:
            return None
        if middle:
            middle = int(middle * 0.75) if middle > layout.tokens else 0
        elif ring > block + 1:
            ring = max(block + 1, int(ring * 0.75))
        if (middle, ring) == (layout.middle, layout.ring):
            return None
        self.layout = self._allocator.layout = replace(layout, middle=middle, ring=ring)
        self.planned_bytes = len(self.stores) * self.shape.bytes(self.layout, self.config)
        for store in self.stores:
            store.shrink(self.layout, block)
        return self.note()

    def note(self) -> str:
        """What is kept, for the report."""
        layout, tokens = self.layout, self.layout.tokens
        between = f", {layout.middle / tokens:.3g} frames' worth between ({self.config.keep})" if layout.middle else ""
        return (
            f"{layout.sink} first and {layout.ring} latest latent frames{between}, "
            f"{quantity(self.planned_bytes, 'B')}{' in 8-bit storage' if self.config.storage == '8-bit' else ''}"
            f"{self._groups_note()}"
        )

    def _groups_note(self) -> str:
        """How many heads became near heads, what the others keep, and the bytes left; nothing before that is known."""
        groups = [store.grouping.groups for store in self.stores if store.grouping is not None]
        if not groups or None in groups:
            return ""
        near = sum(len(heads) for one in groups for heads in one.near)
        heads = len(groups) * self.shape.layers * self.shape.heads
        frames = {count for store in self.stores for count in store.full_frames}
        ends = " to ".join(str(count) for count in sorted({min(frames), max(frames)})) if frames else ""
        room = f"; the others keep {ends} latent frames" if ends else ""
        latest = f"the latest {self.stores[0].grouping.config.near} and their block"
        return f"; {near} of {heads} heads keep {latest}{room}; {quantity(self.nbytes, 'B')} in use"

    def sparse_note(self) -> str | None:
        """What sparse attention did, for the report; None where attention is dense."""
        return self._sparse[0].note() if self._sparse else None

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, between two blocks."""
        stores = enumerate(self.stores)
        return {f"{branch}/{key}": value for branch, store in stores for key, value in store.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over, before the first forward, what ``state`` of another run with the same budget gave."""
        for branch, store in enumerate(self.stores):
            store.load({
                key.split("/", 1)[1]: value for key, value in state.items() if key.startswith(f"{branch}/")
            })  # fmt: skip

    def _saved(self) -> int:
        return sum(one.counts.dense_flops - one.counts.flops for one in self._sparse)
