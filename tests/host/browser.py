"""Drives the real frontend in Chromium against a headless ComfyUI.

    python -m tests.host.browser

renews the screenshots of the timeline widget in its help page and the README, and of every node in its help page.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.host.comfy import PACK_NAME, PACK_ROOT, ComfyServer, find_comfy

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
RENDERERS = ("classic", "nodes 2.0")
CORE_MISSES = ("Failed to load resource", "Content Security Policy", "graph accessed before initialization")
"""Files of core's own that are not there, and models that its default workflow looks for on the network."""
MODULES = f"/extensions/{PACK_NAME}"
TIMELINES = "app.rootGraph.nodes.filter((node) => node.type === 'ARVATimeline')"
WORKFLOWS = PACK_ROOT / "workflows"


def find_chromium() -> str | None:
    return next((path for path in map(shutil.which, CHROMIUMS) if path), None)


def missing() -> str | None:
    """What a browser test lacks on this machine; None where it has everything."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (requirements-dev.txt)"
    return None if find_chromium() else "there is no Chromium; install Debian's package chromium"


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium, headless."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class Frontend:
    """One page of the frontend. ``errors`` holds what went wrong in it, but for files that core itself misses."""

    def __init__(self, browser: Any, server: ComfyServer, renderer: str = "classic", **page: Any) -> None:
        self.server, self.errors = server, []
        self.context = browser.new_context(viewport={"width": 1600, "height": 1000}, **page)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.errors.append(f"pageerror {error}"))
        self.page.on("console", self._listen)
        settings = {
            "Comfy.TutorialCompleted": True,
            "Comfy.VueNodes.Enabled": renderer == "nodes 2.0",
            "Comfy.Workflow.Persist": True,
        }
        server._request("/settings", settings)
        self.open()

    def _listen(self, message: Any) -> None:
        where = (message.location or {}).get("url", "")
        misses = any(words in message.text for words in CORE_MISSES) and MODULES not in where
        if message.type == "error" and not misses:
            self.errors.append(f"{message.text} ({where})")

    def open(self) -> None:
        """Opens or reloads the page and waits for the graph."""
        self.page.goto(self.server.url)
        self.page.wait_for_function("window.app?.extensionManager && app.canvas?.graph")
        self.page.wait_for_timeout(1500)

    def close(self) -> None:
        self.context.close()

    def drop(self, name: str, text: str) -> None:
        """Drops a file on the canvas, as a user does."""
        transfer = self.page.evaluate_handle(
            """([name, text]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([text], name, {type: "application/json"}));
                return transfer;
            }""",
            [name, text],
        )
        self.page.dispatch_event("#graph-canvas", "dragover", {"dataTransfer": transfer})
        self.page.dispatch_event("#graph-canvas", "drop", {"dataTransfer": transfer})

    def load(self, workflow: dict[str, Any]) -> None:
        self.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_timeout(800)

    def wait_for_timelines(self, count: int) -> None:
        self.page.wait_for_function(f"{TIMELINES}.length === {count}")

    def queue(self) -> None:
        self.page.evaluate("app.queuePrompt(0, 1)")

    def element(self, index: int = 0) -> Any:
        """The widget's element of a timeline in the root graph, in the page or not."""
        widget = f"{TIMELINES}[{index}].widgets.find((widget) => widget.name === 'timeline_view')"
        return self.page.evaluate_handle(f"{widget}.element")

    def text(self, selector: str, element: Any = None) -> str:
        element = element or self.element()
        return element.evaluate("(element, selector) => element.querySelector(selector).textContent", selector)

    def status(self, element: Any = None) -> str:
        return self.text(".arva-status", element)

    def watch(self, element: Any = None, seconds: float = 240) -> list[str]:
        """What the status line says, until the run is over."""
        seen: list[str] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            now = self.status(element)
            if not seen or seen[-1] != now:
                seen.append(now)
            if "skipped" in now or "after" in now:
                return seen
            self.page.wait_for_timeout(100)
        raise TimeoutError(f"The timeline never ended: {seen[-3:]}\n{self.server._log_tail()}")

    def look_at(self, index: int = 0, size: tuple[int, int] = (720, 480)) -> None:
        """Brings a timeline node into the middle of the canvas at scale 1."""
        self.page.evaluate(
            f"""([width, height]) => {{
                const node = {TIMELINES}[{index}];
                node.setSize([width, height]);
                app.canvas.ds.scale = 1;
                app.canvas.ds.offset = [-node.pos[0] + 360, -node.pos[1] + 220];
                app.canvas.setDirty(true, true);
            }}""",
            list(size),
        )
        self.page.wait_for_timeout(700)


def template(name: str, **changes: Any) -> dict[str, Any]:
    """A shipped workflow; ``changes`` by node type, as {widget index: value}."""
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text())
    for node in workflow["nodes"]:
        for index, value in changes.get(node["type"], {}).items():
            node["widgets_values"][index] = value
    return workflow


def main() -> None:
    root = find_comfy()
    if root is None or missing():
        sys.exit(missing() or "No ComfyUI found; set COMFYUI_PATH.")
    folder = PACK_ROOT / "web" / "docs" / "ARVATimeline"
    with ComfyServer(root) as server, chromium() as browser:
        frontend = Frontend(browser, server, device_scale_factor=1.5)
        frontend.load(template("tiny_diffusion_forcing"))
        frontend.wait_for_timelines(1)
        frontend.look_at()
        frontend.queue()
        while not frontend.status().startswith("iteration 1") or len(frontend.status().split()[1]) < 3:
            frontend.page.wait_for_timeout(50)
        _shoot(frontend, folder / "live.png")
        frontend.watch()
        frontend.page.wait_for_timeout(1000)
        box = frontend.element().evaluate("(e) => e.querySelector('.arva-plot').getBoundingClientRect().toJSON()")
        frontend.page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 0.45 * box["height"])
        frontend.page.wait_for_timeout(500)
        _shoot(frontend, folder / "widget.png")
        for node_id in sorted(
            name for name in server.object_info() if name.startswith("ARVA") and name != "ARVATimeline"
        ):
            picture_node(frontend, node_id)
        frontend.close()


ALONE = """async ([type, width]) => {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = [0, 0];
    node.setSize([width, node.computeSize()[1]]);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [500, 300];
    app.canvas.deselectAll?.();
    app.canvas.setDirty(true, true);
    return [...node.size];
}"""
"""Leaves one node on the canvas, its body's corner at (500, 300); gives its size."""
TITLE, MARGIN = 30, 12


def picture_node(frontend: Frontend, node_id: str) -> None:
    """A picture of one node as it comes, for its help page."""
    width, height = frontend.page.evaluate(ALONE, [node_id, 340])
    frontend.page.wait_for_timeout(500)
    canvas = frontend.page.evaluate("document.querySelector('#graph-canvas').getBoundingClientRect().toJSON()")
    clip = {
        "x": canvas["x"] + 500 - MARGIN, "y": canvas["y"] + 300 - TITLE - 1,
        "width": width + 2 * MARGIN, "height": height + TITLE + MARGIN,
    }  # fmt: skip
    path = PACK_ROOT / "web" / "docs" / node_id / "node.png"
    frontend.page.screenshot(path=path, clip=clip)
    print(node_id, path.name, path.stat().st_size, "bytes")


def _shoot(frontend: Frontend, path: Path) -> None:
    box = frontend.element().evaluate("(element) => element.getBoundingClientRect().toJSON()")
    clip = {key: box[key] for key in ("x", "y", "width", "height")}
    frontend.page.screenshot(path=path, clip=clip)
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
