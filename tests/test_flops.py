"""The cost model equals the operations torch counts, and reproduces the published counts of full-size models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from accel.flops import CONVENTION, WAN_1_3B, WAN_14B, WanShape
from demo.model import TinyConfig, TinyWan


class StoredKeys:
    """A K/V store that holds ``count`` tokens before those of the call."""

    def __init__(self, count: int) -> None:
        self.count = count

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        stored = k.new_empty(k.shape[0], self.count, *k.shape[2:])
        return torch.cat([stored, k], 1), torch.cat([stored, v], 1)


def counted(shape: WanShape, frames: int, height: int, width: int, stored: int = 0, branches: int = 1) -> int:
    """FLOPs that torch counts on the meta device, where no fused attention hides them."""
    config = TinyConfig(
        dim=shape.dim,
        ffn_dim=shape.ffn_dim,
        num_layers=shape.layers,
        num_heads=shape.heads,
        in_dim=shape.in_channels,
        text_dim=shape.text_dim,
    )
    with torch.device("meta"):
        model = TinyWan(config)
        latents = torch.empty(branches, shape.in_channels, frames, height, width)
        sigmas = torch.empty(branches, frames)
        context = torch.empty(branches, shape.text_tokens, shape.text_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(latents, sigmas, context, store=StoredKeys(stored))
    return counter.get_total_flops()


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([8, 12]),
    layers=st.integers(1, 3),
    frames=st.integers(1, 5),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stored=st.integers(0, 9),
    branches=st.integers(1, 2),
)
def test_a_forward_costs_what_torch_counts(heads, head_dim, layers, frames, size, stored, branches):
    dim = heads * head_dim
    shape = WanShape(dim, 3 * dim + 1, layers, heads, text_tokens=7, in_channels=5, out_channels=5, text_dim=10)
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
