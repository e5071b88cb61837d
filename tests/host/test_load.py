"""Load AR Video Model in the real ComfyUI: every layout that AR video models are published in gives the model that the
weights are, and what cannot be loaded is refused in a sentence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accel.engine import Acceleration, Run
from accel.sampling import SegmentPlan, diffusion_forcing
from accel.schedule import flow_sigmas
from accel.timeline import Timeline
from demo.denoiser import TinyDenoiser
from demo.model import TinyConfig
from demo.prompt import embed_text
from tests.host.inprocess import run_in_process
from tests.miniatures import (
    CAUSAL,
    GOLDEN,
    UnfoldedWan,
    diffusers_layout,
    prefixed,
    save_parts,
    save_whole,
    training_file,
    wan_weights,
)

SCRIPT = Path(__file__).with_name("load_runs.py")
TEXT = "red disc, blue square, gravity, pan"
SETTINGS = {"steps": 4, "cfg": 2.0, "segment": 8, "block": 4, "ar_step": 2, "shift": 0.0}
LAYOUTS = ("original", "diffusers", "prefixed", "parts", "diffusers parts")
SKYREELS = TinyConfig(dim=128, ffn_dim=256, num_layers=2, num_heads=1)
NODE = "Load AR Video Model: "


class Code:
    """What must never run when a file is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def wave(step: float, start: float, shape: tuple[int, ...]) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + start).reshape(shape).float()


def golden_inputs() -> dict[str, Tensor]:
    return {
        "x": wave(0.37, 0.1, (1, 4, 6, 4, 6)),
        "levels": torch.tensor([[0.1, 0.1, 0.5, 0.5, 0.9, 0.9]]),
        "text": wave(0.21, torch.pi / 2, (1, 8, 32)),
    }


def save_frames(folder: Path) -> dict[str, str]:
    """The golden model with its frame rate in every layout."""
    weights, config = wan_weights(GOLDEN, frame_rate=True), {"num_heads": GOLDEN.num_heads}
    files = {
        "original": save_whole(weights, folder / "df.safetensors", config),
        "diffusers": save_whole(diffusers_layout(weights), folder / "df-diffusers.safetensors", config),
        "prefixed": save_whole(prefixed(weights, "model.diffusion_model."), folder / "df-prefixed.safetensors", config),
        "parts": save_parts(weights, folder, "model", 3, config=config)[1],
        "diffusers parts": save_parts(diffusers_layout(weights), folder, "pytorch_model", 2, config=config)[0],
    }
    return {name: path.name for name, path in files.items()}


def save_causal(folder: Path) -> dict[str, tuple[str, str]]:
    """One causal model in every layout, with the family to choose."""
    weights = wan_weights(CAUSAL)
    torch.save(training_file(weights), folder / "self_forcing_dmd.pt")
    torch.save(training_file(weights, "model._fsdp_wrapped_module."), folder / "causal_forcing.pt")
    torch.save(training_file(weights, ema=False), folder / "causvid.pt")
    torch.save({"generator": prefixed(weights, "model.")}, folder / "ode_init.pt")
    torch.save(weights, folder / "bare.pth")
    save_whole(prefixed(weights, "model."), folder / "krea-realtime-video-14b.safetensors")
    save_whole(prefixed(weights, "generator_ema.model."), folder / "ema.safetensors")
    save_whole(prefixed(weights, "generator."), folder / "generator.safetensors")
    save_whole(prefixed(weights, "diffusion_model."), folder / "repacked.safetensors")
    save_whole(diffusers_layout(weights), folder / "causal-diffusers.safetensors")
    save_parts(diffusers_layout(weights), folder, "diffusion_pytorch_model", 3)
    return {
        "self-forcing": ("self_forcing_dmd.pt", "auto"),
        "self-forcing chosen": ("self_forcing_dmd.pt", "Self-Forcing"),
        "causal-forcing": ("causal_forcing.pt", "Causal-Forcing"),
        "causvid": ("causvid.pt", "CausVid"),
        "one network": ("ode_init.pt", "Self-Forcing"),
        "bare": ("bare.pth", "other causal Wan"),
        "krea": ("krea-realtime-video-14b.safetensors", "Krea Realtime"),
        "moving average": ("ema.safetensors", "auto"),
        "generator": ("generator.safetensors", "Self-Forcing"),
        "repacked": ("repacked.safetensors", "Causal-Forcing"),
        "causal diffusers": ("causal-diffusers.safetensors", "Self-Forcing"),
        "causal diffusers parts": ("diffusion_pytorch_model-00002-of-00003.safetensors", "Self-Forcing"),
        "metadata": ("causal.safetensors", "auto"),
    }


def save_broken(folder: Path) -> dict[str, tuple[str, ...]]:
    """Files that cannot be loaded, and the inputs to try them with."""
    weights = wan_weights(CAUSAL)
    whole = (folder / "df.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>not found</html>" * 20)
    (folder / "empty.safetensors").write_bytes(b"")
    packed = (folder / "bare.pth").read_bytes()
    (folder / "cut.pt").write_bytes(packed[: len(packed) // 2])
    (folder / "no.ckpt").write_bytes(b"nothing")
    torch.save({"weights": Code(folder / "it ran")}, folder / "code.pt")
    (folder / "code.pkl").write_bytes(pickle.dumps(Code(folder / "it ran")))
    torch.save({"step": 3}, folder / "numbers.pt")
    torch.save([weights], folder / "list.pt")
    save_whole({"head.modulation": torch.ones(1, 2, 128)}, folder / "part-00001-of-00002.safetensors")
    save_parts(weights, folder, "torn", 2)[1].write_bytes(b"torn")
    for part in (1, 2):
        save_whole(weights, folder / f"twice-{part}-of-2.safetensors")
    save_whole({key: weights[key] for key in sorted(weights)[5:]}, folder / "lacking.safetensors")
    bent = weights | {"blocks.0.ffn.2.weight": torch.ones(128, 7)}
    save_whole(bent, folder / "bent.safetensors")
    for name, key in (
        ("magi", "videodit_blocks.layers.0.self_attention.linear_qkv.q.weight"),
        ("framepack", "clean_x_embedder.proj.weight"),
        ("matrix-game", "model.blocks.0.action_model.keyboard_embed.0.weight"),
        ("flux", "double_blocks.0.img_attn.qkv.weight"),
    ):
        save_whole({key: torch.ones(4, 4)}, folder / f"{name}.safetensors")
    told = {"config": "not JSON"}
    save_file({key: value.clone() for key, value in weights.items()}, folder / "metadata.safetensors", told)
    alone = ("cut.safetensors", "page.safetensors", "empty.safetensors", "cut.pt", "no.ckpt", "code.pt", "code.pkl",
             "numbers.pt", "list.pt", "part-00001-of-00002.safetensors", "torn-00001-of-00002.safetensors",
             "twice-1-of-2.safetensors", "lacking.safetensors", "magi.safetensors",
             "framepack.safetensors", "matrix-game.safetensors", "flux.safetensors", "metadata.safetensors",
             "krea-realtime-video-14b.safetensors", "causvid.pt", "absent.safetensors", "../bare.pth")  # fmt: skip
    given = {name: (name,) for name in alone} | {"bent.safetensors": ("bent.safetensors", "plain Wan")}
    return given | {
        "skyreels as causal": ("df.safetensors", "Self-Forcing"),
        "skyreels as plain": ("df.safetensors", "plain Wan"),
        "causal as skyreels": ("causal.safetensors", "SkyReels-V2 DF"),
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI base directory whose folder for diffusion models holds all files."""
    base = tmp_path_factory.mktemp("load")
    (base / "models" / "diffusion_models").mkdir(parents=True)
    return base


@pytest.fixture(scope="module")
def host(comfy_root: Path, base: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of ``load_runs.py``."""
    folder, torch_state = base / "models" / "diffusion_models", torch.get_rng_state()
    save_whole(wan_weights(CAUSAL), folder / "causal.safetensors", {"causal_ar": True, "text_dim": CAUSAL.text_dim})
    frames, causal = save_frames(folder), save_causal(folder)
    sampled = wan_weights(SKYREELS, frame_rate=True)
    save_whole(sampled, folder / "sky.safetensors")
    save_whole(diffusers_layout(sampled), folder / "sky-diffusers.safetensors")
    save_file(golden_inputs(), base / "inputs.safetensors")
    generator = torch.Generator().manual_seed(3)
    lora = {
        f"diffusion_model.blocks.1.self_attn.{name}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for name in "qv"
        for side, shape in (("A", (4, 128)), ("B", (128, 4)))
    }
    save_file(lora, base / "lora.safetensors")
    plan = {
        "inputs": str(base / "inputs.safetensors"), "lora": str(base / "lora.safetensors"), "settings": SETTINGS,
        "frames": [(name, file, fps) for name, file in frames.items() for fps in ("16", "24")],
        "causal": [(name, *given) for name, given in causal.items()], "reference": "causal.safetensors",
        "raw": "self_forcing_dmd.pt", "bare": "bare.pth", "warped": "causvid.pt", "refusals": save_broken(folder),
        "sampled": {"original": "sky.safetensors", "diffusers": "sky-diffusers.safetensors"},
    }  # fmt: skip
    (base / "plan.json").write_text(json.dumps(plan))
    torch.set_rng_state(torch_state)
    files = [str(base / "plan.json"), str(base / "out.safetensors")]
    facts = run_in_process(SCRIPT, *files, root=comfy_root, core_nodes=["nodes_ar_video.py"], base=base)
    return facts, load_file(base / "out.safetensors")


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skyreels_answers_as_the_reference_implementation_does(host, golden, layout) -> None:
    facts, out = host
    expected = torch.tensor(golden("tiny_df_model")["outputs"]["df_fps24"]).reshape(1, 4, 6, 4, 6)
    assert difference(out[f"{layout} 24"], expected) < 1e-4
    assert facts[layout] == {"class": "WAN21", "network": "WanModel", "dim": 48, "shift": 8.0}
    assert "SkyReels-V2 DF, because it embeds the frame rate" in facts[f"{layout} 24"]
    assert "Frame rate: 16 a second" in facts[f"{layout} 16"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("fps", "rate_class"), [("16", 0), ("24", 1)])
def test_both_frame_rates_are_folded_exactly(host, layout, fps, rate_class) -> None:
    _, out = host
    told = UnfoldedWan(GOLDEN, wan_weights(GOLDEN, frame_rate=True), rate_class)
    assert difference(out[f"{layout} {fps}"], told(*golden_inputs().values())) < 1e-5
    assert difference(out[f"{layout} 16"], out[f"{layout} 24"]) > 1e-2


CASES = (
    "self-forcing", "self-forcing chosen", "causal-forcing", "causvid", "one network", "bare", "krea", "moving average",
    "generator", "repacked", "causal diffusers", "causal diffusers parts", "metadata",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_causal_files_equal_cores_model_of_the_same_weights(host, name) -> None:
    facts, out = host
    assert facts["core"]["class"] == "WAN21_CausalAR"
    assert torch.equal(out[name], out["core"])
    assert facts[name] == facts["core"] | {"shift": 8.0 if name == "causvid" else 5.0}


def test_it_says_what_was_taken_and_what_was_left_out(host) -> None:
    facts, _ = host
    size = len(wan_weights(CAUSAL))
    assert f"Left out: generator ({size} tensors), critic ({size} tensors)." in facts["self-forcing report"]
    assert "set family to plain Wan if" in facts["self-forcing report"]
    assert "because its metadata says causal_ar" in facts["metadata report"]
    assert "sigmas 1, 0.757, 0.522, 0" in facts["causvid report"]
    assert "diffusers layout" in facts["causal diffusers parts report"]


def test_a_lora_acts_as_on_cores_own_model_and_leaves_it_as_it_was(host) -> None:
    _, out = host
    assert torch.equal(out["ours lora"], out["core lora"])
    assert difference(out["core lora"], out["core"]) > 1e-4 and torch.equal(out["ours after lora"], out["core"])


def test_weights_in_8_bits_are_cores(host) -> None:
    facts, out = host
    assert facts["ours fp8"] == facts["core fp8"] == "torch.float8_e4m3fn"
    assert torch.equal(out["ours fp8"], out["core fp8"]) and bool(out["core fp8"].isfinite().all())


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_sampled_video_is_the_librarys(host, layout) -> None:
    facts, out = host
    model = UnfoldedWan(SKYREELS, wan_weights(SKYREELS, frame_rate=True), 0)
    noise = torch.randn((1, 16, 8, 8, 8), generator=torch.Generator().manual_seed(7))
    denoiser = TinyDenoiser(model, embed_text(TEXT), 2.0).sized(noise)
    run = Run(Acceleration(), denoiser, Timeline())
    segments = diffusion_forcing(run, noise, SegmentPlan(8, 8, 4, 4, 2, 4), flow_sigmas(4, 8.0))
    expected = torch.cat([segment.latents for segment in segments], 2)
    assert float((out[f"sampled {layout}"] - expected).norm() / expected.norm()) < 1e-4
    assert facts[f"sampled {layout}"]["calls"] == run.timeline.totals()["calls"]


def test_core_can_load_it_again(host) -> None:
    facts, _ = host
    assert facts["path first"] and facts["again True"] and facts["again False"] and facts["shift again"] == 8.0


REFUSALS = {
    "cut.safetensors": "is no whole safetensors file",
    "page.safetensors": "is no whole safetensors file",
    "empty.safetensors": "is no whole safetensors file",
    "cut.pt": "is cut off or no PyTorch file",
    "no.ckpt": "is cut off or no PyTorch file",
    "code.pt": "holds more than tensors, and code in files is never run",
    "code.pkl": "is cut off or no PyTorch file",
    "numbers.pt": "holds no weights by name",
    "list.pt": "holds no weights by name",
    "part-00001-of-00002.safetensors": "one of 2 files, and part-00002-of-00002.safetensors not beside it",
    "torn-00001-of-00002.safetensors": "of its 2 files torn-00002-of-00002.safetensors is the trouble: it is no whole",
    "twice-1-of-2.safetensors": "twice-2-of-2.safetensors repeats blocks.0",
    "lacking.safetensors": "it is not whole, for it lacks ",
    "bent.safetensors": "ComfyUI could not build it",
    "magi.safetensors": "it is MAGI-1",
    "framepack.safetensors": "it is FramePack",
    "matrix-game.safetensors": "it is Matrix-Game",
    "flux.safetensors": "no Wan transformer (its weights are double_blocks.0.img_attn.qkv.weight); other models load",
    "metadata.safetensors": "metadata entry config is no JSON",
    "krea-realtime-video-14b.safetensors": "set family to SkyReels-V2 DF, Self-Forcing, Causal-Forcing, CausVid, "
    "Krea Realtime, other causal Wan or plain Wan (its name suggests Krea Realtime)",
    "causvid.pt": "(its name suggests CausVid)",
    "absent.safetensors": "model_name is 'absent.safetensors'; use one of",
    "../bare.pth": "",
    "skyreels as causal": "embeds the frame rate",
    "skyreels as plain": "embeds the frame rate",
    "causal as skyreels": "metadata says causal_ar",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_loaded_is_refused_in_a_sentence(host, base, name) -> None:
    facts, _ = host
    sentence = facts["refusals"][name]
    assert sentence.startswith(NODE) and REFUSALS[name] in sentence and sentence.endswith(".")
    assert "\n" not in sentence and str(base) not in sentence


def test_the_embedded_models_are_known_behind_it(host) -> None:
    facts, _ = host
    assert facts["tiny"] == "tiny-df" and "one of the embedded tiny models" in facts["tiny report"]


@pytest.mark.parametrize("file", ["causal.safetensors", "bare.pth"])
def test_a_damaged_file_is_loaded_or_refused_in_a_sentence(host, file) -> None:
    facts, _ = host
    outcomes = facts["damaged"][file]
    assert outcomes.keys() == {"loaded", "refused"} and outcomes["refused"] >= 20


def test_no_refusal_goes_untested_and_no_code_ran(host, base) -> None:
    facts, _ = host
    assert facts["refusals"].keys() == REFUSALS.keys()
    assert not list(base.rglob("it ran"))
