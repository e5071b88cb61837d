"""The shipped workflows: the templates open without a missing node or a shifted widget, say what their API twins say,
and run on the live server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image
from safetensors.torch import load_file

from accel.timeline import Timeline
from demo.model import MODELS, TinyConfig, TinyWan, save_model
from tests.host.comfy import PACK_NAME, ComfyServer
from tests.host.workflow_run import (
    AGREEMENT,
    NAMES,
    THUMBNAIL_BYTES,
    WORKFLOWS,
    Graph,
    disagreement,
    load_graph,
    nodes_of,
    run_workflows,
)

WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
FRONTEND_ONLY = ("MarkdownNote", "Note")
SEED_CONTROL = ("fixed", "increment", "decrement", "randomize")
SHORT = {
    "tiny_diffusion_forcing": {"frames": 28, "steps": 8, "ar_step": 2},
    "tiny_causal": {"frames": 12},
}


@pytest.fixture(scope="module")
def infos(server: ComfyServer) -> dict[str, Any]:
    """The live schemas, with a stand-in of random weights for a tiny checkpoint that is not there."""
    listed = _checkpoints(server)
    for config in (TinyConfig(kind="tiny-df"), TinyConfig(kind="tiny-causal", causal_ar=True)):
        if f"{config.kind}.safetensors" not in listed:
            save_model(TinyWan(config), server.models_dir / "diffusion_models" / f"{config.kind}.safetensors")
    return server.object_info()


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def _checkpoints(server: ComfyServer) -> list[str]:
    inputs = inputs_of(server.object_info("UNETLoader")["UNETLoader"])
    return next(options["options"] for name, _, options in inputs if name == "unet_name")


def load_template(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def graph_nodes(template: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes that reach the server."""
    return [node for node in template["nodes"] if node["type"] not in FRONTEND_ONLY]


def inputs_of(info: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, type and options of every input in the order the frontend lays them out; list types are ``COMBO``."""
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, *rest = info["input"][group][name]
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {**options, "options": kind}
            yield name, kind, options


def is_widget(kind: str, options: dict[str, Any]) -> bool:
    return kind in WIDGET_TYPES and not options.get("forceInput")


def widgets_of(info: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """What ``widgets_values`` holds, in order, with the control widget that the frontend adds behind a seed."""
    widgets = []
    for name, kind, options in inputs_of(info):
        if is_widget(kind, options):
            widgets.append((name, kind, options))
            if options.get("control_after_generate"):
                widgets.append((f"{name} control", "COMBO", {"options": list(SEED_CONTROL), "control": True}))
    return widgets


def to_api(template: dict[str, Any], infos: dict[str, Any]) -> Graph:
    """The graph that the frontend queues for a template: widget values by the schema's order, links over them."""
    sources = {link: [str(source), slot] for link, source, slot, *_ in template["links"]}
    graph = {}
    for node in graph_nodes(template):
        values = zip(widgets_of(infos[node["type"]]), node["widgets_values"], strict=True)
        inputs = {name: value for (name, _, options), value in values if not options.get("control")}
        inputs |= {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def shortened(name: str, graph: Graph) -> Graph:
    changes = SHORT[name]
    for node in graph.values():
        node["inputs"] |= {key: value for key, value in changes.items() if key in node["inputs"]}
    return graph


def test_every_template_has_its_twin_and_its_picture() -> None:
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == sorted(NAMES)
    assert sorted(path.stem for path in WORKFLOWS.glob("api/*.json")) == sorted(NAMES)
    for picture in (WORKFLOWS / f"{name}.jpg" for name in NAMES):
        assert picture.stat().st_size <= THUMBNAIL_BYTES
        with Image.open(picture) as image:
            assert image.format == "JPEG" and image.width == image.height >= 256


def test_the_host_offers_the_templates(server: ComfyServer) -> None:
    assert sorted(server.get_json("/workflow_templates")[PACK_NAME]) == sorted(NAMES)
    for name in NAMES:
        assert server.get_json(f"/api/workflow_templates/{PACK_NAME}/{name}.json") == load_template(name)
        picture = server.get(f"/api/workflow_templates/{PACK_NAME}/{name}.jpg")
        assert picture == (WORKFLOWS / f"{name}.jpg").read_bytes()


def test_no_node_is_missing_and_every_slot_is_the_schemas(name: str, infos: dict[str, Any]) -> None:
    for node in graph_nodes(load_template(name)):
        info = infos.get(node["type"])
        assert info, f"the host has no {node['type']}"
        known = {name: kind for name, kind, _ in inputs_of(info)}
        assert {entry["name"]: entry["type"] for entry in node["inputs"]} == known, node["type"]
        outputs = [(entry["name"], entry["type"]) for entry in node["outputs"]]
        assert outputs == list(zip(info["output_name"], info["output"], strict=True)), node["type"]


def test_every_link_ends_where_its_nodes_say(name: str) -> None:
    template = load_template(name)
    nodes = {node["id"]: node for node in template["nodes"]}
    links = {link[0]: link for link in template["links"]}
    assert len(nodes) == len(template["nodes"]) and max(nodes) == template["last_node_id"]
    assert len(links) == len(template["links"]) and max(links) == template["last_link_id"]
    for link, source, out, target, into, kind in template["links"]:
        assert link in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into]["link"] == link
        assert nodes[source]["outputs"][out]["type"] == nodes[target]["inputs"][into]["type"] == kind
    ends = [entry["link"] for node in nodes.values() for entry in node["inputs"] if entry["link"] is not None]
    starts = [link for node in nodes.values() for entry in node["outputs"] for link in entry["links"] or []]
    assert sorted(ends) == sorted(starts) == sorted(links)


def test_every_widget_value_is_one_its_widget_takes(name: str, infos: dict[str, Any]) -> None:
    for node in graph_nodes(load_template(name)):
        widgets = widgets_of(infos[node["type"]])
        assert len(node["widgets_values"]) == len(widgets), node["type"]
        for (widget, kind, options), value in zip(widgets, node["widgets_values"], strict=True):
            where = f"{node['type']}.{widget} = {value!r}"
            if kind == "COMBO":
                assert value in options["options"], where
            elif kind in ("INT", "FLOAT"):
                assert isinstance(value, int | float) and not isinstance(value, bool), where
                assert options.get("min", value) <= value <= options.get("max", value), where
            else:
                assert isinstance(value, str if kind == "STRING" else bool), where


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
    assert load_file(run.latent)["latent_tensor"].shape == (1, 16, frames, 8, 8)
    with av.open(str(run.video)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(pictures) == frames and pictures[0].shape == (256, 256, 3)
    timeline = Timeline.from_json(run.timeline.read_text())
    assert timeline.rows * timeline.frames_per_row == frames
    assert timeline.to_json()["totals"] == run.totals
    assert timeline.summary() == run.report
    assert "<svg" in run.svg.read_text()
    calls = run.totals["calls"]
    assert calls["recompute"] > 0
    (loader,) = nodes_of(graph, "UNETLoader")
    models = (
        MODELS if (MODELS / graph[loader]["inputs"]["unet_name"]).exists() else server.models_dir / "diffusion_models"
    )
    assert disagreement(graph, run, models) <= AGREEMENT
    if nodes_of(graph, "ARVATriModalScheduler"):
        assert calls["cache"] + calls["predict"] > 0, "the scheduler skipped nothing"
        assert run.totals["flop_ratio"] > 1
    else:
        assert calls["cache"] == calls["predict"] == 0


def test_the_workflow_runs_shortened(server: ComfyServer, infos: dict[str, Any], name: str, tmp_path: Path) -> None:
    check_run(server, infos, name, tmp_path, shortened)


@pytest.mark.long
def test_the_workflow_runs_as_shipped(server: ComfyServer, infos: dict[str, Any], name: str, tmp_path: Path) -> None:
    check_run(server, infos, name, tmp_path, lambda name, graph: graph)
