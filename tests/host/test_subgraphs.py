"""The subgraph blueprint: the host offers it, its inner nodes are the schemas', and it runs."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tests.host.comfy import PACK_NAME, PACK_ROOT, ComfyServer
from tests.host.workflow_graph import (
    SUBGRAPH_INPUT,
    SUBGRAPH_OUTPUT,
    expanded,
    slots_agree,
    subgraph_outputs,
    widgets_agree,
    widgets_of,
)
from tests.host.workflow_run import load_graph

NAME = "Accelerated AR video"
CONTROL = "control_after_generate"


@pytest.fixture(scope="module")
def blueprint() -> dict[str, Any]:
    return json.loads((PACK_ROOT / "subgraphs" / f"{NAME}.json").read_text())


@pytest.fixture(scope="module")
def subgraph(blueprint: dict[str, Any]) -> dict[str, Any]:
    (found,) = blueprint["definitions"]["subgraphs"]
    return found


@pytest.fixture(scope="module")
def infos(server: ComfyServer) -> dict[str, Any]:
    return server.object_info()


def test_the_host_lists_and_serves_every_blueprint(server: ComfyServer) -> None:
    listed = server.get_json("/global_subgraphs")
    ours = {entry["name"]: key for key, entry in listed.items() if entry["info"]["node_pack"].endswith(f".{PACK_NAME}")}
    assert sorted(ours) == sorted(path.stem for path in (PACK_ROOT / "subgraphs").glob("*.json")) == [NAME]
    served = server.get_json(f"/global_subgraphs/{ours[NAME]}")
    assert served["source"] == "custom_node"
    assert served["data"] == (PACK_ROOT / "subgraphs" / f"{NAME}.json").read_text()


def test_the_node_outside_is_an_instance_of_what_is_inside(blueprint: dict[str, Any], subgraph: dict[str, Any]) -> None:
    (outside,) = blueprint["nodes"]
    assert outside["type"] == subgraph["id"] and outside["title"] == subgraph["name"]
    for side in ("inputs", "outputs"):
        assert [(entry["name"], entry["type"]) for entry in outside[side]] == [
            (entry["name"], entry["type"]) for entry in subgraph[side]
        ]
    assert [entry["type"] for entry in subgraph["inputs"]] == ["MODEL", "CONDITIONING", "CONDITIONING", "LATENT"]
    assert [entry["type"] for entry in subgraph["outputs"]] == ["LATENT", "STRING", "ARVA_TIMELINE"]
    assert outside["properties"]["cnr_id"] == PACK_NAME


def test_its_inner_nodes_are_the_schemas(subgraph: dict[str, Any], infos: dict[str, Any]) -> None:
    for node in subgraph["nodes"]:
        slots_agree(node, infos)
        widgets_agree(node, infos)
        assert node["properties"]["cnr_id"] == PACK_NAME


def test_every_widget_shown_outside_is_one_of_an_inner_node(
    blueprint: dict[str, Any], subgraph: dict[str, Any], infos: dict[str, Any]
) -> None:
    nodes = {str(node["id"]): node for node in subgraph["nodes"]}
    for node_id, widget in blueprint["nodes"][0]["properties"]["proxyWidgets"]:
        known = [name for name, _, _ in widgets_of(infos[nodes[node_id]["type"]])]
        assert widget in [*known, CONTROL]


def test_every_inner_link_ends_where_its_nodes_say(subgraph: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    for link in subgraph["links"]:
        if link["origin_id"] == SUBGRAPH_INPUT:
            origin = subgraph["inputs"][link["origin_slot"]]
            assert origin["linkIds"] == [link["id"]]
        else:
            origin = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert link["id"] in origin["links"]
        if link["target_id"] == SUBGRAPH_OUTPUT:
            target = subgraph["outputs"][link["target_slot"]]
            assert target["linkIds"] == [link["id"]]
        else:
            target = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert target["link"] == link["id"]
        assert origin["type"] == target["type"] == link["type"]
    ids = [link["id"] for link in subgraph["links"]]
    assert len(ids) == len(set(ids)) and max(ids) == subgraph["state"]["lastLinkId"]
    assert max(nodes) == subgraph["state"]["lastNodeId"]


def test_no_inner_node_covers_another(subgraph: dict[str, Any]) -> None:
    for one, other in itertools.combinations(sorted(subgraph["nodes"], key=lambda node: node["pos"][0]), 2):
        assert one["pos"][0] + one["size"][0] <= other["pos"][0]


def test_it_runs_in_the_place_of_the_nodes_it_holds(
    server: ComfyServer, subgraph: dict[str, Any], infos: dict[str, Any]
) -> None:
    graph = load_graph("tiny_diffusion_forcing")
    kept = {key: node for key, node in graph.items() if node["class_type"] in ("UNETLoader", "ARVATinyPrompt")}
    loader, positive, negative = kept
    frames, steps = 16, 8
    latent = {"class_type": "ARVATinyLatent", "inputs": {"frames": frames, "width": 64, "height": 64, "batch_size": 1}}
    given = {"model": [loader, 0], "positive": [positive, 0], "negative": [negative, 0], "latent_image": ["latent", 0]}
    inner = expanded(subgraph, infos, "20", given)
    for node in inner.values():
        if node["class_type"] == "ARVASegmentSampler":
            node["inputs"] |= {"steps": steps, "ar_step": 2, "cfg": 2.0}
    made = subgraph_outputs(subgraph, "20")
    shown = {
        "report": {"class_type": "PreviewAny", "inputs": {"source": made["report"]}},
        "timeline": {
            "class_type": "ARVATimeline",
            "inputs": {"timeline": made["timeline"], "filename_prefix": "outer"},
        },
        "video": {"class_type": "SaveLatent", "inputs": {"samples": made["latent"], "filename_prefix": "outer"}},
    }
    outputs = server.run({**kept, "latent": latent, **inner, **shown})["outputs"]
    (inside,) = (key for key, node in inner.items() if node["class_type"] == "ARVATimeline")
    assert outputs["report"]["text"] == outputs[inside]["text"] == outputs["timeline"]["text"]
    saved = outputs[inside]["arva_timeline"][0]["json"]
    data = json.loads((server.output_dir / saved["subfolder"] / saved["filename"]).read_text())
    assert data["totals"]["calls"]["predict"] > 0 and data["rows"] == frames // 4
    assert outputs["video"]["latents"]
