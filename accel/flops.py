"""What a forward costs: floating-point operations of a Wan-layout video transformer, counted from its shape.

Published counts follow different conventions (dense, block-causal, full K/V), so this one has a name, ``CONVENTION``:
matrix products and convolutions only, 2 FLOPs per multiply-add, attention counted densely over the keys it is given,
every CFG branch counted. Norms, activations, rotary embedding and softmax are not counted. This is to the FLOP what
``torch.utils.flop_counter.FlopCounterMode`` counts on the meta device; on the CPU that counter takes fused attention
for 0.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from math import prod

CONVENTION = "dense, 2 FLOPs per multiply-add, matmuls and convolutions only, every CFG branch counted"


def linear_flops(rows: int, inputs: int, outputs: int) -> int:
    """FLOPs of ``rows`` vectors of width ``inputs`` through a linear layer of width ``outputs``."""
    return 2 * rows * inputs * outputs


def attention_flops(queries: int, keys: int, width: int) -> int:
    """FLOPs of the score and the value product of attention whose heads have ``width`` channels together."""
    return 4 * queries * keys * width


@dataclass(frozen=True, slots=True)
class WanShape:
    """Shape of a Wan-layout transformer.

    Attributes:
        dim: channels of a token (all heads together).
        ffn_dim: inner width of the feed-forward layer.
        layers: transformer blocks.
        heads: attention heads. They leave the count unchanged, but must divide ``dim``.
        text_tokens: prompt tokens after padding, which cross-attention reads.
        patch: latent frames, rows and columns that one token covers.
        in_channels: latent channels read; image-to-video models read 36.
        out_channels: latent channels written.
        freq_dim: width of the sinusoidal time embedding.
        text_dim: width of the text encoder's output.

    Raises:
        ValueError: a size below 1, or heads that do not divide the width.
    """

    dim: int
    ffn_dim: int
    layers: int
    heads: int
    text_tokens: int
    patch: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    out_channels: int = 16
    freq_dim: int = 256
    text_dim: int = 4096

    def __post_init__(self) -> None:
        if min(min(size) if isinstance(size, tuple) else size for size in astuple(self)) < 1:
            raise ValueError(f"WanShape: every size must be 1 or more, got {self}.")
        if self.dim % self.heads:
            raise ValueError(f"WanShape: dim {self.dim} is not a multiple of heads {self.heads}.")

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of ``height`` x ``width`` latent pixels; a ragged edge is a whole patch."""
        _, rows, columns = self.patch
        return -(-height // rows) * -(-width // columns)

    def block_flops(self, tokens: int, kv_tokens: int, text: bool = True) -> int:
        """FLOPs of one transformer block over ``tokens`` queries and ``kv_tokens`` self-attention keys."""
        square = linear_flops(1, self.dim, self.dim)
        self_attention = 4 * tokens * square + attention_flops(tokens, kv_tokens, self.dim)
        cross_attention = 2 * tokens * square + attention_flops(tokens, self.text_tokens, self.dim)
        prompt_keys = 2 * self.text_tokens * square if text else 0
        feed_forward = linear_flops(tokens, self.dim, self.ffn_dim) + linear_flops(tokens, self.ffn_dim, self.dim)
        return self_attention + cross_attention + prompt_keys + feed_forward

    def time_flops(self, frames: int) -> int:
        """FLOPs of the time embedding and its projection to the six modulations, one row per latent frame."""
        return (
            linear_flops(frames, self.freq_dim, self.dim)
            + linear_flops(frames, self.dim, self.dim)
            + linear_flops(frames, self.dim, 6 * self.dim)
        )

    def text_flops(self) -> int:
        """FLOPs of the prompt's embedding."""
        rows = self.text_tokens
        return linear_flops(rows, self.text_dim, self.dim) + linear_flops(rows, self.dim, self.dim)

    def patch_flops(self, tokens: int) -> int:
        """FLOPs of the patch embedding."""
        return linear_flops(tokens, self.in_channels * prod(self.patch), self.dim)

    def head_flops(self, tokens: int) -> int:
        """FLOPs of the output head."""
        return linear_flops(tokens, self.dim, self.out_channels * prod(self.patch))

    def forward_flops(
        self,
        frames: int,
        tokens_per_frame: int,
        kv_tokens: int | None = None,
        *,
        branches: int = 1,
        time_rows: int | None = None,
        text: bool = True,
        head: bool = True,
    ) -> int:
        """FLOPs of one forward.

        Args:
            frames: latent frames of the window, a multiple of the temporal patch.
            tokens_per_frame: tokens of one latent frame (of one temporal patch where that is longer than a frame).
            kv_tokens: keys that a query of self-attention reads, stored ones included; None for those of the window.
                For a block-causal mask give the mean over the queries.
            branches: CFG branches (times batch), each a forward of its own.
            time_rows: rows of the time embedding; None for one per latent frame (diffusion forcing), 1 where all frames
                share a noise level.
            text: False where the prompt's embedding and its cross-attention keys and values are stored.
            head: False where the output is not needed, as in a pass that only commits K/V.

        Returns:
            FLOPs under ``CONVENTION``.

        Raises:
            ValueError: no frames, no tokens, no keys, or frames that do not fill the temporal patch.
        """
        if frames < 1 or tokens_per_frame < 1 or branches < 1 or frames % self.patch[0]:
            raise ValueError(
                f"forward_flops: needs 1 or more frames (a multiple of {self.patch[0]}), tokens and branches, "
                f"got {frames}, {tokens_per_frame} and {branches}."
            )
        tokens = frames // self.patch[0] * tokens_per_frame
        keys = tokens if kv_tokens is None else kv_tokens
        if keys < 1:
            raise ValueError(f"forward_flops: self-attention needs 1 or more keys, got kv_tokens {kv_tokens}.")
        total = self.patch_flops(tokens) + self.time_flops(frames if time_rows is None else time_rows)
        total += self.layers * self.block_flops(tokens, keys, text)
        total += self.text_flops() if text else 0
        total += self.head_flops(tokens) if head else 0
        return branches * total


WAN_1_3B = WanShape(dim=1536, ffn_dim=8960, layers=30, heads=12, text_tokens=512)
WAN_14B = WanShape(dim=5120, ffn_dim=13824, layers=40, heads=40, text_tokens=512)
