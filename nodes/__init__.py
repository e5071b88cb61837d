"""The nodes of the pack, by file: load (what is published), accelerate (one choice), acceleration, windows and memory
(describe), sampler (run), prompts and stream (what goes in and out while it runs), timeline and compare (show), tiny
(the demo models)."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .accelerate import ACCELERATE_NODES
from .acceleration import ACCELERATION_NODES
from .compare import COMPARE_NODES
from .load import LOAD_NODES
from .memory import MEMORY_NODES
from .prompts import PROMPT_NODES
from .sampler import SAMPLER_NODES
from .stream import STREAM_NODES
from .timeline import TIMELINE_NODES
from .tiny import TINY_NODES
from .windows import WINDOW_NODES


class ARVideoAccelerator(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            *LOAD_NODES, *ACCELERATE_NODES, *SAMPLER_NODES, *STREAM_NODES, *ACCELERATION_NODES, *WINDOW_NODES,
            *MEMORY_NODES, *PROMPT_NODES, *TIMELINE_NODES, *COMPARE_NODES, *TINY_NODES,
        ]  # fmt: skip
