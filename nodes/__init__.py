"""The nodes of the pack, by file: acceleration (describe), sampler (run), timeline (show), tiny (the demo models)."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .acceleration import ACCELERATION_NODES
from .sampler import SAMPLER_NODES
from .timeline import TIMELINE_NODES
from .tiny import TINY_NODES


class ARVideoAccelerator(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*SAMPLER_NODES, *ACCELERATION_NODES, *TIMELINE_NODES, *TINY_NODES]
