"""Runs AR Segment Sampler with Stream Segments inside ComfyUI for test_stream.py; facts go to the last line.

Arguments: ``cases`` and the diffusion-forcing checkpoint, or ``killed`` or ``go on`` and the causal checkpoint.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import av
import comfy.model_management
import comfy.sd
import folder_paths
import torch
from run_in_comfy import pack_module
from safetensors.torch import load_file

from nodes import NODE_CLASS_MAPPINGS as NODES

FRAMES = {
    "seed": 7, "steps": 6, "cfg": 2.0, "mode": "auto", "segment": 8, "overlap": 4, "block": 4, "ar_step": 2,
    "solver": "unipc", "shift": 3.0, "history_noise": 0.02,
}  # fmt: skip
CAUSAL = FRAMES | {"cfg": 1.0, "steps": 4, "solver": "auto", "history_noise": 0.0}
STREAM = {"fps": 16.0, "format": "mp4", "resume": True, "every": 1, "context": 2}
OUTPUT = Path(folder_paths.get_output_directory())
facts: dict[str, object] = {}


def node(name: str, *inputs, **named):
    return NODES[name].execute(*inputs, **named)


positive, negative = node("ARVATinyPrompt", "red disc, blue square, gravity, pan")[0], node("ARVATinyPrompt", "")[0]
codec = node("ARVATinyCodec")[0]


class Watched:
    """The tiny codec with something done at every decode."""

    def __init__(self, act=lambda number: None) -> None:
        self.act, self.pieces = act, []

    def __getattr__(self, name):
        return getattr(codec, name)

    def decode(self, latents):
        self.act(len(self.pieces))
        self.pieces.append(latents.shape[2])
        return codec.decode(latents)


class Strided(Watched):
    """Looks one latent frame back and makes one frame of the first latent frame and four of every other, as Wan's VAE
    does."""

    def temporal_compression_decode(self) -> int:
        return 4

    def decode(self, latents):
        images = super().decode(latents)
        moves = [torch.lerp(images[:, :-1], images[:, 1:], step / 4) for step in (1, 2, 3, 4)]
        return torch.cat((images[:, :1], torch.stack(moves, 2).flatten(1, 2)), 1)


def sample(model, frames: int, settings: dict, prefix: str | None = None, vae=None, batch: int = 1, **stream):
    latent = node("ARVATinyLatent", frames=frames, width=64, height=64, batch_size=batch)[0]
    if prefix is not None:
        stream = node("ARVAStreamSegments", prefix, **STREAM | stream, vae=vae)[0]
    made = node("ARVASegmentSampler", model, positive, negative, latent, stream=stream or None, **settings)
    return made[0]["samples"], made[1].totals(), made[2].splitlines()[-2:], made.ui


@contextmanager
def at_every_call(act):
    """``act`` is told the number of calls made, after every call."""
    progress = importlib.import_module(".nodes.host", pack_module().__name__).Progress
    original = progress.__call__
    progress.__call__ = lambda self, *call: original(self, *call) or act(self.done)
    try:
        yield
    finally:
        progress.__call__ = original


def state_left() -> list[str]:
    """Class names of per-run objects that are still alive."""
    gc.collect()
    kinds, package = {"Run", "SegmentSampler", "SegmentStream", "SegmentVideos", "Progress"}, pack_module().__name__
    found = (type(thing) for thing in gc.get_objects() if type(thing).__name__ in kinds)
    return [kind.__name__ for kind in found if kind.__module__.startswith(package)]


def cut_off(model, at: int, act, *inputs, **named) -> None:
    """Samples and acts after ``at`` calls."""
    try:
        with at_every_call(lambda done: act() if done == at else None):
            sample(model, *inputs, **named)
    except comfy.model_management.InterruptProcessingException:
        pass
    finally:
        comfy.model_management.interrupt_current_processing(False)


def frames_of(path: Path) -> torch.Tensor:
    """Frames ``[F, H, W, 3]`` in [0, 1] of a video, up to where it is damaged."""
    frames = []
    with av.open(str(path)) as container:
        try:
            for frame in container.decode(video=0):
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
        except av.error.InvalidDataError:
            pass
    return torch.stack(frames) / 255.0


def near(path: Path, expected: torch.Tensor) -> bool:
    """Whether the brightness of a video is that of the first frames of ``expected``, as closely as its codec can, and
    every frame is nearest to its own."""
    weights = torch.tensor([0.299, 0.587, 0.114])
    shown, expected = (frames[..., :3] @ weights for frames in (frames_of(path), expected))
    distances = torch.cdist(shown.flatten(1), expected.flatten(1), 1) / shown[0].numel()
    own = torch.arange(len(shown))
    return bool((distances[own, own] < 0.03).all() and (distances.argmin(1) == own).all())


def listing(prefix: str) -> list[str]:
    return sorted(str(path.relative_to(OUTPUT)) for path in OUTPUT.rglob("*") if path.name.startswith(prefix))


def cases(checkpoint: str) -> None:
    model = comfy.sd.load_diffusion_model(checkpoint)
    model = node("ARVATriModalScheduler", model, 0.2, 0.9, "log-snr", "2", 0.75, 5, 1, 0.0)[0]
    expected, totals, *_ = sample(model, 24, FRAMES)
    images = codec.decode(expected)[0]
    facts["segments"] = 5

    for kind in ("mp4", "mkv"):
        vae = Watched()
        latents, _, lines, ui = sample(model, 24, FRAMES, f"whole_{kind}", vae, format=kind)
        path = OUTPUT / f"whole_{kind}_00001_.{kind}"
        facts[kind] = {
            "latents": torch.equal(latents, expected), "files": listing("whole_" + kind), "line": lines[-1],
            "ui": ui.as_dict()["images"], "frames": len(frames_of(path)), "near": near(path, images),
            "pieces": vae.pieces,
        }  # fmt: skip
    decoded(model, expected)
    clips, *_ = sample(model, 24, FRAMES, "clips", codec, batch=2)
    paths = [OUTPUT / f"clips_00001_{mark}.mp4" for mark in ("", "clip2")]
    facts["clips"] = [near(path, clip) for path, clip in zip(paths, codec.decode(clips), strict=True)]
    latents, _, lines, ui = sample(model, 24, FRAMES, "deep/latents")
    saved = load_file(OUTPUT / "deep" / "latents_00001_.latent")
    facts["latents alone"] = [torch.equal(saved["latent_tensor"], expected), lines[-1], ui, listing("latents_")]
    cancelled(model, expected, images, totals)
    other_settings(model, expected, images)
    broken(model, expected, images)
    evicted, *_ = sample(model, 24, FRAMES, "evicted", Watched(lambda _: comfy.model_management.unload_all_models()))
    facts["evicted"] = torch.equal(evicted, expected)
    facts["refused"] = [refusal(vae) for vae in (Watched(),)]


def decoded(model, expected: torch.Tensor) -> None:
    """The frames before they are encoded, decoded segment by segment."""
    video_file = importlib.import_module(".nodes.video_file", pack_module().__name__)
    original = video_file.VideoFile.append
    for name, vae, context in (("codec", codec, 0), ("strided", Strided(), 1)):
        seen = []
        video_file.VideoFile.append = lambda self, clip, first, seen=seen: (
            seen.append(clip) or original(self, clip, first)
        )
        try:
            sample(model, 24, FRAMES, "decoded", vae, context=context)
        finally:
            video_file.VideoFile.append = original
        whole = vae.decode(expected)[0]
        facts[f"{name} piece by piece"] = [torch.equal(torch.cat(seen), whole), [len(clip) for clip in seen]]


def cancelled(model, expected: torch.Tensor, images: torch.Tensor, totals: dict) -> None:
    vae = Watched()
    at = 8 + 6 + 3
    cut_off(model, at, comfy.model_management.interrupt_current_processing, 24, FRAMES, "cancelled", vae)
    facts["after cancel"], facts["state after cancel"] = listing("cancelled"), state_left()
    path = OUTPUT / "cancelled_00001_.mp4"
    facts["video after cancel"] = [len(frames_of(path)), near(path, images)]
    torn = path.with_name("torn.mp4")
    torn.write_bytes(path.read_bytes()[:-200])
    facts["torn video"] = [len(frames_of(torn)) >= 8, near(torn, images)]
    with path.open("ab") as file:
        file.write(path.read_bytes()[-500:-200])
    ticks = []
    with at_every_call(ticks.append):
        latents, resumed, lines, _ = sample(model, 24, FRAMES, "cancelled", vae)
    facts["resumed"] = {
        "latents": torch.equal(latents, expected), "calls": resumed["calls"] == totals["calls"],
        "flops": [resumed["flops"], resumed["flops_full"]] == [totals["flops"], totals["flops_full"]],
        "lines": lines, "files": listing("cancelled"), "frames": len(frames_of(path)), "near": near(path, images),
        "pieces": vae.pieces, "first tick": ticks[0], "last tick": ticks[-1],
    }  # fmt: skip
    cut_off(model, 3, comfy.model_management.interrupt_current_processing, 24, FRAMES, "early", codec)
    facts["cancelled before anything was finished"] = listing("early")


def other_settings(model, expected: torch.Tensor, images: torch.Tensor) -> None:
    stop = comfy.model_management.interrupt_current_processing
    cut_off(model, 17, stop, 24, FRAMES, "other", codec)
    _, _, lines, _ = sample(model, 24, FRAMES | {"seed": 8}, "other", codec)
    facts["another seed"] = [lines[0], listing("other")]
    _, _, lines, _ = sample(model, 24, FRAMES | {"history_guidance": 0.5}, "other", codec)
    facts["history guidance"] = lines[0]
    _, _, lines, _ = sample(model, 24, FRAMES, "other", codec, resume=False)
    facts["resume off"] = lines[-1]
    latents, _, lines, _ = sample(model, 24, FRAMES, "other", codec, format="mkv", every=2)
    path = OUTPUT / "other_00001_.mkv"
    facts["another format"] = [torch.equal(latents, expected), lines[0], len(frames_of(path)), near(path, images)]
    cut_off(model, 8 + 12 + 3, stop, 24, FRAMES, "seldom", codec, every=2)
    latents, _, lines, _ = sample(model, 24, FRAMES, "seldom", codec, every=2)
    path = OUTPUT / "seldom_00001_.mp4"
    facts["every two"] = [torch.equal(latents, expected), lines[0], len(frames_of(path)), near(path, images)]


def broken(model, expected: torch.Tensor, images: torch.Tensor) -> None:
    def full(number: int) -> None:
        if number == 2:
            raise torch.OutOfMemoryError("no memory")

    try:
        sample(model, 24, FRAMES, "broken", Watched(full))
    except torch.OutOfMemoryError:
        facts["after out of memory"] = listing("segment-")
    latents, _, lines, _ = sample(model, 24, FRAMES, "broken", codec)
    path = OUTPUT / "broken_00001_.mp4"
    facts["after broken"] = [torch.equal(latents, expected), lines[0], len(frames_of(path)), near(path, images)]
    checkpoints = importlib.import_module(".accel.checkpoint", pack_module().__name__).Checkpoint
    remove, checkpoints.remove = checkpoints.remove, full_disk
    try:
        sample(model, 24, FRAMES, "ending", codec)
    except OSError:
        checkpoints.remove = remove
    latents, _, lines, _ = sample(model, 24, FRAMES, "ending", codec)
    path = OUTPUT / "ending_00001_.mp4"
    facts["after the end"] = [torch.equal(latents, expected), lines[0], len(frames_of(path)), near(path, images)]
    (left,) = [path for path in OUTPUT.glob("early*")] or [None]
    facts["nothing left"] = [left, listing("segment-"), listing("state-")]


def full_disk(*_) -> None:
    raise OSError("cannot remove")


def refusal(vae) -> str:
    vae.latent_dim = 2
    try:
        sample(comfy.sd.load_diffusion_model(sys.argv[2]), 24, FRAMES, "refused", vae)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def start_image(model) -> None:
    """A run that continues a start image, cancelled in its third block."""
    image = model.clone()
    start = to_latents(torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(3)))
    image.model_options["transformer_options"]["ar_config"] = {"initial_latent": start}
    expected, totals, *_ = sample(image, 14, CAUSAL)
    cut_off(image, 2 * 5 + 2, comfy.model_management.interrupt_current_processing, 14, CAUSAL, "image", codec)
    latents, resumed, lines, _ = sample(image, 14, CAUSAL, "image", codec)
    path = OUTPUT / "image_00001_.mp4"
    facts["start image"] = [
        torch.equal(latents, expected), resumed["calls"] == totals["calls"], lines[0], len(frames_of(path)),
        near(path, codec.decode(expected)[0]),
    ]  # fmt: skip


def to_latents(latents: torch.Tensor) -> torch.Tensor:
    return importlib.import_module(".nodes.host_files", pack_module().__name__).to_latent_space(latents)


def causal_model(checkpoint: str):
    model = comfy.sd.load_diffusion_model(checkpoint)
    return node("ARVATriModalScheduler", model, 0.3, 2.0, "log-snr", "2", 0.75, 5, 1, 0.0)[0]


def killed(checkpoint: str) -> None:
    """Ends the process in the middle of the seventh of eight blocks."""
    cut_off(
        causal_model(checkpoint), 6 * 5 + 3, lambda: os.kill(os.getpid(), signal.SIGKILL), 32, CAUSAL, "killed", codec
    )


def go_on(checkpoint: str) -> None:
    model = causal_model(checkpoint)
    path = OUTPUT / "killed_00001_.mp4"
    facts["before"] = [len(frames_of(path)), len(listing("segment-")), listing("state-")]
    latents, totals, lines, _ = sample(model, 32, CAUSAL, "killed", codec)
    expected, whole, *_ = sample(model, 32, CAUSAL)
    facts["latents"] = torch.equal(latents, expected) and bool(expected.std() > 0)
    facts["calls"] = totals["calls"] == whole["calls"] and totals["flops"] == whole["flops"]
    facts["line"], facts["frames"] = lines[0], len(frames_of(path))
    facts["near"], facts["files"] = near(path, codec.decode(expected)[0]), listing("")
    start_image(model)


if __name__ == "__main__":
    {"cases": cases, "killed": killed, "go on": go_on}[sys.argv[1]](sys.argv[2])
    print(json.dumps(facts))
