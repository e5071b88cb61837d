"""Bypassed and removed nodes leave no trace: not in what is queued, not in the result, not in the saved workflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.host.comfy import PACK_NAME, ComfyServer
from tests.host.core_workflow import OURS, SAVE, core_workflow, save_checkpoint
from tests.host.workflow_graph import ALWAYS, BYPASSED, NEVER, graph_nodes, load_template, to_api
from tests.host.workflow_run import NAMES, OTHERS_WEIGHTS, SAMPLER, nodes_of

ACCELERATION = (
    "ARVAANNAttention",
    "ARVAAccelerate",
    "ARVAActiveFrameWindow",
    "ARVAChunkCache",
    "ARVAHistoryGuidedCache",
    "ARVAKVCacheBudget",
    "ARVAResidualCorrection",
    "ARVASharedPrefixCache",
    "ARVATriModalScheduler",
)


@pytest.fixture(scope="module")
def infos(server: ComfyServer) -> dict[str, Any]:
    return server.object_info()


def with_mode(template: dict[str, Any], mode: int) -> dict[str, Any]:
    """The saved workflow with all its acceleration nodes in a mode."""
    return {
        **template,
        "nodes": [
            {**node, "mode": mode if node["type"] in ACCELERATION else node["mode"]} for node in template["nodes"]
        ],
    }


@pytest.mark.parametrize("name", [*NAMES, *OTHERS_WEIGHTS])
def test_a_bypassed_acceleration_node_passes_the_model_straight_through(name: str, infos: dict[str, Any]) -> None:
    template = load_template(name)
    plain = to_api(with_mode(template, BYPASSED), infos)
    (loader,) = nodes_of(plain, "UNETLoader") + nodes_of(plain, "ARVALoadModel")
    for sampler in nodes_of(plain, SAMPLER):
        assert plain[sampler]["inputs"]["model"] == [loader, 0]
    assert not [node for node in plain.values() if node["class_type"] in ACCELERATION]
    kept = {str(node["id"]) for node in graph_nodes(template) if node["type"] not in ACCELERATION}
    assert plain.keys() == kept


def test_a_muted_node_takes_its_links_with_it(infos: dict[str, Any]) -> None:
    muted = to_api(with_mode(load_template("tiny_next_clip"), NEVER), infos)
    (sampler,) = nodes_of(muted, SAMPLER)
    assert "model" not in muted[sampler]["inputs"]


def test_nodes_that_are_not_bypassed_are_queued_as_before(infos: dict[str, Any]) -> None:
    template = load_template("tiny_next_clip")
    assert to_api(with_mode(template, ALWAYS), infos) == to_api(template, infos)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS_WEIGHTS])
def test_only_our_own_nodes_name_the_pack_in_a_saved_workflow(name: str) -> None:
    template = load_template(name)
    ours = {node["id"] for node in template["nodes"] if node["type"].startswith("ARVA")}
    rest = [node for node in graph_nodes(template) if node["id"] not in ours]
    links = [link for link in template["links"] if not {link[1], link[3]} & ours]
    others = {key: value for key, value in template.items() if key not in ("nodes", "links")}
    text = json.dumps([[{**node, "outputs": [], "inputs": []} for node in rest], links, others])
    assert "ARVA" not in text and PACK_NAME not in text


def test_a_core_workflow_makes_the_same_latents_with_our_node_bypassed_or_not(
    server: ComfyServer, infos: dict[str, Any], tmp_path: Path
) -> None:
    save_checkpoint(server.models_dir)
    infos = server.object_info()
    saved = core_workflow(infos)
    graphs = {mode: to_api(with_mode(saved, mode), infos) for mode in (ALWAYS, BYPASSED)}
    assert str(OURS) in graphs[ALWAYS] and str(OURS) not in graphs[BYPASSED]
    made = [saved_latent(server, graph) for graph in graphs.values()]
    assert torch.equal(*made) and made[0].std() > 0


def saved_latent(server: ComfyServer, graph: dict[str, Any]) -> torch.Tensor:
    (item,) = server.run(graph)["outputs"][str(SAVE)]["latents"]
    return load_file(server.output_dir / item["subfolder"] / item["filename"])["latent_tensor"]
