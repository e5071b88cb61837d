"""The cost model equals the operations torch counts, and reproduces the published counts of full-size models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from accel.flops import CONVENTION, WAN_1_3B, WAN_14B, WanShape


class Attention(nn.Module):
    """Attention of the Wan layout; rotary embedding is left out because it has no matrix product."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, x: Tensor, context: Tensor, stored: Tensor | None = None) -> Tensor:
        """``stored`` [B, keys, dim] stands for keys and values kept from earlier chunks."""
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        if stored is not None:
            k, v = torch.cat([stored, k], 1), torch.cat([stored, v], 1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Attention(dim, heads), Attention(dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, x: Tensor, e: Tensor, text: Tensor, stored: Tensor | None) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = (self.modulation[:, None] + e).unbind(2)
        y = x * (1 + scale) + shift
        x = x + gate * self.self_attn(y, y, stored)
        x = x + self.cross_attn(self.norm3(x), text)
        return x + gate2 * self.ffn(x * (1 + scale2) + shift2)


class Head(nn.Module):
    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, outputs)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation[:, None] + e[:, :, None]).unbind(2)
        return self.head(x * (1 + scale) + shift)


class ReferenceWan(nn.Module):
    """A transformer of the Wan 2.1 layout with a noise level per latent frame."""

    def __init__(self, shape: WanShape) -> None:
        super().__init__()
        s, dim = shape, shape.dim
        self.freq_dim = s.freq_dim
        self.patch_embedding = nn.Conv3d(s.in_channels, dim, s.patch, s.patch)
        self.text_embedding = nn.Sequential(nn.Linear(s.text_dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(s.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, s.ffn_dim, s.heads) for _ in range(s.layers))
        self.head = Head(dim, s.out_channels * s.patch[0] * s.patch[1] * s.patch[2])

    def forward(self, x: Tensor, t: Tensor, text: Tensor, stored: Tensor | None = None) -> Tensor:
        """``x`` [B, C, T, H, W], ``t`` [B, T], ``text`` [B, text_tokens, text_dim]."""
        x = self.patch_embedding(x)
        per_frame = x.shape[3] * x.shape[4]
        x = x.flatten(2).transpose(1, 2)
        e = self.time_embedding(t[..., None].expand(*t.shape, self.freq_dim))
        e0 = self.time_projection(e).unflatten(-1, (6, -1))
        e, e0 = e.repeat_interleave(per_frame, 1), e0.repeat_interleave(per_frame, 1)
        text = self.text_embedding(text)
        for block in self.blocks:
            x = block(x, e0, text, stored)
        return self.head(x, e)


def counted(shape: WanShape, frames: int, height: int, width: int, stored: int = 0, branches: int = 1) -> int:
    """FLOPs that torch counts for one forward on the meta device."""
    with torch.device("meta"):
        model = ReferenceWan(shape)
        inputs = [
            torch.empty(branches, shape.in_channels, frames, height, width),
            torch.empty(branches, frames),
            torch.empty(branches, shape.text_tokens, shape.text_dim),
            torch.empty(branches, stored, shape.dim) if stored else None,
        ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8]),
    layers=st.integers(1, 3),
    frames=st.integers(1, 5),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stored=st.integers(0, 9),
    branches=st.integers(1, 2),
)
def test_a_forward_costs_what_torch_counts(heads, head_dim, layers, frames, size, stored, branches):
    dim = heads * head_dim
    shape = WanShape(dim, 3 * dim + 1, layers, heads, text_tokens=7, in_channels=5, out_channels=3, freq_dim=6, text_dim=10)
    height, width = 2 * size[0], 2 * size[1]
    per_frame = shape.tokens_per_frame(height, width)
    ours = shape.forward_flops(frames, per_frame, frames * per_frame + stored, branches=branches)
    assert ours == counted(shape, frames, height, width, stored, branches)


@pytest.mark.parametrize("shape", [WAN_1_3B, WAN_14B])
def test_full_size_models_cost_what_torch_counts(shape):
    assert shape.forward_flops(25, shape.tokens_per_frame(68, 120)) == counted(shape, 25, 68, 120)


def test_skyreels_257_frames_cost_245_petaflop():
    """SCOPE Table 1 "Original": 200 guided iterations of 25 latent frames at 544x960."""
    assert WAN_1_3B.tokens_per_frame(544 // 8, 960 // 8) == 2040
    run = 200 * WAN_1_3B.forward_flops(25, 2040, branches=2)
    assert run == pytest.approx(244.78e15, rel=0.01)


def test_causal_chunks_cost_the_published_teraflop():
    """Causal 1.3B at 480P, chunks of 3 latent frames, 3 / 9 / 21 latent frames of keys."""
    measured = [WAN_1_3B.forward_flops(3, 1560, kv * 1560) / 1e12 for kv in (3, 9, 21)]
    assert measured == pytest.approx([16.2, 24.3, 40.4], rel=0.01)


def test_self_attention_is_most_of_a_window_forward():
    tokens = 25 * 2040
    attention = WAN_1_3B.layers * 4 * tokens * tokens * WAN_1_3B.dim
    assert attention / WAN_1_3B.forward_flops(25, 2040) == pytest.approx(0.783, abs=0.002)


def test_stored_text_and_a_missing_head_cost_nothing():
    shape = WanShape(8, 16, 2, 2, text_tokens=5, freq_dim=4, text_dim=6)
    full = shape.forward_flops(3, 4)
    prompt = shape.text_flops() + shape.layers * 2 * 2 * 5 * 8 * 8
    assert full - shape.forward_flops(3, 4, text=False) == prompt
    assert full - shape.forward_flops(3, 4, head=False) == shape.head_flops(12)
    assert full - shape.forward_flops(3, 4, time_rows=1) == shape.time_flops(2)


def test_the_convention_has_a_name():
    assert CONVENTION == "dense, 2 FLOPs per multiply-add, matmuls and convolutions only, every CFG branch counted"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: WanShape(10, 20, 1, 3, 4), "dim 10 is not a multiple of heads 3"),
        (lambda: WanShape(8, 0, 1, 2, 4), "1 or more"),
        (lambda: WAN_1_3B.forward_flops(0, 4), "1 or more frames"),
        (lambda: WAN_1_3B.forward_flops(1, 4, kv_tokens=0), "1 or more keys"),
        (lambda: WanShape(8, 8, 1, 2, 4, patch=(2, 2, 2)).forward_flops(3, 4), "multiple of 2"),
    ],
)
def test_impossible_shapes_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
