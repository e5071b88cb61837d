"""The shipped workflows: the templates open without a missing node or a shifted widget, say what their API twins say,
and run on the live server.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import av
import pytest
import tomllib
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from accel.timeline import Timeline
from demo.model import MODELS, TinyConfig, TinyWan, save_model
from tests.host import workflow_run
from tests.host.comfy import PACK_NAME, PACK_ROOT, ComfyServer, PromptError
from tests.host.workflow_graph import graph_nodes, inputs_of, load_template, slots_agree, to_api, widgets_agree
from tests.host.workflow_library import WAN_DEVIATION, WAN_MEAN, core_sampler
from tests.host.workflow_run import (
    AGREEMENT,
    AMPLIFIED,
    NAMES,
    OTHERS_WEIGHTS,
    PUBLISHED,
    ROUNDING,
    SAMPLER,
    THUMBNAIL_BYTES,
    WORKFLOWS,
    Graph,
    SamplerRun,
    WorkflowRun,
    disagreement,
    load_graph,
    nodes_of,
    run_graph,
    run_workflows,
    samplers_of,
    video_nodes,
)
from tests.miniatures import CAUSAL, prefixed, save_whole, training_file, wan_weights

ALL_NAMES = (*NAMES, *OTHERS_WEIGHTS)
SHORT = {
    "tiny_diffusion_forcing": {"frames": 28, "steps": 8, "ar_step": 2},
    "tiny_chunk_cache": {"frames": 28, "steps": 8, "ar_step": 2},
    "tiny_next_clip": {"frames": 28, "steps": 8, "threshold": 0.3},
    "tiny_causal": {"frames": 12},
    "tiny_stream": {"frames": 12},
    "tiny_long_video": {"frames": 32, "from_segment": 5},
    "tiny_accelerate_compare": {"frames": 16, "steps": 8, "ar_step": 2},
    "tiny_ksampler": {"frames": 8, "steps": 20},
    "tiny_sampler_ar_video": {"frames": 12},
}


@pytest.fixture(scope="module")
def infos(server: ComfyServer) -> dict[str, Any]:
    """The live schemas, with a stand-in of random weights for a tiny checkpoint that is not there."""
    listed = _checkpoints(server)
    kinds = ("tiny-df", "tiny-next-clip", "tiny-causal")
    for config in (TinyConfig(kind=kind, causal_ar=kind == "tiny-causal") for kind in kinds):
        if f"{config.kind}.safetensors" not in listed:
            save_model(TinyWan(config), server.models_dir / "diffusion_models" / f"{config.kind}.safetensors")
    return server.object_info()


@pytest.fixture(scope="module", params=ALL_NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def _checkpoints(server: ComfyServer) -> list[str]:
    inputs = inputs_of(server.object_info("UNETLoader")["UNETLoader"])
    return next(options["options"] for name, _, options in inputs if name == "unet_name")


def models_of(node: dict[str, Any]) -> list[dict[str, str]]:
    """What the node says is to be downloaded for it."""
    return node["properties"].get("models", [])


def with_stand_ins(graph: Graph) -> Graph:
    """The graph with the tiny causal model in the place of weights that are not part of the pack."""
    graph = copy.deepcopy(graph)
    changes = {"unet_name": "tiny-causal.safetensors", "width": 64, "height": 64}
    negatives = {graph[sampler]["inputs"]["negative"][0] for sampler in nodes_of(graph, SAMPLER)}
    swaps = {"CLIPTextEncode": "ARVATinyPrompt", "VAELoader": "ARVATinyCodec"}
    for node_id, node in list(graph.items()):
        node["inputs"] |= {key: value for key, value in changes.items() if key in node["inputs"]}
        if node["class_type"] == "CLIPLoader":
            del graph[node_id]
        elif node["class_type"] in swaps:
            said = "" if node_id in negatives else "red disc, float, still"
            text = {"text": said} if "text" in node["inputs"] else {}
            graph[node_id] = {"class_type": swaps[node["class_type"]], "inputs": text}
    return graph


def shortened(name: str, graph: Graph) -> Graph:
    changes = SHORT[name]
    for node in graph.values():
        node["inputs"] |= {key: value for key, value in changes.items() if key in node["inputs"]}
    return graph


def test_every_template_has_its_twin_and_its_picture() -> None:
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == sorted(ALL_NAMES)
    assert sorted(path.stem for path in WORKFLOWS.glob("api/*.json")) == sorted(ALL_NAMES)
    for picture in (WORKFLOWS / f"{name}.jpg" for name in ALL_NAMES):
        assert picture.stat().st_size <= THUMBNAIL_BYTES
        with Image.open(picture) as image:
            assert image.format == "JPEG" and image.width == image.height >= 256


def test_every_node_of_the_pack_is_in_a_template(golden: Any) -> None:
    used = {node["class_type"] for name in ALL_NAMES for node in load_graph(name).values()}
    assert [node_id for node_id in golden("node_ids") if node_id not in used] == []


def test_the_host_offers_the_templates(server: ComfyServer) -> None:
    assert sorted(server.get_json("/workflow_templates")[PACK_NAME]) == sorted(ALL_NAMES)
    for name in ALL_NAMES:
        assert server.get_json(f"/api/workflow_templates/{PACK_NAME}/{name}.json") == load_template(name)
        picture = server.get(f"/api/workflow_templates/{PACK_NAME}/{name}.jpg")
        assert picture == (WORKFLOWS / f"{name}.jpg").read_bytes()


def test_every_template_tells_in_a_note_what_it_shows(name: str) -> None:
    notes = [node["widgets_values"][0] for node in load_template(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert notes and all(note.startswith("## ") and len(note) < 2000 for note in notes)


def test_every_node_names_the_pack_it_comes_from(name: str) -> None:
    version = tomllib.loads((PACK_ROOT / "pyproject.toml").read_text())["project"]["version"]
    for node in graph_nodes(load_template(name)):
        ours = node["type"].startswith("ARVA")
        properties = node["properties"]
        assert properties["cnr_id"] == (PACK_NAME if ours else "comfy-core"), node["type"]
        assert properties["ver"] == (version if ours else "0.27.0") and properties["Node name for S&R"] == node["type"]


def test_every_model_to_download_has_its_address_and_folder(name: str) -> None:
    template = load_template(name)
    notes = "".join(node["widgets_values"][0] for node in template["nodes"] if node["type"] == "MarkdownNote")
    wanted = [(node, model) for node in graph_nodes(template) for model in models_of(node)]
    assert bool(wanted) == (name in OTHERS_WEIGHTS)
    for node, model in wanted:
        assert sorted(model) == ["directory", "name", "url"] and model["name"] in node["widgets_values"]
        assert model["url"].startswith("https://huggingface.co/")
        saved = "" if model["url"].endswith(f"/{model['name']}") else f" as `{model['name']}`"
        assert f"({model['url']}) into `models/{model['directory']}`{saved}\n" in notes


def test_no_node_covers_another(name: str) -> None:
    title_bar = 30
    boxes = [(node["type"], *node["pos"], *node["size"]) for node in load_template(name)["nodes"]]
    for (one, x1, y1, w1, h1), (other, x2, y2, w2, h2) in itertools.combinations(boxes, 2):
        beside = x1 + w1 <= x2 or x2 + w2 <= x1
        assert beside or y1 + h1 <= y2 - title_bar or y2 + h2 <= y1 - title_bar, f"{one} covers {other}"


def test_no_node_is_missing_and_every_slot_is_the_schemas(name: str, infos: dict[str, Any]) -> None:
    for node in graph_nodes(load_template(name)):
        slots_agree(node, infos)


def test_every_link_ends_where_its_nodes_say(name: str) -> None:
    template = load_template(name)
    nodes = {node["id"]: node for node in template["nodes"]}
    links = {link[0]: link for link in template["links"]}
    assert len(nodes) == len(template["nodes"]) and max(nodes) == template["last_node_id"]
    assert len(links) == len(template["links"]) and max(links) == template["last_link_id"]
    for link, source, out, target, into, kind in template["links"]:
        assert link in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into]["link"] == link
        assert nodes[source]["outputs"][out]["type"] == kind
        assert nodes[target]["inputs"][into]["type"] in (kind, "*")
    ends = [entry["link"] for node in nodes.values() for entry in node["inputs"] if entry["link"] is not None]
    starts = [link for node in nodes.values() for entry in node["outputs"] for link in entry["links"] or []]
    assert sorted(ends) == sorted(starts) == sorted(links)


def test_every_widget_value_is_one_its_widget_takes(name: str, infos: dict[str, Any]) -> None:
    for node in graph_nodes(load_template(name)):
        widgets_agree(node, infos, downloads=[model["name"] for model in models_of(node)])


def test_the_template_queues_what_its_twin_says(name: str, infos: dict[str, Any]) -> None:
    twin = {
        node_id: {key: value for key, value in node.items() if key != "_meta"}
        for node_id, node in load_graph(name).items()
    }
    assert to_api(load_template(name), infos) == twin


def check_run(server: ComfyServer, infos: dict[str, Any], name: str, target: Path, change: Any) -> None:
    graph = change(name, load_graph(name))
    (frames,) = (node["inputs"]["frames"] for node in graph.values() if node["class_type"] == "ARVATinyLatent")
    run = run_workflows(names=[name], target=target, change=change, server=server)[name]
    assert len(run.videos) == len(video_nodes(graph)) > 0
    side = 256 if nodes_of(graph, "SaveVideo") else 64
    for video in run.videos:
        pictures = decoded(video)
        assert len(pictures) == frames and pictures[0].shape == (side, side, 3)
    assert list(run.samplers) == samplers_of(graph)
    for sampler, made in run.samplers.items():
        assert load_file(made.latent)["latent_tensor"].shape == (1, 16, frames, 8, 8)
        check_timeline(made, frames)
        calls = made.totals["calls"]
        assert calls["recompute"] > 0
        if model_source(graph, sampler) == "UNETLoader":
            assert calls["cache"] == calls["predict"] == 0
        else:
            if not nodes_of(graph, "ARVAKVCacheBudget"):
                assert calls["cache"] + calls["predict"] > 0, "nothing was skipped"
            assert made.totals["flop_ratio"] > 1
    (loader,) = nodes_of(graph, "UNETLoader")
    models = (
        MODELS if (MODELS / graph[loader]["inputs"]["unet_name"]).exists() else server.models_dir / "diffusion_models"
    )
    difference, allowed = disagreement(graph, run, models)
    assert difference <= allowed
    for compare in nodes_of(graph, "ARVACompareRuns"):
        (table,) = run.entry["outputs"][compare]["text"]
        assert "| PSNR | " in table and "measured speed-up" in table


@pytest.mark.parametrize(
    ("amplified", "difference", "allowed"),
    [
        (100.0, 0.9e-3, AGREEMENT),
        (100.0, 1.8e-3, AGREEMENT),
        (8e3, 1.8e-3, 16e3 * ROUNDING),
        (8e3, 2.5e-3, 16e3 * ROUNDING),
        (1e7, 0.5, AMPLIFIED),
    ],
    ids=["close", "far", "rounding makes as much", "more than rounding makes", "no run is as wild as that"],
)
def test_host_and_library_may_differ_by_what_rounding_makes(
    amplified: float, difference: float, allowed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def library(_graph: Graph, _model: Any, _sampler: str, nudge: float = 0.0) -> torch.Tensor:
        return made * (1.0 + amplified * nudge)

    monkeypatch.setattr(workflow_run, "library_latents", library)
    monkeypatch.setattr(workflow_run, "load_model", lambda path: path)
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN_MEAN, WAN_DEVIATION))
    save_file({"latent_tensor": made * (1.0 + difference) * deviation + mean}, tmp_path / "latent.safetensors")
    run = SamplerRun(tmp_path / "latent.safetensors", tmp_path, tmp_path, "", {})
    told = disagreement(load_graph("tiny_causal"), WorkflowRun((), {"1": run}, {}))
    assert told == pytest.approx((difference, allowed), rel=1e-4)


def model_source(graph: Graph, sampler: str) -> str:
    """Class of the node that a sampler's MODEL comes from."""
    inputs = graph[core_sampler(graph, sampler)]["inputs"]
    while "model" not in inputs:
        inputs = graph[inputs["guider"][0]]["inputs"]
    return graph[inputs["model"][0]]["class_type"]


def decoded(video: Path) -> list[Any]:
    with av.open(str(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def check_timeline(made: SamplerRun, frames: int) -> None:
    """The file, the report and the picture of an AR Timeline tell the same."""
    timeline = Timeline.from_json(made.timeline.read_text())
    assert timeline.rows * timeline.frames_per_row == frames
    assert timeline.to_json()["totals"] == made.totals
    assert timeline.summary() == made.report
    assert "<svg" in made.svg.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_workflow_runs_shortened(server: ComfyServer, infos: dict[str, Any], name: str, tmp_path: Path) -> None:
    check_run(server, infos, name, tmp_path, shortened)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_the_workflow_runs_as_shipped(server: ComfyServer, infos: dict[str, Any], name: str, tmp_path: Path) -> None:
    check_run(server, infos, name, tmp_path, lambda name, graph: graph)


@pytest.mark.parametrize("name", OTHERS_WEIGHTS)
def test_nothing_but_the_weights_is_missing_for_it(server: ComfyServer, infos: dict[str, Any], name: str) -> None:
    with pytest.raises(PromptError) as refusal:
        server.queue(load_graph(name))
    found = refusal.value.details["node_errors"]
    downloads = {str(node["id"]): models_of(node) for node in graph_nodes(load_template(name)) if models_of(node)}
    assert sorted(found) == sorted(downloads)
    for node_id, (model,) in downloads.items():
        (reason,) = found[node_id]["errors"]
        assert reason["type"] == "value_not_in_list"
        assert reason["extra_info"]["received_value"] == model["name"]


def miniature(name: str, folder: Path) -> Path:
    """A tiny model in the layout of the file that a template of ``PUBLISHED`` loads, under that file's name."""
    graph = load_graph(name)
    (loader,) = nodes_of(graph, "ARVALoadModel")
    path = folder / graph[loader]["inputs"]["model_name"]
    weights = wan_weights(CAUSAL, frame_rate=name == "skyreels_diffusion_forcing")
    if path.suffix == ".pt":
        inner = "model._fsdp_wrapped_module." if name == "causal_forcing_chunkwise" else "model."
        torch.save(training_file(weights, inner, ema=name != "causvid"), path)
        return path
    return save_whole(prefixed(weights, "model.") if name == "krea_realtime" else weights, path)


FOUND = {
    "skyreels_diffusion_forcing": "SkyReels-V2 DF, because it embeds the frame rate",
    "skyreels_14b": "SkyReels-V2 DF, because family was chosen",
    "self_forcing": "Self-Forcing, because family was chosen",
    "causal_forcing_chunkwise": "Causal-Forcing, because family was chosen",
    "causvid": "CausVid, because family was chosen",
    "krea_realtime": "Krea Realtime, because family was chosen",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_models_workflow_runs_with_a_miniature_of_its_file(
    server: ComfyServer, infos: dict[str, Any], name: str, tmp_path: Path
) -> None:
    graph = with_stand_ins(load_graph(name))
    (sampler,), (latent,) = nodes_of(graph, SAMPLER), nodes_of(graph, "EmptyARVideoLatent")
    settings, frames = graph[sampler]["inputs"], (graph[latent]["inputs"]["length"] - 1) // 4 + 1
    if settings["mode"] == "diffusion forcing":
        settings |= {"steps": 8, "ar_step": min(settings["ar_step"], 2)}
    model = miniature(name, server.models_dir / "diffusion_models")
    try:
        run = run_graph(server, graph, tmp_path)
    finally:
        model.unlink()
    (made,) = run.samplers.values()
    check_timeline(made, frames)
    (video,) = run.videos
    assert len(decoded(video)) == frames
    assert bool(load_file(made.latent)["latent_tensor"].isfinite().all())
    texts = [shown["text"][0] for shown in run.entry["outputs"].values() if "text" in shown]
    assert any(text.startswith(f"{model.name}: {FOUND[name]}") for text in texts)
    calls = made.totals["calls"]
    if settings["mode"] == "causal blocks":
        steps = 3 if "sigmas" in settings else 4
        assert calls == {"recompute": frames // 3 * steps, "predict": 0, "cache": 0, "commit": frames // 3}
    elif name == "skyreels_diffusion_forcing":
        assert calls["cache"] + calls["predict"] > 0 and made.totals["flop_ratio"] > 1


def test_the_causal_forcing_workflow_runs_with_a_tiny_model_in_its_place(
    server: ComfyServer, infos: dict[str, Any], tmp_path: Path
) -> None:
    run = run_graph(server, with_stand_ins(load_graph("causal_forcing_fast")), tmp_path)
    (made,) = run.samplers.values()
    frames, steps = 21, 4
    check_timeline(made, frames)
    assert made.totals["calls"] == {"recompute": frames * steps, "predict": 0, "cache": 0, "commit": frames}
    assert len(decoded(run.videos[0])) == frames
    told = next(shown["text"][0] for shown in run.entry["outputs"].values() if "re-noise" in str(shown.get("text")))
    assert told.startswith("balanced, for tiny-causal") and "every call is computed" in told
