"""Runs a workflow on a ComfyUI server without a browser: queues it, follows it, fetches what it made.

    python headless/run_workflow.py [--server ADDRESS] [--target FOLDER] [--set NODE.INPUT=VALUE ...] [WORKFLOW.json]

It needs aiohttp, which ComfyUI brings. The workflow is in API format (``workflows/api/``), and ``--set 4.frames=12``
changes an input of it. Progress is counted in model calls. The report is printed and saved as ``report.txt`` beside the
timeline (JSON and SVG) and the video. It ends with 1 where the server refuses the workflow or a node fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

WORKFLOW = Path(__file__).absolute().parents[1] / "workflows" / "api" / "tiny_causal.json"


class WorkflowFailed(Exception):
    """The server refused the workflow, or a node of it failed or was interrupted."""


async def queue(session: aiohttp.ClientSession, graph: dict[str, Any], client: str) -> str:
    """Queues an API-format graph; returns the prompt's id."""
    async with session.post("/prompt", json={"prompt": graph, "client_id": client}) as answer:
        said = await answer.json()
    if answer.status != 200 or said.get("node_errors"):
        raise WorkflowFailed("refused: " + json.dumps(said, indent=1))
    return said["prompt_id"]


async def follow(events: aiohttp.ClientWebSocketResponse, prompt: str, graph: dict[str, Any]) -> None:
    """Prints the progress of a prompt until it is done."""
    async for message in events:
        if message.type != aiohttp.WSMsgType.TEXT:
            continue  # binary messages are previews
        event = json.loads(message.data)
        kind, data = event["type"], event.get("data") or {}
        if data.get("prompt_id") != prompt:
            continue
        if kind == "progress":
            print(f"{name_of(graph, data['node'])}: {data['value']:g}/{data['max']:g}", flush=True)
        elif kind == "executed":
            print(f"{name_of(graph, data['node'])}: done", flush=True)
        elif kind == "execution_error":
            node = f"{data['node_type']} (node {data['node_id']})"
            raise WorkflowFailed(f"{node} failed: {data['exception_message'].strip()}")
        elif kind == "execution_interrupted":
            raise WorkflowFailed("interrupted")
        elif kind == "executing" and data["node"] is None:
            return  # it follows execution_success, once the history is written
    raise WorkflowFailed("the server closed the connection")


def name_of(graph: dict[str, Any], node: str) -> str:
    """The title of a node, or its class."""
    return graph[node].get("_meta", {}).get("title") or graph[node]["class_type"]


async def fetch(session: aiohttp.ClientSession, prompt: str, target: Path) -> list[Path]:
    """Saves what the workflow's output nodes made, and their texts as ``report.txt``; returns the files."""
    async with session.get(f"/history/{prompt}") as answer:
        entry = (await answer.json())[prompt]
    target.mkdir(parents=True, exist_ok=True)
    texts, files = [], []
    for shown in entry["outputs"].values():
        texts += shown.get("text", [])
        for item in saved_files(shown):
            async with session.get("/view", params=item) as answer:
                answer.raise_for_status()
                files.append(target / item["filename"])
                files[-1].write_bytes(await answer.read())
    report = target / "report.txt"
    report.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return [report, *files]


def saved_files(shown: Any) -> Iterator[dict[str, str]]:
    """What a node's output names as saved: ``{"filename", "subfolder", "type"}``, wherever it stands."""
    if isinstance(shown, dict) and "filename" in shown:
        yield {key: shown[key] for key in ("filename", "subfolder", "type")}
    elif isinstance(shown, dict | list):
        for item in shown.values() if isinstance(shown, dict) else shown:
            yield from saved_files(item)


async def run(server: str, graph: dict[str, Any], target: Path) -> list[Path]:
    """Runs a graph on the server at ``server`` (host:port) and fetches what it made."""
    client = uuid.uuid4().hex
    async with (
        aiohttp.ClientSession(f"http://{server}") as session,
        session.ws_connect("/ws", params={"clientId": client}, max_msg_size=0) as events,
    ):
        prompt = await queue(session, graph, client)
        await follow(events, prompt, graph)
        return await fetch(session, prompt, target)


def read_workflow(path: Path) -> dict[str, Any]:
    """The graph of a file in API format.

    Raises:
        WorkflowFailed: it cannot be read, or is something else.
    """
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WorkflowFailed(f"cannot be read ({error}); give a workflow that was exported for the API") from None
    nodes = graph.values() if isinstance(graph, dict) else [None]
    if not all(isinstance(node, dict) and isinstance(node.get("inputs"), dict) for node in nodes):
        raise WorkflowFailed("is no workflow in API format; export it for the API and give that file")
    return graph


def changed(graph: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The graph with ``NODE.INPUT=VALUE`` settings; a value is JSON, or else text."""
    for setting in settings:
        where, _, value = setting.partition("=")
        node, _, name = where.partition(".")
        if name not in graph.get(node, {}).get("inputs", {}):
            raise WorkflowFailed(f"the workflow has no input {where!r}; write NODE.INPUT=VALUE")
        try:
            graph[node]["inputs"][name] = json.loads(value)
        except ValueError:
            graph[node]["inputs"][name] = value
    return graph


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a workflow on a ComfyUI server without a browser.")
    parser.add_argument("workflow", nargs="?", type=Path, default=WORKFLOW, help="API format; default: tiny_causal")
    parser.add_argument("--server", default="127.0.0.1:8188", help="host:port of ComfyUI")
    parser.add_argument("--target", type=Path, default=Path("headless-output"), help="folder for what it makes")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="change an input")
    options = parser.parse_args()
    try:
        graph = changed(read_workflow(options.workflow), options.set)
        report, *files = asyncio.run(run(options.server, graph, options.target))
    except (WorkflowFailed, aiohttp.ClientError) as error:
        sys.exit(f"{options.workflow.name}: {error}")
    print(report.read_text(encoding="utf-8"), end="")
    for path in (report, *files):
        print(f"saved {path}")


if __name__ == "__main__":
    main()
