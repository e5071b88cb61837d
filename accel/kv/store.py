"""The K/V store of a block-causal rollout: committed clean history, and the block being denoised behind it.

A denoising forward writes its block's keys and values at the end and reads everything up to there; only a commit moves
the end. So a skipped forward leaves the bookkeeping exactly as the forward would have.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..graphs import outside_graphs


class KVStore:
    """Rotated keys and plain values of every layer, ``[B, tokens, heads, head_dim]``, in one allocation a layer.

    Args:
        layers: transformer blocks. capacity: tokens of the whole rollout.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        if layers < 1 or capacity < 1:
            raise ValueError(f"KVStore: {layers} layers of {capacity} tokens must both be 1 or more.")
        self.capacity = capacity
        self.end = self._written = 0
        self._slots: list[tuple[Tensor, Tensor] | None] = [None] * layers

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(key.nbytes + value.nbytes for key, value in (slot for slot in self._slots if slot is not None))

    def begin(self, first: int, frames: int) -> int:
        """A forward of the latent frames ``[first, first + frames)`` follows; returns the position of the first."""
        return first

    @outside_graphs
    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values a block may see: all committed ones and its own, views of the store.

        Args:
            layer: index of the transformer block. key, value: ``[B, tokens, heads, head_dim]`` of the block.

        Raises:
            ValueError: the rollout is longer than the capacity the store was made for.
        """
        last = self.end + key.shape[1]
        if last > self.capacity:
            raise ValueError(
                f"KVStore: {last} tokens do not fit the {self.capacity} it was made for; make it for the whole rollout."
            )
        if self._slots[layer] is None:
            shape = (key.shape[0], self.capacity, *key.shape[2:])
            self._slots[layer] = (key.new_zeros(shape), torch.zeros(shape, dtype=value.dtype, device=value.device))
        keys, values = self._slots[layer]
        keys[:, self.end : last] = key
        values[:, self.end : last] = value
        self._written = last
        return keys[:, :last], values[:, :last]

    def state(self) -> dict[str, Tensor]:
        """The committed keys and values of every layer, ``[B, tokens, heads, head_dim]``, as views."""
        kept = [(f"{layer}.{name}", tensor) for layer, slot in enumerate(self._slots) if slot is not None
                for name, tensor in zip(("key", "value"), slot, strict=True)]  # fmt: skip
        return {name: tensor[:, : self.end] for name, tensor in kept}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what ``state`` of a store for the same rollout gave."""
        for layer in range(len(self._slots)):
            if f"{layer}.key" in state:
                self.append(layer, state[f"{layer}.key"], state[f"{layer}.value"])
        self.end = next((tensor.shape[1] for tensor in state.values()), 0)

    def commit(self) -> None:
        """What was written last is clean and becomes history."""
        self.end = self._written
