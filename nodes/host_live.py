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
    """Ids of the AR Timeline nodes of an API-format graph that show the timeline of ``sampler``."""
    return [
        node_id
        for node_id, node in (graph or {}).items()
        if node.get("class_type") == "ARVATimeline" and list(node.get("inputs", {}).get("timeline", ())) == [sampler, 1]
    ]


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
