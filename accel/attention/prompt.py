"""Cross-attention over fewer prompt tokens: padding collapsed into one key, and the tokens a block looks at (AnnCA).

Wan pads a prompt to 512 tokens with zeros and does not mask them, so the rows of the padding are all alike: n identical
keys weigh as one with ``ln n`` added to its logits, exactly. Beyond that, AnnCA (arXiv 2602.01801) lets each block read
only the text tokens it attends to most. Cross-attention is a small part of a causal model's FLOPs, and no more than
that can be gained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .dense import attend

SAMPLE = 256
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """Which prompt tokens cross-attention reads.

    Attributes:
        collapse: padding as one key with a bias; exact.
        keep: fraction of the text tokens a block reads in each layer, in (0, 1]; 1 reads all.

    Raises:
        ValueError: a fraction outside these, or one below 1 without ``collapse``.
    """

    collapse: bool = True
    keep: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"Prompt attention: keep is {self.keep}; use more than 0 and at most 1 (all text tokens).")
        if self.keep < 1.0 and not self.collapse:
            raise ValueError(
                f"Prompt attention: keep is {self.keep} with collapse off, where padding counts as text; "
                f"turn collapse on or use keep 1."
            )


@dataclass(frozen=True, slots=True)
class Collapsed:
    """A prompt's rows with its padding as one.

    Attributes:
        keys: ``[B, kept, heads, head_dim]``, or raw rows ``[B, kept, D]``; a view of what was given.
        values: likewise; None for raw rows.
        bias: ``[kept]`` in float32 (float64 for such keys), ``ln n`` for the last row, 0 for the others; None where
            nothing was collapsed.
        padding: rows n the last one stands for; 0 where nothing was collapsed.
    """

    keys: Tensor
    values: Tensor | None
    bias: Tensor | None
    padding: int

    @property
    def text(self) -> int:
        """Rows that are not the padding's representative."""
        return self.keys.shape[1] - bool(self.padding)


def collapse(keys: Tensor, values: Tensor | None = None) -> Collapsed:
    """Collapses the run of bit-identical rows at the end of a prompt into one row; exact.

    In a batch whose texts have different lengths, the run that all entries share is collapsed; the rest of a shorter
    text's padding stays as it is, which is exact, too. Rows that differ in a single bit are left alone: a host that
    masks or zeroes the text encoder's output differently loses nothing but the gain. Reads one number back from the
    device, once per prompt and layer.

    Args:
        keys: ``[B, L, heads, head_dim]``, or raw rows ``[B, L, D]``, whose projections by any layer can then be used
            with the same bias. values: as keys, or None.
    """
    run = _identical_run(keys)
    if values is not None:
        run = torch.minimum(run, _identical_run(values))
    count = int(run.min())
    if count < 2:
        return Collapsed(keys, values, None, 0)
    kept = keys.shape[1] - count + 1
    bias = torch.zeros(kept, dtype=torch.promote_types(torch.float32, keys.dtype), device=keys.device)
    bias[-1] = math.log(count)
    return Collapsed(keys[:, :kept], None if values is None else values[:, :kept], bias, count)


def _identical_run(rows: Tensor) -> Tensor:
    """How many rows at the end of each entry of ``[B, L, ...]`` have the same bits, int64 ``[B]``."""
    bits = rows.view(BITS[rows.element_size()]).flatten(2)
    same = (bits == bits[:, -1:]).all(-1)
    return same.flip(1).cumprod(1).sum(1)


def token_scores(q: Tensor, k: Tensor) -> Tensor:
    """How much any query wants each key: the largest q.k / sqrt(head_dim) over all heads and up to 256 queries at equal
    distances, ``[B, keys]`` in float32."""
    sample = q[:, :: max(1, -(-q.shape[1] // SAMPLE))].transpose(1, 2).float()
    logits = sample @ k.permute(0, 2, 3, 1).float()
    return logits.amax((1, 2)) * q.shape[-1] ** -0.5


def prune(prompt: Collapsed, q: Tensor, keep: float) -> Collapsed:
    """The rows of a prompt that a block's queries look at: ``ceil(keep * text)`` text tokens, the first among them, and
    the padding's representative. Each batch entry has its own; in a shorter text of a batch, padding that was not
    collapsed counts as text.

    Args:
        prompt: with keys and values ``[B, L, heads, head_dim]``. q: ``[B, queries, heads, head_dim]``. keep: in (0, 1].
    """
    if prompt.text < 1:
        return prompt
    scores = token_scores(q, prompt.keys[:, : prompt.text])
    scores[:, 0] = math.inf
    index = scores.topk(math.ceil(keep * prompt.text), -1).indices.sort(-1).values
    bias = None
    if prompt.padding:
        index = torch.cat([index, index.new_full((len(index), 1), prompt.text)], -1)
        bias = prompt.bias[-index.shape[1] :]
    entry = torch.arange(len(index), device=index.device)[:, None]
    return Collapsed(prompt.keys[entry, index], prompt.values[entry, index], bias, prompt.padding)


class PromptAttention:
    """Cross-attention of one run over its prompt's collapsed, and where asked pruned, keys and values.

    A host asks ``holds`` and, if not, projects the prompt and hands its keys and values to ``put``: so they are
    projected once per prompt and layer. When the prompt changes, ``forget``.
    """

    def __init__(self, config: PromptConfig) -> None:
        self.config = config
        self._prompts: dict[tuple[int, int], Collapsed] = {}
        self._pruned: dict[tuple[int, int], Collapsed] = {}

    def holds(self, layer: int, branch: int = 0) -> bool:
        """Whether the prompt of a layer and CFG branch is here."""
        return (layer, branch) in self._prompts

    def put(self, layer: int, k: Tensor, v: Tensor, branch: int = 0) -> None:
        """Takes the prompt's keys and values ``[B, L, heads, head_dim]`` of a layer and CFG branch (0 where one forward
        has all branches in its batch)."""
        self._prompts[layer, branch] = collapse(k, v) if self.config.collapse else Collapsed(k, v, None, 0)
        self._pruned.pop((layer, branch), None)

    def __call__(self, layer: int, q: Tensor, fresh: bool = False, branch: int = 0) -> Tensor:
        """Attention of queries ``[B, queries, heads, head_dim]`` over the prompt; returns their shape.

        Args:
            layer, branch: as for ``put``. q: queries of a block.
            fresh: whether this is the first call of a block, for which text tokens are then picked anew.

        Raises:
            ValueError: no prompt has been put there, or one of another batch size.
        """
        place = (layer, branch)
        prompt = self._prompts.get(place)
        if prompt is None:
            raise ValueError(f"Prompt attention: layer {layer} has no prompt for branch {branch}; put one first.")
        if len(prompt.keys) != len(q):
            raise ValueError(
                f"Prompt attention: {len(q)} batch entries meet a prompt of {len(prompt.keys)}; forget and put anew."
            )
        if self.config.keep < 1.0:
            if fresh or place not in self._pruned:
                self._pruned[place] = prune(prompt, q, self.config.keep)
            prompt = self._pruned[place]
        return attend(q, prompt.keys, prompt.values, prompt.bias)

    def keys_seen(self, layer: int, branch: int = 0) -> int:
        """Prompt keys a query read at the last call of a layer and CFG branch."""
        place = (layer, branch)
        return self._pruned.get(place, self._prompts[place]).keys.shape[1]

    def forget(self) -> None:
        """Drops all prompts, because there is a new one or the run is over."""
        self._prompts.clear()
        self._pruned.clear()
