"""Models compiled by core's Torch Compile Model inside ComfyUI, for test_compile.py: facts to the last line.

Arguments: the diffusion-forcing checkpoint, the causal checkpoint, and ``inductor`` to compile with it (which takes
minutes); else the same wrapper gets a backend that counts the graphs and runs them as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import comfy.sd
import torch
import torch._dynamo
from comfy_api.torch_helpers import set_torch_compile_wrapper

sys.path.append(str(Path(__file__).parent))
from node_runs import CAUSAL, empty, facts, node, sample  # noqa: E402

from nodes import NODE_CLASS_MAPPINGS as NODES  # noqa: E402

graphs: list[int] = []
CASES = sys.argv[4:]


def count(graph, inputs):
    graphs.append(len(inputs))
    return graph.forward


def compiled(model, backend: str):
    """What Torch Compile Model makes of a model; with our counter in the place of a compiler where asked."""
    clone = NODES["TorchCompileModel"].execute(model, "inductor")[0]
    if backend == "count":
        kwargs = clone.model_options["torch_compile_kwargs"]
        set_torch_compile_wrapper(model=clone, backend=count, options=kwargs["options"])
    return clone


def compare(name: str, model, latent, backend: str, **settings) -> None:
    if CASES and name not in CASES:
        return
    torch._dynamo.reset()
    graphs.clear()
    try:
        plain, totals = sample(model, latent, **settings)
        out, other = sample(compiled(model, backend), latent, **settings)
    except Exception as error:
        facts[name] = {"error": f"{type(error).__name__}: {error}"[:600]}
        print(name, facts[name], file=sys.stderr, flush=True)
        return
    made = len(graphs)
    facts[name] = {
        "difference": float((out - plain).norm() / plain.norm()), "same calls": totals["calls"] == other["calls"],
        "calls": totals["calls"], "graphs": made,
    }  # fmt: skip
    print(name, facts[name], file=sys.stderr, flush=True)


def main(frames_file: str, causal_file: str, backend: str = "count") -> None:
    small = {"segment": 8, "steps": 4}
    model, latent = comfy.sd.load_diffusion_model(frames_file), empty(12)
    compare("plain", model, latent, backend, **small)
    fast = node("ARVATriModalScheduler", model, 0.2, 0.9, "log-snr", "2", 0.75, 5, 1, 0.0)[0]
    compare("suffix window", node("ARVAActiveFrameWindow", fast, "suffix")[0], latent, backend, **small)
    frozen = node("ARVAActiveFrameWindow", fast, "frozen K/V", 0.0, "log-signal")[0]
    compare("frozen K/V", frozen, latent, backend, segment=12, steps=4, ar_step=4)  # one block after the other
    compare("next clip", fast, latent, backend, mode="next clip", **small)
    causal, short = comfy.sd.load_diffusion_model(causal_file), empty(14)
    few = CAUSAL | {"steps": 2}
    compare("core's store", causal, short, backend, **few)
    bounded = node("ARVAKVCacheBudget", causal, 9.0, "latent frames", "window", 1)[0]
    compare("bounded store", bounded, short, backend, **few | {"cfg": 2.0})
    compare("history guidance", model, latent, backend, history_guidance=1.0, **small)
    compare("history guidance, store", bounded, short, backend, **few | {"cfg": 2.0, "history_guidance": 1.0})


if __name__ == "__main__":
    main(*sys.argv[1:4])
    print(json.dumps(facts))
