"""Streams through core's Wan 2.1 VAE with random weights inside ComfyUI for test_wan_vae.py; facts go to the last line.

Argument: the diffusion-forcing checkpoint.
"""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import comfy.ldm.wan.vae
import comfy.model_management
import comfy.sd
import torch
from run_in_comfy import pack_module

sys.path.insert(0, str(Path(__file__).parent))
from stream_runs import FRAMES, codec, cut_off, sample  # noqa: E402

host_vae = importlib.import_module(".nodes.host_vae", pack_module().__name__)
video_file = importlib.import_module(".nodes.video_file", pack_module().__name__)
facts: dict[str, object] = {}


def wan_vae(dim: int = 8):
    """Core's VAE object around a narrow Wan 2.1 autoencoder whose features remember."""
    generator = torch.Generator().manual_seed(0)
    module = comfy.ldm.wan.vae.WanVAE(
        dim=dim, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], dropout=0.0,
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif "gamma" in name:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, (0.7 / weight[0].numel()) ** 0.5, generator=generator)
    return comfy.sd.VAE(sd=module.state_dict())


def pieces(decoder, latents: torch.Tensor, size: int) -> torch.Tensor:
    made = [decoder.decode(part) for part in latents.split(size, 2)]
    rest = decoder.finish()
    made = [images for images in made if images.shape[1]] + ([] if rest is None else [rest])
    return torch.cat(made, 1)


def apart(made: torch.Tensor, whole: torch.Tensor) -> list[float]:
    """Largest difference of any value, and the spread of the video it is to be seen against."""
    return [float((made - whole).abs().max()), float(whole.std())] if made.shape == whole.shape else [*made.shape]


@torch.inference_mode()
def decoders(vae) -> None:
    latents = torch.randn(2, 16, 14, 4, 4, generator=torch.Generator().manual_seed(1))
    whole = vae.decode(latents)
    for size in (1, 3, 4, 14):
        facts[f"segments of {size}"] = apart(pieces(host_vae.CarriedDecoder(vae, 4), latents, size), whole)
    facts["context"] = apart(pieces(host_vae.ContextDecoder(vae, 4), latents, 4), whole)
    decoder, count = host_vae.CarriedDecoder(vae, 4), 8
    decoder.resume(latents[:, :, :count], count)
    facts["resumed"] = apart(pieces(decoder, latents[:, :, count:], 3), whole[:, 4 * 7 - 3 :])
    decoder = host_vae.CarriedDecoder(vae, 4)
    decoder.resume(latents[:, :, 3:count], count)
    facts["kind"] = [decoder.kind, decoder._waiting.shape[2]]
    facts["devices"] = sorted({str(part.device) for part in decoder._features[0] if isinstance(part, torch.Tensor)})
    facts["vae kept"] = type(vae.first_stage_model).__name__
    with out_of_memory_once(vae):
        decoder = host_vae.CarriedDecoder(vae, 4)
        tiled = pieces(decoder, latents, 7)
    facts["tiled"] = [list(tiled.shape) == list(whole.shape), decoder.kind]
    facts["others"] = host_vae.CarriedDecoder.supports(codec)


@contextmanager
def out_of_memory_once(vae):
    """The decoder's second segment does not fit as a whole."""
    decoder, calls = vae.first_stage_model.decoder, []
    original = decoder.forward

    def forward(*inputs, **named):
        calls.append(inputs[0].shape)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("no memory")
        return original(*inputs, **named)

    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward


def streamed(model, vae) -> None:
    expected = sample(model, 16, FRAMES)[0]
    whole = vae.decode(expected)[0]
    original, seen = video_file.VideoFile.append, {}

    def append(self, clip, first):
        seen[first] = clip
        return original(self, clip, first)

    video_file.VideoFile.append = append
    try:
        sample(model, 16, FRAMES, "wan", vae)
        facts["streamed"] = apart(torch.cat([seen[first] for first in sorted(seen)])[None], whole[None])
        facts["pieces"] = [len(seen[first]) for first in sorted(seen)]
        seen.clear()
        cut_off(model, 17, comfy.model_management.interrupt_current_processing, 16, FRAMES, "cut", vae)
        before = sorted(seen)
        _, _, lines, _ = sample(model, 16, FRAMES, "cut", vae)
        facts["gone on"] = apart(torch.cat([seen[first] for first in sorted(seen)])[None], whole[None])
        facts["line"], facts["kept"] = lines[0], len(before)
    finally:
        video_file.VideoFile.append = original


if __name__ == "__main__":
    autoencoder = wan_vae()
    decoders(autoencoder)
    streamed(comfy.sd.load_diffusion_model(sys.argv[1]), autoencoder)
    print(json.dumps(facts))
