"""The tiny codec: a fixed linear map of 8x8x3 pixel patches to 16 channels (PCA), fitted once before the models.

Latents are ``[B, 16, T, H/8, W/8]``, as Wan's spatial stride has it, half-whitened (see ``TinyCodec.scale``); there is
no temporal stride.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = Path(__file__).with_name("weights")
PATCH = 8
CHANNELS = 16
AGAIN = "load the file from the pack again"


class TinyCodec:
    """Encoder and decoder between pixels in [0, 1] and latents.

    Attributes:
        basis: ``[192, 16]`` orthonormal columns. mean: ``[192]``. scale: ``[16]``, what a unit of each channel is
        in pixels: the root of its standard deviation, so that what fills most of the picture stands out of the noise
        first and weighs most in a loss.
    """

    def __init__(self, basis: Tensor, mean: Tensor, scale: Tensor) -> None:
        self.basis, self.mean, self.scale = basis, mean, scale

    @classmethod
    def load(cls, path: Path = WEIGHTS / "tiny-codec.safetensors") -> TinyCodec:
        """The codec that ``save`` wrote. Raises ValueError where it cannot be read."""
        try:
            tensors = [load_file(path)[name] for name in ("basis", "mean", "scale")]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"Tiny AR Codec: {path.name} cannot be read ({error}); {AGAIN}.") from None
        shapes = [list(tensor.shape) for tensor in tensors]
        if shapes != [[PATCH * PATCH * 3, CHANNELS], [PATCH * PATCH * 3], [CHANNELS]]:
            raise ValueError(f"Tiny AR Codec: {path.name} holds tensors {shapes}; {AGAIN}.")
        return cls(*tensors)

    @classmethod
    def fit(cls, frames: Tensor) -> TinyCodec:
        """PCA of every 8x8 patch of ``frames`` ``[B, 3, T, H, W]``."""
        patches = _patches(frames).reshape(-1, PATCH * PATCH * 3).double()
        mean = patches.mean(0)
        centred = patches - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        basis = vectors.flip(1)[:, :CHANNELS]
        deviation = (centred @ basis).std(0)
        scale = (deviation * deviation.mean()).sqrt()  # half whitened, mean square 1
        return cls(basis.float().contiguous(), mean.float(), scale.float())

    def save(self, path: Path) -> None:
        save_file({"basis": self.basis, "mean": self.mean, "scale": self.scale}, path)

    def encode(self, frames: Tensor) -> Tensor:
        """Latents ``[B, 16, T, H/8, W/8]`` of ``frames`` ``[B, 3, T, H, W]`` in [0, 1]; H and W must divide by 8."""
        if frames.ndim != 5 or frames.shape[1] != 3 or frames.shape[-1] % PATCH or frames.shape[-2] % PATCH:
            raise ValueError(
                f"Tiny AR Codec: frames must be [batch, 3, frames, height, width] with height and width "
                f"divisible by {PATCH}, "
                f"got {tuple(frames.shape)}."
            )
        latents = (_patches(frames) - self.mean) @ self.basis / self.scale
        return rearrange(latents, "b t h w c -> b c t h w").contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Frames ``[B, 3, T, H, W]`` in [0, 1] of ``latents`` ``[B, 16, T, H/8, W/8]``."""
        if latents.ndim != 5 or latents.shape[1] != CHANNELS:
            raise ValueError(
                f"Tiny AR Codec: latents must be [batch, {CHANNELS}, frames, height, width], got "
                f"{tuple(latents.shape)}."
            )
        patches = (rearrange(latents.float(), "b c t h w -> b t h w c") * self.scale) @ self.basis.T + self.mean
        frames = rearrange(patches, "b t h w (c p q) -> b c t (h p) (w q)", c=3, p=PATCH, q=PATCH)
        return frames.clamp(0, 1)


def _patches(frames: Tensor) -> Tensor:
    return rearrange(frames, "b c t (h p) (w q) -> b t h w (c p q)", p=PATCH, q=PATCH)
