"""Reads a saved workflow as the frontend does: its nodes, its widgets by the live schemas, and the graph it queues."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from tests.host.workflow_run import WORKFLOWS, Graph

WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
FRONTEND_ONLY = ("MarkdownNote", "Note")
SEED_CONTROL = ("fixed", "increment", "decrement", "randomize")
ALWAYS, NEVER, BYPASSED = 0, 2, 4
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20


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
    """The graph that the frontend queues for a workflow without subgraphs: widget values by the schema's order, links
    over them; muted nodes are left out, bypassed ones pass their inputs on to outputs of the same type."""
    nodes = {node["id"]: node for node in graph_nodes(template)}
    sources = {link: (source, slot) for link, source, slot, *_ in template["links"]}
    graph = {}
    for node in nodes.values():
        if node["mode"] != ALWAYS:
            continue
        inputs = _widget_inputs(node, infos)
        for entry in node["inputs"]:
            if entry["link"] is not None and (source := _resolved(entry["link"], nodes, sources)):
                inputs[entry["name"]] = [str(source[0]), source[1]]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def expanded(subgraph: dict[str, Any], infos: dict[str, Any], prefix: str, given: dict[str, Any]) -> Graph:
    """The graph that the frontend queues for a subgraph node ``prefix``; ``given`` holds the links into it, by name."""
    outer = [given[entry["name"]] for entry in subgraph["inputs"]]
    sources = {
        link["id"]: outer[link["origin_slot"]]
        if link["origin_id"] == SUBGRAPH_INPUT
        else [f"{prefix}:{link['origin_id']}", link["origin_slot"]]
        for link in subgraph["links"]
    }
    return {
        f"{prefix}:{node['id']}": {
            "class_type": node["type"],
            "inputs": _widget_inputs(node, infos)
            | {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"] is not None},
        }
        for node in subgraph["nodes"]
    }


def subgraph_outputs(subgraph: dict[str, Any], prefix: str) -> dict[str, list[Any]]:
    """What leaves a subgraph node, by name, as a link into the graph of `expanded`."""
    ends = {link["id"]: link for link in subgraph["links"]}
    found = {entry["name"]: ends[entry["linkIds"][0]] for entry in subgraph["outputs"]}
    return {name: [f"{prefix}:{link['origin_id']}", link["origin_slot"]] for name, link in found.items()}


def _widget_inputs(node: dict[str, Any], infos: dict[str, Any]) -> dict[str, Any]:
    values = zip(widgets_of(infos[node["type"]]), node["widgets_values"], strict=True)
    return {name: value for (name, _, options), value in values if not options.get("control")}


def _resolved(link: int, nodes: dict[int, Any], sources: dict[int, tuple[int, int]]) -> tuple[int, int] | None:
    """Where a link comes from, past bypassed nodes; None where that is nowhere."""
    source, slot = sources[link]
    node = nodes[source]
    if node["mode"] == ALWAYS:
        return source, slot
    if node["mode"] == NEVER:
        return None
    kind = node["outputs"][slot]["type"]
    same_place = [node["inputs"][slot]] if slot < len(node["inputs"]) else []
    through = next((entry for entry in [*same_place, *node["inputs"]] if entry["type"] == kind), None)
    if through is None or through["link"] is None:
        return None
    return _resolved(through["link"], nodes, sources)


def slots_agree(node: dict[str, Any], infos: dict[str, Any]) -> None:
    """Asserts that the host has the node, with these inputs and outputs."""
    info = infos.get(node["type"])
    assert info, f"the host has no {node['type']}"
    known = {name: kind for name, kind, _ in inputs_of(info)}
    assert {entry["name"]: entry["type"] for entry in node["inputs"]} == known, node["type"]
    outputs = [(entry["name"], entry["type"]) for entry in node["outputs"]]
    assert outputs == list(zip(info["output_name"], info["output"], strict=True)), node["type"]


def widgets_agree(node: dict[str, Any], infos: dict[str, Any], downloads: Sequence[str] = ()) -> None:
    """Asserts that every saved widget value is one its widget takes, or the name of a model to download."""
    widgets = widgets_of(infos[node["type"]])
    assert len(node["widgets_values"]) == len(widgets), node["type"]
    for (widget, kind, options), value in zip(widgets, node["widgets_values"], strict=True):
        where = f"{node['type']}.{widget} = {value!r}"
        if kind == "COMBO":
            assert value in [*options["options"], *downloads], where
        elif kind in ("INT", "FLOAT"):
            assert isinstance(value, int | float) and not isinstance(value, bool), where
            assert options.get("min", value) <= value <= options.get("max", value), where
        else:
            assert isinstance(value, str if kind == "STRING" else bool), where
