"""Nodes of the embedded default, the tiny AR video models that come with the pack.

Tiny AR Prompt, Tiny AR Latent and Tiny AR Codec stand in for a text encoder, an empty video latent and a VAE; the
checkpoints themselves appear in core's Load Diffusion Model.
"""

from __future__ import annotations

import math

from comfy_api.latest import io
from torch import Tensor

from ..demo.codec import CHANNELS, PATCH, TinyCodec
from ..demo.prompt import embed_text
from .host_files import empty_latent, register_tiny_models, to_latent_space, to_model_space
from .inputs import checked, is_floats, shown

CATEGORY = "AR Video/tiny"
LATENT = "Tiny AR Latent"
FRAMES = 52
MOST_BYTES = 2 * 10**9  # of an empty latent; the tiny models would need days for more
BRIGHTEST = 1000.0  # of a colour that is no mistake

register_tiny_models()


class TinyVAE:
    """The tiny codec as core's VAE nodes call a VAE: latents in core's LATENT space, images channels-last in [0, 1]."""

    latent_channels = CHANNELS
    latent_dim = 3
    output_channels = 3

    def __init__(self, codec: TinyCodec) -> None:
        self.codec = codec

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, T, H, W, 3]`` of latents ``[B, 16, T, H/8, W/8]``."""
        if latents.ndim != 5 or latents.shape[1] != CHANNELS:
            raise ValueError(
                f"Tiny AR Codec: latents must be [batch, {CHANNELS}, frames, height, width], got "
                f"{list(latents.shape)}; connect a video latent made by one of the tiny models."
            )
        frames = self.codec.decode(to_model_space(latents).cpu())
        return frames.movedim(1, -1).to(latents.device)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents ``[1, 16, T, H/8, W/8]`` of images ``[T, H, W, 3]``, or ``[B, ...]`` of ``[B, T, H, W, 3]``."""
        if not is_floats(pixels):
            raise ValueError(f"Tiny AR Codec: images are {shown(pixels)}; use colours of a floating type in [0, 1].")
        clip = pixels if pixels.ndim == 5 else pixels[None]
        if clip.ndim != 5 or clip.shape[-1] < 3 or clip.shape[2] % PATCH or clip.shape[3] % PATCH:
            raise ValueError(
                f"Tiny AR Codec: images must be [frames, height, width, 3] with height and width divisible by {PATCH}, "
                f"got {list(pixels.shape)}; scale them to 64x64."
            )
        most = clip.abs().max().item() if clip.numel() else 0.0
        if BRIGHTEST < most < math.inf:
            raise ValueError(f"Tiny AR Codec: images reach {most:g}; use colours in [0, 1].")
        latents = self.codec.encode(clip[..., :3].float().cpu().movedim(-1, 1))
        return to_latent_space(latents).to(pixels.device)

    def decode_tiled(self, latents: Tensor, **tiles: int | None) -> Tensor:
        """As ``decode``: the codec is linear in patches and needs no tiles."""
        return self.decode(latents)

    def encode_tiled(self, pixels: Tensor, **tiles: int | None) -> Tensor:
        """As ``encode``."""
        return self.encode(pixels)

    def spacial_compression_decode(self) -> int:
        """Pixels of a latent's side; the name is core's."""
        return PATCH

    spacial_compression_encode = spacial_compression_decode

    def temporal_compression_decode(self) -> int:
        """Frames of a latent frame."""
        return 1


class ARVATinyPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVATinyPrompt",
            display_name="Tiny AR Prompt",
            category=CATEGORY,
            description="Turns a prompt of the tiny AR models into conditioning. An empty text is the unconditional "
            "prompt.",
            search_aliases=["tiny text encode", "ar video demo prompt"],
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="red disc, blue square, gravity, pan",
                    tooltip="One to three shapes as colour and kind (red, green, blue, yellow, magenta or cyan; disc, "
                    "square or diamond), each in a colour of its own, then gravity or float and pan or still, "
                    "separated by commas. Empty: the unconditional prompt.",
                )
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="Conditioning for the tiny AR models, 64 tokens of 64 channels.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, text: str = "") -> bool | str:
        try:
            embed_text(text or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(cls, text: str) -> io.NodeOutput:
        return io.NodeOutput([[embed_text(text), {}]])


class ARVATinyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVATinyLatent",
            display_name=LATENT,
            category=CATEGORY,
            description="An empty video latent for the tiny AR models. It counts latent frames: the tiny codec makes "
            "one video frame of each.",
            search_aliases=["empty tiny latent", "ar video demo latent"],
            inputs=[
                io.Int.Input("frames", default=FRAMES, min=1, max=4096, tooltip="Latent frames of the whole video."),
                io.Int.Input("width", default=64, min=16, max=1024, step=16, tooltip="Pixels; the models know 64."),
                io.Int.Input("height", default=64, min=16, max=1024, step=16, tooltip="Pixels; the models know 64."),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos made side by side."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Zeros [batch, 16, frames, height/8, width/8].")],
        )

    @classmethod
    @checked
    def execute(cls, frames: int, width: int, height: int, batch_size: int) -> io.NodeOutput:
        shape = (batch_size, CHANNELS, frames, height // PATCH, width // PATCH)
        if 4 * math.prod(shape) > MOST_BYTES:
            raise ValueError(
                f"{LATENT}: {batch_size} videos of {frames} latent frames of {width}x{height} pixels take "
                f"{4 * math.prod(shape) / 1e9:.1f} GB; use fewer frames, a smaller size or a smaller batch, up to "
                f"{MOST_BYTES / 1e9:g} GB."
            )
        return io.NodeOutput({"samples": empty_latent(LATENT, *shape)})


class ARVATinyCodec(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ARVATinyCodec",
            display_name="Tiny AR Codec",
            category=CATEGORY,
            description="The codec of the tiny AR models, for core's VAE Decode and VAE Encode. Other models need "
            "their own.",
            search_aliases=["tiny vae", "ar video demo vae"],
            inputs=[],
            outputs=[io.Vae.Output(display_name="vae", tooltip="Encodes and decodes latents of the tiny AR models.")],
        )

    @classmethod
    @checked
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(TinyVAE(TinyCodec.load()))


TINY_NODES: list[type[io.ComfyNode]] = [ARVATinyPrompt, ARVATinyLatent, ARVATinyCodec]
