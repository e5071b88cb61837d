"""Many prompts at once on a headless ComfyUI: mixed workflows of two clients, some of them cancelled.

    python -m tests.host.load_run [--prompts 200] [--seed 0] [--target FILE]

says what became of every prompt and how the server's memory went, and writes it to ``FILE`` (default
``bench/results/load.json``). It ends with 1 where a prompt is lost, an output is another prompt's or memory grew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.host.comfy import PACK_ROOT, ComfyServer, find_comfy
from tests.host.workflow_run import LATENT_NODE, NAMES, Graph, load_graph, samplers_of, with_saved_latents

TARGET = PACK_ROOT / "bench" / "results" / "load.json"
SHORT: dict[str, dict[str, Any]] = {
    "tiny_diffusion_forcing": {"frames": 12, "steps": 4, "segment": 8, "ar_step": 1},
    "tiny_chunk_cache": {"frames": 12, "steps": 4, "segment": 8, "ar_step": 1},
    "tiny_next_clip": {"frames": 12, "steps": 4, "segment": 8},
    "tiny_causal": {"frames": 8},
    "tiny_stream": {"frames": 12},
    "tiny_long_video": {"frames": 12, "budget": 9.0, "from_segment": 1, "steps": 2},
    "tiny_accelerate_compare": {"frames": 8, "steps": 4, "segment": 8, "ar_step": 1},
    "tiny_ksampler": {"frames": 8, "steps": 4},
    "tiny_sampler_ar_video": {"frames": 8, "steps": 4},
}
WARM = 60  # prompts until the allocator holds what every workflow needs, with its models in any order
SEEDS, SEEDED = (7, 8), ("seed", "noise_seed")
DELETED, INTERRUPTED = 0.1, 0.1  # shares of the prompts
GROWTH = 0.01
SERVER = ("--cache-classic",)  # keeps the last prompt's results; by default they pile up until memory is short
ENDS = ("execution_success", "execution_error", "execution_interrupted")
SILENCE, LAST_WORDS = 600.0, 10.0


@dataclass
class Client:
    """Somebody at a browser."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    events: list[dict[str, Any]] = field(default_factory=list)

    def told_of(self, *kinds: str) -> list[str]:
        """Ids of the prompts that messages of these kinds (of any, without) were about, in order."""
        told = [event["data"] for event in list(self.events) if not kinds or event["type"] in kinds]
        return [data["prompt_id"] for data in told if isinstance(data, dict) and "prompt_id" in data]


@dataclass
class Prompt:
    """One of the queue, and what became of it."""

    workflow: str
    seed: int
    client: Client
    fate: str  # what is done to it: run, delete or interrupt
    delay: float
    id: str = ""
    ended: str = ""


@dataclass
class Load:
    """What came of it.

    Attributes:
        prompts: all of them. faults: what went wrong, one sentence each. resident: bytes of the server's process, one
            after each finished prompt. seconds: from the first queued to the last finished.
    """

    prompts: list[Prompt]
    faults: list[str]
    resident: list[int]
    seconds: float

    @property
    def ended(self) -> dict[str, int]:
        return dict(Counter(prompt.ended for prompt in self.prompts))

    def growth(self, warm: int) -> float:
        """Relative growth of memory from the prompts after ``warm`` to the last ones: medians of a quarter of them."""
        after = self.resident[warm:]
        part = max(1, len(after) // 4)
        first, last = statistics.median(after[:part]), statistics.median(after[-part:])
        return last / first - 1.0


def graph_of(workflow: str, seed: int, tag: str, graph: Graph | None = None) -> Graph:
    """A short variant of a workflow, or of ``graph`` made from it, whose latents are saved under ``tag``."""
    graph = with_saved_latents(graph or load_graph(workflow))
    for node_id, node in graph.items():
        node["inputs"] |= {key: value for key, value in SHORT[workflow].items() if key in node["inputs"]}
        if node["class_type"] == "PrimitiveInt":
            node["inputs"]["value"] = seed
        elif key := next((key for key in SEEDED if isinstance(node["inputs"].get(key), int)), None):
            node["inputs"][key] = seed
        elif node_id.startswith(LATENT_NODE):
            node["inputs"]["filename_prefix"] = f"load/{tag}"
    return graph


def digests(server: ComfyServer, graph: Graph, entry: dict[str, Any], tag: str) -> tuple[str, ...]:
    """Of the latents that each sampler of a finished graph saved."""
    made = []
    for sampler in samplers_of(graph):
        (saved,) = entry["outputs"][LATENT_NODE + sampler]["latents"]
        if not saved["filename"].startswith(f"{tag}_"):
            return (f"{saved['filename']} is not of {tag}",)
        latents = load_file(server.output_dir / saved["subfolder"] / saved["filename"])["latent_tensor"]
        made.append(hashlib.sha256(latents.numpy().tobytes()).hexdigest())
    return tuple(made)


def run_load(server: ComfyServer, count: int, seed: int = 0, names: Sequence[str] = NAMES) -> Load:
    """Runs each workflow alone for every seed, then ``count`` of them from two clients at once."""
    draw = random.Random(seed)
    known = {}
    for name in names:
        for number in SEEDS:
            tag = f"known-{uuid.uuid4().hex}"
            graph = graph_of(name, number, tag)
            known[name, number] = digests(server, graph, server.run(graph), tag)
    clients = (Client(), Client())
    listeners = [server.listen(client.name, client.events.append) for client in clients]
    try:
        fates = draw.choices(("run", "delete", "interrupt"), (1 - DELETED - INTERRUPTED, DELETED, INTERRUPTED), k=count)
        prompts = [
            Prompt(draw.choice(names), draw.choice(SEEDS), draw.choice(clients), fate, draw.uniform(0.0, 0.5))
            for fate in fates
        ]
        started = time.monotonic()
        for number, prompt in enumerate(prompts):
            graph = graph_of(prompt.workflow, prompt.seed, f"prompt-{number}")
            prompt.id = server.queue(graph, prompt.client.name)
        resident = _watch(server, prompts, draw)
        seconds = time.monotonic() - started
    finally:
        for listener in listeners:
            listener.stop()
    return Load(prompts, [*_account(server, prompts, known), *_messages(clients, prompts)], resident, seconds)


def _watch(server: ComfyServer, prompts: list[Prompt], draw: random.Random) -> list[int]:
    """Cancels what is to be cancelled, waits until nothing is left, and notes the memory after every prompt."""
    waiting = [prompt for prompt in prompts if prompt.fate == "delete"]
    doomed = {prompt.id: prompt for prompt in prompts if prompt.fate == "interrupt"}
    clients = {prompt.client.name: prompt.client for prompt in prompts}.values()
    resident: list[int] = []
    timers: list[threading.Timer] = []
    last = time.monotonic()
    while (queue := server.get_json("/queue"))["queue_running"] or queue["queue_pending"]:
        for item in queue["queue_running"]:
            if (prompt := doomed.pop(item[1], None)) is not None:
                timers.append(threading.Timer(prompt.delay, server.interrupt, (prompt.id,)))
                timers[-1].start()
        if waiting and draw.random() < 0.5:
            server.delete(waiting.pop(draw.randrange(len(waiting))).id)
        done = sum(len(client.told_of(*ENDS)) for client in clients)
        if done > len(resident):
            resident += [server.resident_bytes()] * (done - len(resident))
            last = time.monotonic()
            print(f"{done} ended, {resident[-1] / 1e6:.1f} MB", file=sys.stderr, flush=True)
        if time.monotonic() - last > SILENCE:
            raise TimeoutError(f"No prompt ended for {SILENCE:g} s; {len(queue['queue_pending'])} are waiting.")
        time.sleep(0.02)
    for timer in timers:
        timer.join()
    ends, until = sum(server.history(prompt.id) is not None for prompt in prompts), time.monotonic() + LAST_WORDS
    while sum(len(client.told_of(*ENDS)) for client in clients) < ends and time.monotonic() < until:
        time.sleep(0.02)  # the queue is empty before the last message has come
    return [*resident, server.resident_bytes()]


def _account(server: ComfyServer, prompts: list[Prompt], known: dict[tuple[str, int], tuple[str, ...]]) -> list[str]:
    """Fills in how every prompt ended; returns what is wrong with it."""
    wrong = []
    for number, prompt in enumerate(prompts):
        entry, name = server.history(prompt.id), f"prompt {number} ({prompt.workflow}, {prompt.fate})"
        started = prompt.id in prompt.client.told_of("execution_start")
        if entry is None:
            prompt.ended = "deleted"
            if prompt.fate != "delete" or started:
                wrong.append(f"{name} is lost")
            continue
        kinds = [kind for kind, _ in entry["status"]["messages"]]
        if entry["status"]["status_str"] == "success":
            prompt.ended, tag = "success", f"prompt-{number}"
            made = digests(server, graph_of(prompt.workflow, prompt.seed, tag), entry, tag)
            if made != known[prompt.workflow, prompt.seed]:
                wrong.append(f"{name} made {made} instead of {known[prompt.workflow, prompt.seed]}")
        elif "execution_interrupted" in kinds:
            prompt.ended = "interrupted"
            if prompt.fate != "interrupt":
                wrong.append(f"{name} was interrupted by an interrupt of another one")
        else:
            prompt.ended = "failed"
            wrong.append(f"{name} failed: {entry['status']['messages'][-1]}")
    return wrong


def _messages(clients: Sequence[Client], prompts: list[Prompt]) -> list[str]:
    """What is wrong with who was told what."""
    wrong = []
    for client in clients:
        own = {prompt.id for prompt in prompts if prompt.client is client}
        strange = set(client.told_of()) - own
        wrong += [f"a client was told of {len(strange)} prompts that are not its own"] * bool(strange)
        ended = Counter(client.told_of(*ENDS))
        expected = Counter(p.id for p in prompts if p.client is client and p.ended in ("success", "interrupted"))
        wrong += [f"a client was told of {ended.total()} ends instead of {expected.total()}"] * (ended != expected)
        timelines = set(client.told_of("arva.timeline"))
        silent = [p for p in prompts if p.client is client and p.ended == "success" and p.id not in timelines]
        cached = {event["data"]["prompt_id"] for event in client.events if event["type"] == "execution_cached"
                  and event["data"]["nodes"]}  # fmt: skip
        wrong += [f"a client saw no timeline of {prompt.workflow}" for prompt in silent if prompt.id not in cached]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Queue many prompts on a headless ComfyUI.")
    parser.add_argument("--prompts", type=int, default=WARM + 200)
    parser.add_argument("--seed", type=int, default=0, help="of what is queued and cancelled")
    parser.add_argument("--target", type=Path, default=TARGET, help="file for the figures")
    options = parser.parse_args()
    root = find_comfy()
    if root is None:
        sys.exit("No ComfyUI found; set COMFYUI_PATH.")
    with ComfyServer(root, extra_args=SERVER) as server:
        load = run_load(server, options.prompts, options.seed)
    warm = min(WARM, options.prompts // 4)
    figures = {
        "prompts": options.prompts, "seed": options.seed, "server": list(SERVER), "clients": 2, "ended": load.ended,
        "accounted for": sum(load.ended.values()) - len(load.faults), "faults": load.faults,
        "warm-up prompts": len(SHORT) * len(SEEDS) + warm, "growth": round(load.growth(warm), 5),
        "resident MB": [round(size / 1e6, 1) for size in load.resident], "seconds": round(load.seconds, 1),
    }  # fmt: skip
    options.target.write_text(json.dumps(figures) + "\n")
    print({key: value for key, value in figures.items() if key != "resident MB"})
    print(f"resident {load.resident[warm] / 1e6:.1f} MB after {warm} prompts, {load.resident[-1] / 1e6:.1f} at the end")
    if load.faults or load.growth(warm) >= GROWTH:
        sys.exit("Prompts were lost or mixed up, or memory grew.")


if __name__ == "__main__":
    main()
