"""ComfyUI-Manager finds the pack in a channel, installs it by git clone, and uninstalls it without a trace.

One story in three starts of a server with the same base directory, told by `story`: Manager installs, the pack works,
Manager uninstalls, core goes on. It takes minutes; the tests read what was seen.
"""

from __future__ import annotations

import json
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.host.comfy import ComfyServer, make_base_directory
from tests.host.core_workflow import OURS, SAVE, core_workflow, save_checkpoint
from tests.host.manager import (
    ManagerUnavailable,
    bare_repository,
    environment,
    lay_out_manager,
    manager_package,
    repository_url,
)
from tests.host.workflow_graph import BYPASSED, to_api
from tests.host.workflow_run import load_graph

pytestmark = pytest.mark.long
FOLDER = repository_url().rsplit("/", 1)[-1]
MANAGER = ("--enable-manager-legacy-ui",)
TASK_SECONDS = 180


def batch(server: ComfyServer, kind: str, pack: dict[str, Any]) -> str:
    """Has Manager do one thing to one pack; returns what it says of it."""
    item = {**pack, "ui_id": kind, "channel": "default", "mode": "cache", "version": "unknown"}
    item["selected_version"] = "unknown"
    assert json.loads(server.post_json("/v2/manager/queue/batch", {"batch_id": kind, kind: [item]})) == {"failed": []}
    deadline = time.monotonic() + TASK_SECONDS
    while time.monotonic() < deadline:
        try:
            return server.get_json(f"/v2/manager/queue/history?id={kind}")["nodepack_result"][kind]
        except urllib.error.HTTPError:
            time.sleep(0.5)  # the history is written when the batch is done
    raise TimeoutError(f"Manager was not done with {kind} after {TASK_SECONDS} s.\n{server.log()[-3000:]}")


def latents(server: ComfyServer, graph: dict[str, Any]) -> torch.Tensor:
    (item,) = server.run(graph)["outputs"][str(SAVE)]["latents"]
    return load_file(server.output_dir / item["subfolder"] / item["filename"])["latent_tensor"]


@pytest.fixture(scope="module")
def story(comfy_root: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen, by name."""
    folder = tmp_path_factory.mktemp("manager")
    try:
        package = manager_package(comfy_root, Path(request.config.cache.mkdir("comfyui-manager")))
    except (ManagerUnavailable, OSError) as error:
        pytest.skip(f"MANAGER TESTS SKIPPED: ComfyUI-Manager cannot be had: {error}")
    base, installed = folder / "base", folder / "base" / "custom_nodes" / FOLDER
    make_base_directory(base, packs=())
    lay_out_manager(base)
    settings = {"base": base, "packs": (), "environment": environment(package, bare_repository(folder), folder)}
    seen: dict[str, Any] = {"folder": installed}

    with ComfyServer(comfy_root, extra_args=MANAGER, **settings) as server:
        seen["nodes before"] = ours(server)
        found = server.get_json("/v2/customnode/getlist?mode=cache&skip_update=true")["node_packs"]
        ((_, seen["found"]),) = found.items()
        seen["install"] = batch(server, "install", seen["found"])
        seen["clone"] = (installed / ".git" / "config").read_text()

    save_checkpoint(base / "models")
    with ComfyServer(comfy_root, extra_args=MANAGER, **settings) as server:
        infos = server.object_info()
        seen["nodes installed"], seen["failed imports"] = ours(server), server.failed_imports()
        seen["listed"] = server.get_json("/v2/customnode/installed")
        seen["templates"] = server.get_json("/workflow_templates")
        seen["blueprints"] = [entry["info"]["node_pack"] for entry in server.get_json("/global_subgraphs").values()]
        short = load_graph("tiny_causal")
        short["4"]["inputs"]["frames"] = 8
        seen["video"] = server.run(short)["outputs"]["10"]["images"]
        seen["saved"] = core_workflow(infos)
        seen["latents with"] = latents(server, to_api(seen["saved"], infos))
        seen["uninstall"] = batch(server, "uninstall", seen["found"])

    with ComfyServer(comfy_root, **settings) as server:
        seen["nodes after"], seen["failed after"] = ours(server), server.failed_imports()
        bypassed = json.loads(json.dumps(seen["saved"]))
        next(node for node in bypassed["nodes"] if node["id"] == OURS)["mode"] = BYPASSED
        seen["graph after"] = to_api(bypassed, infos)
        seen["latents after"] = latents(server, seen["graph after"])
        seen["folders after"] = [path.name for path in (base / "custom_nodes").iterdir()]
        seen["templates after"] = server.get_json("/workflow_templates")
    return seen


def ours(server: ComfyServer) -> list[str]:
    return sorted(name for name in server.object_info() if name.startswith("ARVA"))


def test_the_pack_is_found_in_the_channel(story: dict[str, Any]) -> None:
    assert story["nodes before"] == []
    assert story["found"]["title"] == "AR Video Accelerator" and story["found"]["state"] == "not-installed"
    assert story["found"]["files"] == [repository_url()]


def test_manager_installs_it_by_git_clone(story: dict[str, Any]) -> None:
    assert story["install"] == "success"
    assert f"url = {repository_url()}" in story["clone"]


def test_what_was_cloned_loads_and_runs(story: dict[str, Any], golden: Any) -> None:
    assert story["nodes installed"] == golden("node_ids") and story["failed imports"] == []
    assert FOLDER in json.dumps(story["listed"])
    assert "tiny_causal" in story["templates"][FOLDER] and f"custom_nodes.{FOLDER}" in story["blueprints"]
    assert story["video"]


def test_uninstalling_takes_everything_with_it(story: dict[str, Any]) -> None:
    assert story["uninstall"] == "success"
    assert not story["folder"].exists() and FOLDER not in story["folders after"]
    assert story["nodes after"] == [] and story["failed after"] == []
    assert FOLDER not in story["templates after"]


def test_a_saved_core_workflow_runs_as_before_when_the_pack_is_gone(story: dict[str, Any]) -> None:
    assert not [node for node in story["graph after"].values() if node["class_type"].startswith("ARVA")]
    assert torch.equal(story["latents after"], story["latents with"])
