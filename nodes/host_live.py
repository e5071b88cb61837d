"""What the browser is told while a video is sampled: the growing timeline, and in the end one line on the node."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..accel.timeline import Timeline
from ..accel.timeline_live import LiveFeed

EVENT = "arva.timeline"


def shown_by(graph: Mapping[str, Any] | None, sampler: str) -> list[str]:
    """Ids of the AR Timeline nodes of an API-format graph that show the timeline of ``sampler``: of our own, or through
    Run Timeline of one of core's."""
    graph = graph or {}
    sources = [[sampler, 1]]
    for node_id, node in graph.items():
        latent = node.get("inputs", {}).get("latent")
        if node.get("class_type") == "ARVARunTimeline" and isinstance(latent, list) and latent[:1] == [sampler]:
            sources.append([node_id, 1])
    return [
        node_id
        for node_id, node in graph.items()
        if node.get("class_type") == "ARVATimeline" and list(node.get("inputs", {}).get("timeline", ())) in sources
    ]


def running_prompt() -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The graph of the prompt that is being executed, in API format, and what the browser sent along; None where there
    is none. For code that no node hands them to."""
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    queue = getattr(server, "prompt_queue", None)
    if context is None or queue is None:
        return None, None
    for item in queue.get_current_queue_volatile()[0]:
        if item[1] == context.prompt_id:
            return item[2], item[3].get("extra_pnginfo")
    return None, None


class Audience:
    """The browser that queued the prompt; silent where there is none.

    Args:
        timeline: filled while sampling. graph: the prompt in API format, which says who shows the timeline.
        extra: what the browser sent along, the workflow that it shows among it.
    """

    def __init__(
        self, timeline: Timeline, graph: Mapping[str, Any] | None, extra: Mapping[str, Any] | None = None
    ) -> None:
        context, self.server = get_executing_context(), getattr(PromptServer, "instance", None)
        self.node = context.node_id if context else None
        client = getattr(self.server, "client_id", None)
        self.feed = LiveFeed(timeline) if client and self.node else None
        if self.feed:
            self.client = client
            self.address = {
                "node": self.node,
                "prompt_id": context.prompt_id,
                "workflow": ((extra or {}).get("workflow") or {}).get("id"),
                "views": shown_by(graph, self.node),
            }

    def tell(self, done: bool = False) -> None:
        """Sends what is new, a few times a second at most; ``done`` after the last call."""
        event = self.feed.event(time.monotonic(), done) if self.feed else None
        if event:
            self.server.send_sync(EVENT, self.address | event, self.client)
        if event and done:
            self.server.send_progress_text(self.feed.timeline.log_line(), self.node)
