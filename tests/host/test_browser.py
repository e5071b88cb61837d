"""The timeline widget in the real frontend: both renderers, a template dropped in, a run watched live, reload, saving,
subgraphs, several timelines, and ten thousand columns.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from tests.host.browser import MODULES, RENDERERS, TIMELINES, WORKFLOWS, Frontend, template
from tests.host.comfy import ComfyServer

FRAME_MILLISECONDS = 8.0
TEN_THOUSAND = """async ([modules, chunks]) => {
    const {TimelineWidget} = await import(`${modules}/timeline_widget.js`);
    const names = ["recompute", "predict", "predict", "cache"];
    const records = [];
    for (let column = 0; column < 10000; column++) {
        const first = Math.floor(column / 60) * 4;
        for (let chunk = 0; chunk < chunks; chunk++) {
            const start = first + (chunk * 16) / chunks;
            records.push({column, segment: Math.floor(column / 180), iteration: column % 180,
                frames: [start, start + 16 / chunks], window: [first, first + 20], sigma: 0.5,
                decision: names[(column * 7 + chunk) % 4], discrepancy: (column % 9) / 30, threshold: 0.18,
                flops: 1e12, seconds: 0.2});
        }
    }
    const rows = Math.ceil((166 * 4 + 20) / 4);
    const widget = new TimelineWidget();
    const box = document.createElement("div");
    box.style.cssText = "position:fixed;left:80px;top:80px;width:900px;height:420px;z-index:9999";
    box.append(widget.element);
    document.body.append(box);
    widget.finished({version: 1, title: "Ten thousand iterations", rows, columns: 10000, row_unit: "chunk",
        frames_per_row: 4, branches: 2, remark: null, records,
        totals: {calls: {recompute: 5000, predict: 10000, cache: 5000, commit: 0}, flops: 1e15, seconds: 100}});
    widget.redraw(true);
    const times = [];
    for (let frame = 0; frame < 90; frame++) {
        if (frame < 30) widget.view.zoom(1.15, 6000);
        else if (frame < 60) widget.view.pan(40);
        else widget.view.zoom(1 / 1.15, 6000);
        const begun = performance.now();
        widget.redraw(true);
        widget.plot.canvas.getContext("2d").getImageData(0, 0, 1, 1);
        times.push(performance.now() - begun);
    }
    widget.remove();
    box.remove();
    return times;
}"""
"""Milliseconds of 90 frames, zoomed in, panned and zoomed out again, each drawn to the end."""


@pytest.fixture(scope="module", params=[RENDERERS[0], pytest.param(RENDERERS[1], marks=pytest.mark.long)])
def frontend(request: pytest.FixtureRequest, chromium_browser: Any, server: ComfyServer) -> Iterator[Frontend]:
    page = Frontend(chromium_browser, server, request.param)
    yield page
    page.close()


def short(seed: int, frames: int = 28) -> dict[str, Any]:
    """The diffusion-forcing template on a short clip, with a seed and an id of its own: nothing is cached, and no
    earlier run is shown."""
    workflow = template("tiny_diffusion_forcing", ARVATinyLatent={0: frames}, ARVASegmentSampler={0: seed})
    return workflow | {"id": str(uuid4())}


@pytest.fixture(scope="module")
def seeds(frontend: Frontend) -> Iterator[int]:
    """Seeds that no other run of the module used."""
    return iter(range(1000 * (1 + frontend.server.get_json("/history").__len__()), 10**9))


def test_a_template_dropped_on_the_canvas_runs_and_the_widget_fills_live(frontend: Frontend, seeds: Iterator) -> None:
    frontend.drop("tiny_diffusion_forcing.json", json.dumps(short(next(seeds))))
    frontend.wait_for_timelines(1)
    frontend.look_at()
    assert "queue the workflow" in frontend.text(".arva-remark")
    frontend.queue()
    seen = frontend.watch()
    live = [int(text.split()[1]) for text in seen if text.startswith("iteration")]
    assert len(live) >= 3 and live == sorted(live) and live[0] < live[-1] <= 125, seen
    assert seen[-1].startswith("125 iterations, ")
    frontend.page.wait_for_function(f"{TIMELINES}[0].widgets.at(-1).element.textContent.includes('fewer')")
    assert "predict" in frontend.text(".arva-calls")
    assert frontend.element().evaluate("(element) => element.isConnected && element.clientHeight > 200")
    assert not frontend.errors, "\n".join(frontend.errors)


def test_events_stay_below_four_a_second_and_twenty_kilobytes_a_second(frontend: Frontend, seeds: Iterator) -> None:
    frontend.page.evaluate(
        """async () => {
            window.heard = [];
            const {api} = await import("/scripts/api.js");
            api.addEventListener("arva.timeline", ({detail}) =>
                heard.push([performance.now(), JSON.stringify(detail).length, detail.done]));
        }"""
    )
    frontend.load(short(next(seeds)))
    frontend.queue()
    frontend.watch()
    heard = frontend.page.evaluate("heard")
    assert heard[-1][2] and not any(done for _, _, done in heard[:-1])
    span = (heard[-1][0] - heard[0][0]) / 1000
    assert len(heard) - 2 <= 4.2 * span
    assert sum(size for _, size, _ in heard[1:]) <= 20_000 * max(span, 1)


def test_a_reload_and_a_cached_run_show_the_same_run_again(frontend: Frontend, seeds: Iterator) -> None:
    frontend.load(short(next(seeds)))
    frontend.queue()
    before = frontend.watch()[-1]
    frontend.page.wait_for_function(f"{TIMELINES}[0].widgets.at(-1).element.querySelector('a[href]')")
    frontend.page.wait_for_function(
        f"{TIMELINES}[0].widgets.at(-1).element.querySelector('.arva-facts').textContent.includes('fewer')"
    )
    facts = frontend.text(".arva-facts")
    frontend.page.wait_for_timeout(2500)
    frontend.open()
    frontend.wait_for_timelines(1)
    assert frontend.watch()[-1] == before
    assert frontend.text(".arva-facts") == facts
    frontend.queue()
    frontend.page.wait_for_timeout(2000)
    assert frontend.status() == before and frontend.text(".arva-facts") == facts
    assert not frontend.errors, "\n".join(frontend.errors)


def test_a_saved_workflow_holds_no_trace_of_the_run_and_loads_again(frontend: Frontend, seeds: Iterator) -> None:
    frontend.load(short(next(seeds)))
    frontend.queue()
    before = frontend.watch()[-1]
    saved = frontend.page.evaluate("app.rootGraph.serialize()")
    (node,) = (node for node in saved["nodes"] if node["type"] == "ARVATimeline")
    assert node["widgets_values"] == ["timeline/tiny_diffusion_forcing"]
    prompt = frontend.page.evaluate("app.graphToPrompt().then(({output}) => output)")
    inputs = prompt[str(node["id"])]["inputs"]
    assert sorted(inputs) == ["filename_prefix", "timeline"]
    assert "iterations" not in json.dumps(saved) and "recompute" not in json.dumps(node)
    frontend.load(saved)
    assert frontend.watch()[-1] == before


def test_what_another_workflow_made_is_not_shown(frontend: Frontend, seeds: Iterator) -> None:
    frontend.load(short(next(seeds)))
    frontend.queue()
    before = frontend.watch()[-1]
    frontend.page.wait_for_function(f"{TIMELINES}[0].widgets.at(-1).element.querySelector('a[href]')")
    deliver = """async ([prompt, workflow]) => {
        const {api} = await import("/scripts/api.js");
        const [entry] = Object.values(await (await api.fetchApi("/history?max_items=1")).json());
        const [path, output] = Object.entries(entry.outputs).find(([, output]) => output.arva_timeline);
        if (workflow) api.dispatchCustomEvent("arva.timeline", {prompt_id: prompt, workflow, views: []});
        api.dispatchCustomEvent("executed", {node: path, display_node: path, output, prompt_id: prompt});
    }"""
    frontend.page.wait_for_timeout(1500)
    frontend.load(short(next(seeds)))
    frontend.page.evaluate(deliver, ["of another", "another workflow"])
    frontend.page.wait_for_timeout(1000)
    assert frontend.status() == ""
    frontend.page.evaluate(deliver, ["cached", None])
    assert frontend.watch(seconds=10)[-1] == before
    assert not frontend.errors, "\n".join(frontend.errors)


def test_inside_a_subgraph_the_widget_fills_too(frontend: Frontend, seeds: Iterator) -> None:
    frontend.load(short(next(seeds)))
    inner = frontend.page.evaluate(
        f"""async () => {{
            const node = {TIMELINES}[0];
            app.canvas.deselectAll();
            app.canvas.select(node);
            await app.extensionManager.command.execute("Comfy.Graph.ConvertToSubgraph");
            await new Promise((resolve) => setTimeout(resolve, 500));
            const host = app.rootGraph.nodes.find((node) => node.subgraph);
            return [host.id, host.subgraph.nodes.map((node) => [node.id, node.type])];
        }}"""
    )
    assert [kind for _, kind in inner[1]] == ["ARVATimeline"]
    element = frontend.page.evaluate_handle(
        "app.rootGraph.nodes.find((node) => node.subgraph).subgraph.nodes[0].widgets.at(-1).element"
    )
    frontend.queue()
    seen = frontend.watch(element)
    assert any(text.startswith("iteration") for text in seen) and seen[-1].startswith("125 iterations")
    frontend.page.evaluate("app.canvas.setGraph(app.rootGraph.nodes.find((node) => node.subgraph).subgraph)")
    frontend.page.wait_for_timeout(800)
    assert frontend.status(element) == seen[-1]
    assert element.evaluate("(element) => element.isConnected")
    frontend.page.evaluate("app.canvas.setGraph(app.rootGraph)")
    assert not frontend.errors, "\n".join(frontend.errors)


def test_two_timelines_show_two_runs_and_compare_them(frontend: Frontend, seeds: Iterator) -> None:
    workflow = short(next(seeds))
    frontend.load(workflow)
    frontend.page.evaluate(
        f"""() => {{
            const [sampler] = app.rootGraph.nodes.filter((node) => node.type === "ARVASegmentSampler");
            const [view] = {TIMELINES};
            const copies = [sampler, view].map((node) => {{
                const copy = node.clone();
                app.rootGraph.add(copy);
                copy.pos = [node.pos[0], node.pos[1] + 900];
                return copy;
            }});
            sampler.inputs.forEach((input, index) => {{
                if (input.link == null) return;
                const link = app.rootGraph.getLink?.(input.link) ?? app.rootGraph.links[input.link];
                app.rootGraph.getNodeById(link.origin_id).connect(link.origin_slot, copies[0], index);
            }});
            copies[0].widgets.find((widget) => widget.name === "steps").value = 25;
            copies[0].connect(1, copies[1], 0);
        }}"""
    )
    frontend.wait_for_timelines(2)
    frontend.queue()
    ends = [frontend.watch(frontend.element(index))[-1] for index in (0, 1)]
    assert ends[0].startswith("125 iterations") and not ends[1].startswith("125 iterations"), ends
    frontend.look_at(0, (720, 640))
    frontend.page.wait_for_timeout(1000)
    told = frontend.element().evaluate(
        """(element) => {
            const choice = element.querySelector("select");
            choice.dispatchEvent(new Event("focus"));
            const other = [...choice.options].find((option) => option.textContent.startsWith("AR Timeline #"));
            choice.value = other.value;
            choice.dispatchEvent(new Event("change"));
            return element.querySelector("table").textContent;
        }"""
    )
    assert "AR Timeline #" in told and "skipped" in told and "FLOPs" in told
    assert not frontend.errors, "\n".join(frontend.errors)


def test_an_interrupted_run_says_where_it_stopped(frontend: Frontend, seeds: Iterator) -> None:
    frontend.load(short(next(seeds), frames=100))
    frontend.queue()
    frontend.page.wait_for_function(f"{TIMELINES}[0].widgets.at(-1).element.textContent.includes('iteration 1')")
    frontend.server.interrupt()
    last = frontend.watch()[-1]
    assert last.startswith("stopped after ") and "of 485 iterations" in last, last


def test_acceleration_that_does_nothing_tells_once_why(frontend: Frontend, seeds: Iterator) -> None:
    workflow = short(next(seeds), frames=16)
    (scheduler,) = (node for node in workflow["nodes"] if node["type"] == "ARVATriModalScheduler")
    scheduler["widgets_values"][0] = scheduler["widgets_values"][1] = 0.0
    frontend.load(workflow)
    frontend.page.evaluate(
        """() => {
            window.toasts = [];
            const {toast} = app.extensionManager;
            const add = toast.add.bind(toast);
            toast.add = (message) => { toasts.push(message); add(message); };
        }"""
    )
    frontend.queue()
    frontend.watch()
    frontend.page.wait_for_timeout(500)
    told = [one["detail"] for one in frontend.page.evaluate("toasts") if one["summary"] == "AR Video Accelerator"]
    assert len(told) == 1 and told[0].startswith("Nothing was skipped: "), told
    assert frontend.text(".arva-remark") == told[0]


@pytest.mark.parametrize("per_column", [1, 4], ids=["one decision a call", "a decision per chunk"])
def test_ten_thousand_columns_stay_smooth(frontend: Frontend, per_column: int) -> None:
    frames = [frontend.page.evaluate(TEN_THOUSAND, [MODULES, per_column]) for _ in range(2)]
    middle = min(map(statistics.median, frames))
    print(f"frame of ten thousand columns: median {middle:.2f} ms, longest {max(frames[-1]):.2f} ms")
    assert middle <= FRAME_MILLISECONDS, frames
    assert not frontend.errors, "\n".join(frontend.errors)


@pytest.mark.long
def test_every_shipped_workflow_opens_without_a_missing_node(frontend: Frontend) -> None:
    for path in sorted(WORKFLOWS.glob("*.json")):
        workflow = json.loads(path.read_text())
        frontend.load(workflow)
        types = frontend.page.evaluate("app.rootGraph.nodes.map((node) => [node.type, Boolean(node.has_errors)])")
        assert sorted(kind for kind, _ in types) == sorted(node["type"] for node in workflow["nodes"])
        linked = {node["type"] for node in workflow["nodes"] if node.get("properties", {}).get("models")}
        assert {kind for kind, broken in types if broken} <= linked, "only a model to be downloaded may be missing"
    assert not frontend.errors, "\n".join(frontend.errors)
