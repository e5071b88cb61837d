"""The demo's nodes in ComfyUI's process: core's VAE nodes take the codec, prompts and latents are the library's."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from accel.timeline import Timeline
from demo.prompt import embed_text
from tests.host.comfy import PACK_ROOT
from tests.host.inprocess import run_in_process
from tests.host.workflow_library import WAN_DEVIATION, WAN_MEAN

MINE = ("ARVATinyPrompt", "ARVATinyLatent", "ARVATinyCodec", "ARVATimeline")
SCRIPT = """
import importlib, json, os, sys
import comfy.latent_formats, folder_paths, nodes, torch
from run_in_comfy import pack_module

package = pack_module().__name__
data, codecs = (importlib.import_module(f".demo.{name}", package) for name in ("data", "codec"))
timelines = importlib.import_module(".accel.timeline", package)
node, wan = nodes.NODE_CLASS_MAPPINGS, comfy.latent_formats.Wan21()
answer = {}


def refusal(call, *args):
    try:
        call(*args)
    except ValueError as error:
        return str(error)


def difference(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max())


clip = data.render(data.simulate(5, 2, 6))
images = clip[0].movedim(0, -1)
codec = codecs.TinyCodec.load()
true_latents = codec.encode(clip[:1])
true_frames = codec.decode(true_latents)[0].movedim(0, -1)
vae = node["ARVATinyCodec"].execute()[0]
(encoded,) = node["VAEEncode"]().encode(vae, images)
(decoded,) = node["VAEDecode"]().decode(vae, encoded)
(tiled,) = node["VAEDecodeTiled"]().decode(vae, encoded, 512)
(encoded_tiled,) = node["VAEEncodeTiled"]().encode(vae, images, 512, 64)
both = vae.encode(clip.movedim(1, -1))
(decoded_both,) = node["VAEDecode"]().decode(vae, {"samples": both})
answer["codec"] = {
    "model space": difference(wan.process_in(encoded["samples"]), true_latents),
    "round trip": difference(decoded, true_frames),
    "tiled": difference(tiled, decoded),
    "encode tiled": difference(encoded_tiled["samples"], encoded["samples"]),
    "batch": difference(decoded_both, torch.cat([codec.decode(codec.encode(c[None]))[0].movedim(0, -1) for c in clip])),
    "half": difference(vae.decode(encoded["samples"].half())[0], true_frames),
    "alpha": difference(vae.encode(torch.cat((images, images[..., :1]), -1)), encoded["samples"]),
    "range": [float(decoded.min()), float(decoded.max())],
    "psnr": float(-10 * (decoded - images).square().mean().log10()),
}
prompt = node["ARVATinyPrompt"]
texts = ("red disc, blue square, gravity, pan", " ")
answer["prompt"] = {text: prompt.execute(text)[0][0][0].tolist() for text in texts}
latent = node["ARVATinyLatent"].execute(7, 64, 32, 2)[0]["samples"]
answer["latent"] = {"shape": list(latent.shape), "sum": float(latent.abs().sum())}
answer["refused"] = {
    "text": refusal(prompt.execute, "red dog"),
    "text before the run": prompt.validate_inputs("red dog"),
    "good text": prompt.validate_inputs("red disc"),
    "image latent": refusal(node["VAEDecode"]().decode, vae, {"samples": torch.zeros(1, 16, 8, 8)}),
    "odd image": refusal(node["VAEEncode"]().encode, vae, torch.zeros(1, 60, 64, 3)),
    "outside": node["ARVATimeline"].validate_inputs("../x/y"),
    "inside": node["ARVATimeline"].validate_inputs("x/y"),
}
timeline = timelines.Timeline(branches=2, flops_full=200)
timeline.add(timelines.StepRecord(0, 0, (0, 4), "recompute", 1.0, flops=100, seconds=0.5))
timeline.add(timelines.StepRecord(0, 1, (0, 4), "cache", 0.5, discrepancy=0.1, threshold=0.2))
saved = [node["ARVATimeline"].execute(timeline, "runs/tl") for _ in range(2)]
folder = folder_paths.get_output_directory()
answer["timeline"] = {
    "files": sorted(os.listdir(os.path.join(folder, "runs"))),
    "svg": open(os.path.join(folder, "runs", "tl_00001_.svg"), encoding="utf-8").read(),
    "words": open(os.path.join(folder, "runs", "tl_00001_.txt"), encoding="utf-8").read(),
    "saved": json.load(open(os.path.join(folder, "runs", "tl_00001_.json"), encoding="utf-8")),
    "shown": saved[0].ui["arva_timeline"],
    "text": saved[0].ui["text"],
    "outputs": list(saved[0].args),
}
answer["latent format"] = [wan.process_out(torch.full((1, 16, 1, 1, 1), x)).flatten().tolist() for x in (0.0, 1.0)]
schemas = [node[name].GET_SCHEMA() for name in sys.argv[1:]]
sockets = [(one.node_id, io) for one in schemas for io in one.inputs + one.outputs]
answer["without tooltip"] = [f"{name}.{io.id}" for name, io in sockets if not io.tooltip]
answer["model folders"] = folder_paths.get_folder_paths("diffusion_models")
print(json.dumps(answer))
"""

KINDS = ("json", "svg", "txt")


@pytest.fixture(scope="module")
def answer(comfy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = tmp_path_factory.mktemp("script") / "tiny_nodes.py"
    script.write_text(SCRIPT)
    return run_in_process(script, *MINE, root=comfy_root, core_nodes=[])


def test_cores_vae_nodes_decode_what_the_codec_encodes(answer: dict[str, Any]) -> None:
    codec = answer["codec"]
    assert codec["model space"] < 2e-6, "LATENT is not Wan's latent format of what the model sees"
    assert codec["round trip"] < 2e-6
    assert codec["batch"] < 2e-6
    assert codec["range"][0] >= 0 and codec["range"][1] <= 1
    assert codec["psnr"] > 30


def test_the_latent_format_is_what_comparisons_with_the_library_assume(answer: dict[str, Any]) -> None:
    mean, at_one = answer["latent format"]
    assert mean == pytest.approx(WAN_MEAN, abs=1e-6)
    assert at_one == pytest.approx([a + b for a, b in zip(WAN_MEAN, WAN_DEVIATION, strict=True)], abs=1e-6)


def test_tiles_precision_and_alpha_change_nothing_that_matters(answer: dict[str, Any]) -> None:
    codec = answer["codec"]
    assert codec["tiled"] == codec["encode tiled"] == codec["alpha"] == 0
    assert codec["half"] < 2e-2


def test_a_prompt_is_the_librarys_embedding_and_no_text_is_zeros(answer: dict[str, Any]) -> None:
    for text, embedded in answer["prompt"].items():
        assert embedded == embed_text(text).tolist()
    assert not any(any(token) for token in answer["prompt"][" "][0])


def test_an_empty_latent_counts_latent_frames(answer: dict[str, Any]) -> None:
    assert answer["latent"] == {"shape": [2, 16, 7, 4, 8], "sum": 0}


def test_wrong_inputs_are_refused_in_a_sentence_that_names_node_and_remedy(answer: dict[str, Any]) -> None:
    refused = answer["refused"]
    assert refused["text"] == refused["text before the run"]
    assert "Tiny AR Prompt: cannot read 'red dog'" in refused["text"]
    assert refused["good text"] is True
    assert "Tiny AR Codec" in refused["image latent"] and "[1, 16, 8, 8]" in refused["image latent"]
    assert "Tiny AR Codec" in refused["odd image"] and "60" in refused["odd image"] and "scale" in refused["odd image"]
    assert "AR Timeline" in refused["outside"] and "'../x/y'" in refused["outside"]
    assert refused["inside"] is True


def test_a_timeline_is_saved_numbered_listed_and_shown(answer: dict[str, Any]) -> None:
    told = answer["timeline"]
    assert told["files"] == [f"tl_0000{number}_.{kind}" for number in (1, 2) for kind in KINDS]
    files = {kind: {"filename": f"tl_00001_.{kind}", "subfolder": "runs", "type": "output"} for kind in KINDS}
    assert told["shown"] == [files]
    assert ElementTree.fromstring(told["svg"]).tag.endswith("svg")
    report, text = told["outputs"]
    assert told["text"] == [report] == [told["words"]] and json.loads(text) == told["saved"]
    again = Timeline.from_json(told["saved"])
    assert again.totals()["calls"] == {"recompute": 2, "predict": 0, "cache": 2, "commit": 0}
    assert again.summary() == report


def test_every_socket_has_a_tooltip_and_every_node_its_help_page(answer: dict[str, Any]) -> None:
    assert answer["without tooltip"] == []
    for node in MINE:
        assert (PACK_ROOT / "web" / "docs" / node / "en.md").read_text().startswith("# ")


def test_the_tiny_models_folder_is_one_of_cores(answer: dict[str, Any]) -> None:
    assert any(Path(folder).parts[-3:] == ("demo", "weights", "diffusion_models") for folder in answer["model folders"])
