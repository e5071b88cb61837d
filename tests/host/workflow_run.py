"""Runs the shipped workflows on a headless ComfyUI and collects what they make.

    python -m tests.host.workflow_run [--target FOLDER] [--thumbnails] [NAME ...]

prints the report of each sampler, copies the videos, timelines (JSON, SVG) and latents to ``FOLDER/NAME`` (default
``demo/output/host``), and makes the same latents with the library alone: it ends with 1 where the two disagree.
``--thumbnails`` renews the pictures of the workflow templates from the videos.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from demo.model import MODELS, load_model
from tests.host.comfy import PACK_ROOT, ComfyServer, find_comfy
from tests.host.workflow_library import host_latents, library_latents

WORKFLOWS = PACK_ROOT / "workflows"
TARGET = PACK_ROOT / "demo" / "output" / "host"
NAMES = (
    "tiny_diffusion_forcing", "tiny_chunk_cache", "tiny_next_clip", "tiny_causal", "tiny_stream",
    "tiny_long_video", "tiny_accelerate_compare", "tiny_ksampler", "tiny_sampler_ar_video",
)  # fmt: skip
# These run only with checkpoints that are not part of the pack: the first with core's loader, the others with ours.
REPACKAGED = ("causal_forcing_fast",)
PUBLISHED = (
    "skyreels_diffusion_forcing", "skyreels_14b", "self_forcing", "causal_forcing_chunkwise", "causvid",
    "krea_realtime",
)  # fmt: skip
OTHERS_WEIGHTS = (*REPACKAGED, *PUBLISHED)
SAMPLER, TIMELINE, VIDEO = "ARVASegmentSampler", "ARVATimeline", "SaveVideo"
OF_CORE = "ARVARunTimeline"  # gives latent and timeline of one of core's samplers, as ours gives its own
LATENT_NODE = "latent of "
RUN_SECONDS = 1800.0
AGREEMENT = 1e-3
AMPLIFIED = 1e-2  # allowed at most, of a run that makes more than AGREEMENT of one rounding error
ROUNDING = 2.0**-23  # a unit in the last place of fp32
THUMBNAIL_ROWS, THUMBNAIL_SIZE, THUMBNAIL_BYTES = 3, 160, 60_000

Graph = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class SamplerRun:
    """What one sampler of a workflow made.

    Attributes:
        latent: a safetensors file; its ``latent_tensor`` is the sampler's LATENT, in core's LATENT space.
        timeline, svg: the files its AR Timeline saved. report: the timeline in words. totals: of the timeline.
    """

    latent: Path
    timeline: Path
    svg: Path
    report: str
    totals: dict[str, Any]


@dataclass(frozen=True, slots=True)
class WorkflowRun:
    """What one workflow made.

    Attributes:
        videos: the files its Save Video nodes saved, then those that its samplers streamed, in the graph's order.
        samplers: by node id, in the graph's order.
        entry: the server's history entry.
    """

    videos: tuple[Path, ...]
    samplers: dict[str, SamplerRun]
    entry: dict[str, Any]


def load_graph(name: str) -> Graph:
    """The API-format twin of a workflow."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())


def nodes_of(graph: Graph, class_type: str) -> list[str]:
    """Ids of the graph's nodes of one class."""
    return [node_id for node_id, node in graph.items() if node["class_type"] == class_type]


def samplers_of(graph: Graph) -> list[str]:
    """Ids of the nodes that give a latent and the timeline of its run."""
    return nodes_of(graph, SAMPLER) + nodes_of(graph, OF_CORE)


def video_nodes(graph: Graph) -> list[str]:
    """Ids of the nodes that save a video: Save Video, then samplers that stream one."""
    streaming = [node_id for node_id in nodes_of(graph, SAMPLER) if "stream" in graph[node_id]["inputs"]]
    return nodes_of(graph, VIDEO) + streaming


def with_saved_latents(graph: Graph) -> Graph:
    """A copy of ``graph`` that also saves the latents of every sampler."""
    saves = {
        LATENT_NODE + sampler: {
            "class_type": "SaveLatent",
            "inputs": {"samples": [sampler, 0], "filename_prefix": "latents/arva"},
        }
        for sampler in samplers_of(graph)
    }
    return {**copy.deepcopy(graph), **saves}


def run_graph(server: ComfyServer, graph: Graph, target: Path, timeout: float = RUN_SECONDS) -> WorkflowRun:
    """Queues a graph whose samplers have an AR Timeline each; copies what it made to ``target``.

    Raises:
        PromptError: refused or failed. TimeoutError: not done after ``timeout`` seconds.
    """
    graph = with_saved_latents(graph)
    timelines = {graph[node_id]["inputs"]["timeline"][0]: node_id for node_id in nodes_of(graph, TIMELINE)}
    entry = server.run(graph, timeout)
    made = entry["outputs"]
    target.mkdir(parents=True, exist_ok=True)

    def fetch(saved: dict[str, str], name: str) -> Path:
        return Path(shutil.copyfile(server.output_dir / saved["subfolder"] / saved["filename"], target / name))

    def sampled(sampler: str, mark: str) -> SamplerRun:
        shown = made[timelines[sampler]]
        (files,) = shown["arva_timeline"]
        timeline = fetch(files["json"], f"timeline{mark}.json")
        return SamplerRun(
            latent=fetch(made[LATENT_NODE + sampler]["latents"][0], f"latent{mark}.safetensors"),
            timeline=timeline,
            svg=fetch(files["svg"], f"timeline{mark}.svg"),
            report=shown["text"][0],
            totals=json.loads(timeline.read_text())["totals"],
        )

    videos = _marked(video_nodes(graph))
    return WorkflowRun(
        videos=tuple(fetch(made[node]["images"][0], f"video{mark}.mp4") for mark, node in videos),
        samplers={node: sampled(node, mark) for mark, node in _marked(samplers_of(graph))},
        entry=entry,
    )


def _marked(nodes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each node with what its files are marked with: nothing where it is the only one."""
    return ((f"-{number}" if len(nodes) > 1 else "", node) for number, node in enumerate(nodes, 1))


def run_workflows(
    root: Path | None = None,
    names: Sequence[str] = NAMES,
    target: Path = TARGET,
    change: Callable[[str, Graph], Graph] = lambda name, graph: graph,
    server: ComfyServer | None = None,
    timeout: float = RUN_SECONDS,
) -> dict[str, WorkflowRun]:
    """Runs the API twins of ``names`` one after the other.

    Args:
        root: the ComfyUI checkout for a server of its own; not needed with ``server``.
        target: each workflow's files are copied to ``target / name``.
        change: maps a workflow's name and graph to the graph to run, for comparisons.
        server: a running server to use.
        timeout: seconds for one workflow.

    Raises:
        PromptError: a workflow was refused or failed. TimeoutError: it took too long.
    """
    with _server(root, server) as running:
        return {
            name: run_graph(running, change(name, load_graph(name)), Path(target) / name, timeout) for name in names
        }


@contextmanager
def _server(root: Path | None, server: ComfyServer | None) -> Iterator[ComfyServer]:
    if server is not None:
        yield server
    elif root is None:
        raise ValueError("run_workflows needs the ComfyUI checkout (root) or a running server.")
    else:
        with ComfyServer(root) as own:
            yield own


def disagreement(graph: Graph, run: WorkflowRun, models: Path = MODELS) -> tuple[float, float]:
    """How far the host's latents are from those the library makes of the same graph, and how far they may be.

    The norm of the difference over the norm of the latents, of the sampler that comes closest to what is allowed or
    exceeds it most. It is not the largest single difference, because a causal rollout amplifies rounding errors with
    every block: 1e-6 more start noise moves single values of the last block by almost 1e-2.

    ``AGREEMENT`` is allowed. Over many blocks rounding alone makes more than that; then twice what the library's own
    latents move by when its start noise is a unit in the last place larger, but ``AMPLIFIED`` at most.
    """
    (loader,) = nodes_of(graph, "UNETLoader")
    model = load_model(models / graph[loader]["inputs"]["unet_name"])
    pairs = []
    for sampler, made in run.samplers.items():
        expected = library_latents(graph, model, sampler)
        difference, allowed = _relative(host_latents(made.latent), expected), AGREEMENT
        if difference > AGREEMENT:
            moved = _relative(library_latents(graph, model, sampler, ROUNDING), expected)
            allowed = min(max(AGREEMENT, 2.0 * moved), AMPLIFIED)
        pairs.append((difference, allowed))
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def _relative(latents: Tensor, expected: Tensor) -> float:
    return float((latents - expected).norm() / expected.norm())


def thumbnail(videos: Sequence[Path]) -> bytes:
    """A JPEG of frames spread over each video, row by row in a square, as template cards are.

    Of one video the rows are its thirds; of ``THUMBNAIL_ROWS`` videos each has a row.
    """
    from PIL import Image

    count, size = THUMBNAIL_ROWS, THUMBNAIL_SIZE
    each = count * count // len(videos)
    pictures = [picture for video in videos for picture in _spread(video, each)]
    sheet = Image.new("RGB", (size * count, size * count))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, count)
        sheet.paste(picture.resize((size, size)), (column * size, row * size))
    for quality in range(90, 20, -10):
        buffer = BytesIO()
        sheet.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= THUMBNAIL_BYTES:
            break
    return buffer.getvalue()


def _spread(video: Path, count: int) -> list[Any]:
    """``count`` of a video's frames, first and last among them, as PIL images."""
    import av

    with av.open(str(video)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    return [frames[round(index * (len(frames) - 1) / (count - 1))] for index in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the shipped workflows on a headless ComfyUI.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--target", type=Path, default=TARGET, help="folder for what they make")
    parser.add_argument("--thumbnails", action="store_true", help="renew the pictures of the templates")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"there is no workflow {unknown[0]!r}; workflows: {', '.join(NAMES)}")
    root = find_comfy()
    if root is None:
        print("ComfyUI workflows not run: no ComfyUI found; set COMFYUI_PATH.")
        return
    agree = True
    for name, run in run_workflows(root, options.names or NAMES, options.target).items():
        difference, allowed = disagreement(load_graph(name), run)
        agree &= difference <= allowed
        for made in run.samplers.values():
            print(f"{name} in ComfyUI: {made.timeline}\n{made.report}")
        limit = (
            f"{allowed:g}" if allowed == AGREEMENT else f"{allowed:.1e}, twice what a rounding error makes of itself"
        )
        print(f"ComfyUI's latents and the library's differ by {difference:.1e} of their norm (allowed {limit}).\n")
        if options.thumbnails:
            (WORKFLOWS / f"{name}.jpg").write_bytes(thumbnail(run.videos))
    if not agree:
        sys.exit("ComfyUI and the library disagree.")


if __name__ == "__main__":
    main()
