"""The texts of the nodes as ComfyUI's locale files hold them.

    python -m tests.host.locale_tables

writes ``locales/en/nodeDefs.json`` from the schemas that a headless ComfyUI serves. Other languages are written by hand
with the same keys.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from tests.host.comfy import PACK_ROOT, ComfyServer, find_comfy

LOCALES = PACK_ROOT / "locales"
FILES = ("main", "nodeDefs", "settings", "commands")
PREFIX = "ARVA"


def our_nodes(server: ComfyServer) -> dict[str, dict[str, Any]]:
    """The served schemas of the pack's nodes by id."""
    return {name: info for name, info in sorted(server.object_info().items()) if name.startswith(PREFIX)}


def inputs_of(info: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Id, type (a list of a combo's options in older servers) and options of every input, in order."""
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, *rest = info["input"][group][name]
            yield name, kind, dict(rest[0]) if rest else {}


def node_texts(nodes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """``nodeDefs.json`` of the language that the schemas are written in."""
    return {
        node_id: {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": {
                name: {"name": options.get("display_name") or name, "tooltip": options.get("tooltip", "")}
                for name, _, options in inputs_of(info)
            },
            "outputs": {
                str(index): {"name": name, "tooltip": tooltip}
                for index, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
            },
        }
        for node_id, info in nodes.items()
    }


def read(language: str, name: str) -> dict[str, Any]:
    """One locale file."""
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def write(language: str, name: str, texts: dict[str, Any]) -> None:
    """Writes one locale file as people edit it."""
    path = LOCALES / language / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def leaves(texts: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text with the keys that lead to it."""
    for key, value in texts.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def main() -> None:
    root = find_comfy()
    if root is None:
        sys.exit("No ComfyUI found; set COMFYUI_PATH.")
    with ComfyServer(root) as server:
        write("en", "nodeDefs", node_texts(our_nodes(server)))


if __name__ == "__main__":
    main()
