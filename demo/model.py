"""The tiny transformer: Wan 2.1's layout (same key names, shapes and formulas), small enough to train on a CPU.

ComfyUI's ``WanModel`` and ``CausalWanModel`` load the very same file; the metadata entry ``config`` tells them what
shapes cannot (``num_heads``, ``text_dim``, ``causal_ar``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .codec import AGAIN

MODELS = Path(__file__).with_name("weights") / "diffusion_models"
PATCH = 2
ROPE_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """Shape of a tiny model; every field but the last three follows Wan's names."""

    dim: int = 192
    ffn_dim: int = 768
    num_layers: int = 6
    num_heads: int = 3
    in_dim: int = 16
    text_dim: int = 64
    freq_dim: int = 256
    causal_ar: bool = False
    block: int = 4
    kind: str = "tiny-df"


def rope_rotations(frames: Tensor, height: int, width: int, head_dim: int) -> Tensor:
    """Rotations ``[tokens, head_dim/2, 2]`` (cos, sin) of Wan's 3-axis RoPE, tokens frame-major.

    Args:
        frames: ``[T]`` time position of each latent frame. height, width: token grid of a frame.
    """
    axes = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    rows = torch.arange(height, dtype=torch.float32, device=frames.device)
    columns = torch.arange(width, dtype=torch.float32, device=frames.device)
    grid = torch.stack(torch.meshgrid(frames.float(), rows, columns, indexing="ij"), -1).reshape(-1, 3)
    angles = []
    for axis, dim in enumerate(axes):
        scale = torch.linspace(0, (dim - 2) / dim, steps=dim // 2, dtype=torch.float64, device=frames.device)
        angles.append(grid[:, axis, None] * (1.0 / ROPE_THETA**scale))
    angle = torch.cat(angles, -1)
    return torch.stack((angle.cos(), angle.sin()), -1).float()


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotates neighbouring channel pairs of ``x`` ``[B, tokens, heads, head_dim]``, in the rotations' float32."""
    pairs = x.unflatten(-1, (-1, 2))
    cos, sin = rotations[None, :, None, :, 0], rotations[None, :, None, :, 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention over ``[B, tokens, heads, head_dim]``; returns ``[B, queries, heads * head_dim]``."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self- or cross-attention projections of Wan with RMS-normalised queries and keys."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        return tuple(rearrange(y, "b n (h d) -> b n h d", h=self.heads) for y in (q, k, v))


class Block(nn.Module):
    """One Wan block; a ``store`` with ``append(layer, k, v) -> (k, v)`` gives self-attention the keys and values to
    read; one with ``attend``, such as a ``KVMemory``, attends itself."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, 1e-6)
        self.cross_attn = SelfAttention(config)
        self.norm2 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def modulated(self, x: Tensor, e: Tensor) -> Tensor:
        """Input of self-attention: the AdaLN-modulated tokens ``[B, N, D]`` (TeaCache's signal)."""
        shift, scale = ((self.modulation[:, None, index] + e[:, :, index]) for index in (0, 1))
        return modulate(self.norm1(x), shift, scale)

    def forward(
        self, x: Tensor, e: Tensor, rotations: Tensor, context: Tensor, mask=None, store=None, layer=0, bias=None
    ) -> Tensor:
        """``x`` ``[B, N, D]``, ``e`` ``[B, T, 6, D]`` one row a frame, ``context`` ``[B, L, D]``."""
        y = self.modulated(x, e)
        q, k, v = self.self_attn.project(y, y)
        q, k = rotate(q, rotations), rotate(k, rotations)
        if hasattr(store, "attend"):
            attended = store.attend(layer, q, k, v).flatten(2)
        else:
            attended = attend(q, *((k, v) if store is None else store.append(layer, k, v)), mask)
        gate, shift2, scale2, gate2 = ((self.modulation[:, None, index] + e[:, :, index]) for index in range(2, 6))
        x = x + gated(self.self_attn.o(attended), gate)
        q, k, v = self.cross_attn.project(self.norm3(x), context)
        x = x + self.cross_attn.o(attend(q, k, v, bias))
        return x + gated(self.ffn(modulate(self.norm2(x), shift2, scale2)), gate2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN of tokens ``[B, N, D]`` with one shift and scale ``[B, T, D]`` a latent frame."""
    frames = x.unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Tokens ``[B, N, D]`` times one gate ``[B, T, D]`` a latent frame."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)


class Head(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, 1e-6, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.in_dim * PATCH * PATCH)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation[:, None] + e[:, :, None]).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


class TinyWan(nn.Module):
    """Velocity field v = noise - x0 of a tiny AR video model."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def embed_time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding ``[B, T, D]`` and its projection ``[B, T, 6, D]`` for noise levels ``[B, T]`` in [0, 1]."""
        half = self.config.freq_dim // 2
        frequencies = torch.pow(10000, -torch.arange(half, device=sigma.device, dtype=torch.float32) / half)
        angle = sigma.float()[..., None] * 1000.0 * frequencies
        e = self.time_embedding(torch.cat((angle.cos(), angle.sin()), -1).to(self.head.head.weight.dtype))
        return e, self.time_projection(e).unflatten(2, (6, -1))

    def embed(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, N, D]`` of latents ``[B, C, T, H, W]`` and their rotations."""
        tokens = self.patch_embedding(x)
        rotations = rope_rotations(
            positions, tokens.shape[3], tokens.shape[4], self.config.dim // self.config.num_heads
        )
        return tokens.flatten(2).transpose(1, 2), rotations

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        context: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        store=None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Velocity ``[B, C, T, H, W]``.

        Args:
            x: noisy latents ``[B, C, T, H, W]``, H and W even. sigma: noise level of each frame ``[B, T]``.
            context: prompt ``[B, L, text_dim]``. positions: ``[T]`` time positions, default 0..T-1.
            mask: ``[N, N]`` bool, True where a query token may see a key token. store: a K/V store, see ``Block``.
            bias: ``[1, L]`` added to the attention scores of the prompt tokens, see ``prompt.pack``.
        """
        if positions is None:
            positions = torch.arange(x.shape[2], device=x.device)
        tokens, rotations = self.embed(x, positions)
        e, e0 = self.embed_time(sigma)
        context = self.text_embedding(context)
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, e0, rotations, context, mask, store, layer, bias)
        return unpatch(self.head(tokens, e), x)


def unpatch(tokens: Tensor, x: Tensor) -> Tensor:
    """Latents of the shape of ``x`` ``[B, C, T, H, W]`` from what the head gives for each token."""
    frames, height, width = x.shape[2], x.shape[3] // PATCH, x.shape[4] // PATCH
    pattern = "b (t h w) (p q c) -> b c t (h p) (w q)"
    return rearrange(tokens, pattern, t=frames, h=height, w=width, p=PATCH, q=PATCH).contiguous()


def block_causal_mask(frames: int, tokens_per_frame: int, block: int) -> Tensor:
    """``[N, N]`` bool: a token sees its own block of latent frames and all earlier ones."""
    index = torch.arange(frames * tokens_per_frame) // (tokens_per_frame * block)
    return index[:, None] >= index[None, :]


def save_model(
    model: TinyWan, path: Path, dtype: torch.dtype = torch.float16, notes: dict[str, str] | None = None
) -> None:
    """Writes weights and the metadata that ComfyUI's loader reads."""
    config = asdict(model.config)
    transformer = {"num_heads": config["num_heads"], "text_dim": config["text_dim"]}
    if config["causal_ar"]:
        transformer["causal_ar"] = True
    metadata = {"config": json.dumps({"transformer": transformer}), "tiny": json.dumps(config)} | (notes or {})
    save_file(
        {name: value.detach().to(dtype).contiguous() for name, value in model.state_dict().items()}, path, metadata
    )


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> TinyWan:
    """The model of a file written by ``save_model``, in evaluation mode.

    Raises:
        ValueError: the file is missing, damaged or another model's.
    """
    try:
        with safe_open(path, "pt") as file:
            config = TinyConfig(**json.loads(file.metadata()["tiny"]))
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        model = _empty_model(config, shapes)
        model.load_state_dict({name: value.to(dtype) for name, value in load_file(path).items()}, assign=True)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"Tiny AR model: {path.name} cannot be read ({reason}); {AGAIN}.") from None
    return model.to(dtype).eval().requires_grad_(False)


def _empty_model(config: TinyConfig, shapes: dict[str, list[int]]) -> TinyWan:
    """A model without weights, which takes those of a file; ValueError where they are of another shape."""
    layers = sum(name.endswith("self_attn.q.weight") for name in shapes)
    heads = config.num_heads
    if config.num_layers != layers or type(heads) is not int or heads < 1 or config.dim % heads:
        raise ValueError(f"{layers} layers, not {config.num_layers}, {heads} heads in {config.dim} channels")
    with torch.device("meta"):
        model = TinyWan(config)
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    if wanted != shapes:
        raise ValueError("its tensors are not those of its configuration")
    return model
