"""Runs a Python file inside ComfyUI's process, without a server. Started with the host's interpreter:

    python run_in_comfy.py --root COMFYUI --base BASE [--pack LINK] [--nodes all|none|a.py,b.py] SCRIPT [ARGS ...]

``comfy``, ``nodes`` and the packs are loaded as ComfyUI's ``main.py`` does it (``--cpu``), then SCRIPT runs as
``__main__``. The script may ask for the pack's package with ``from run_in_comfy import pack_module``; ``accel`` is then
``importlib.import_module(".accel", pack_module().__name__)``, the very modules the nodes use.

    python run_in_comfy.py --warm

imports what ComfyUI imports of other packages, which takes most of its start, and forks a process for each request that
it reads (``inprocess.WarmHost``). ComfyUI itself is imported by each process anew.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

HOST_ARGS = ("--cpu", "--use-pytorch-cross-attention", "--disable-api-nodes")
PACKAGES = (  # that ComfyUI imports itself before it loads a node
    "torch", "torch._dynamo", "torchvision", "torchaudio", "torchsde", "transformers.models.clip.tokenization_clip",
    "transformers.models.qwen2.tokenization_qwen2", "comfy_kitchen", "scipy.stats", "einops", "requests", "aiohttp.web",
    "av", "sqlalchemy.orm", "alembic.config", "pydantic",
)  # fmt: skip
_pack: list[ModuleType] = []


def pack_module() -> ModuleType:
    """The package of the pack that core's loader imported."""
    if not _pack:
        raise RuntimeError("No custom node pack was loaded: run_in_comfy.py got no --pack.")
    return _pack[0]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a Python file inside ComfyUI's process.")
    parser.add_argument("--root", type=Path, required=True, help="the ComfyUI checkout")
    parser.add_argument("--base", type=Path, required=True, help="ComfyUI base directory (models, output, ...)")
    parser.add_argument("--pack", type=Path, help="custom node pack to load")
    parser.add_argument("--nodes", default="all", help="core's extra node files: all, none, or names with commas")
    parser.add_argument("script", type=Path)
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def start_host(root: Path, base: Path) -> None:
    """Puts ComfyUI first on the import path and has it read its command line."""
    sys.path[0] = str(root)
    sys.argv = [str(root / "main.py"), *HOST_ARGS, "--base-directory", str(base)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401


async def load_nodes(chosen: str, pack: Path | None) -> None:
    """Loads core's extra nodes and the pack through core's own loader.

    Raises:
        RuntimeError: the loader gave up on one of them; the reason is on stderr.
    """
    import server

    import nodes

    server.PromptServer(asyncio.get_running_loop())  # nodes may ask for its instance; its loop must stay open
    if chosen == "all":
        failed = await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
    else:
        await nodes.init_public_apis()
        failed = await load_extra_nodes([name for name in chosen.split(",") if name != "none"])
    if failed:
        raise RuntimeError(f"ComfyUI could not load its own nodes: {', '.join(failed)}.")
    if pack is not None:
        if not await nodes.load_custom_node(str(pack), module_parent="custom_nodes"):
            raise RuntimeError(f"ComfyUI could not load the custom node pack {pack.name}.")
        _pack.append(sys.modules[str(pack).replace(".", "_x_")])


async def load_extra_nodes(names: list[str]) -> list[str]:
    """Loads these files of ``comfy_extras``; returns those that failed."""
    import nodes

    folder = Path(nodes.__file__).with_name("comfy_extras")
    return [n for n in names if not await nodes.load_custom_node(str(folder / n), module_parent="comfy_extras")]


def serve() -> None:
    """Forks a process for every request, a line of JSON; returns in the forked ones, which go on as if they had been
    started so. The one that serves ends with its input."""
    for name in PACKAGES:
        with suppress(ImportError):
            importlib.import_module(name)
    print(json.dumps({"imported": sorted(sys.modules)}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            return become(request)
        print(json.dumps({"pid": child}), flush=True)
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)
    sys.exit()


def become(request: dict) -> None:
    """Takes the arguments, environment, folder and output files that a request asks for."""
    sys.argv = [sys.argv[0], *request["argv"]]
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.pycache_prefix, sys.dont_write_bytecode = request["bytecode"], False
    os.chdir(request["folder"])
    for stream, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)


def main() -> None:
    if sys.argv[1:] == ["--warm"]:
        serve()
    options = parse(sys.argv[1:])
    script = options.script.absolute()
    sys.modules["run_in_comfy"] = sys.modules[__name__]
    start_host(options.root.absolute(), options.base.absolute())
    pack = options.pack and Path(os.path.abspath(options.pack))
    asyncio.new_event_loop().run_until_complete(load_nodes(options.nodes, pack))
    sys.argv = [str(script), *options.rest]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
