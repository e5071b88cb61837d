"""Whatever a node is given, it works, or refuses in a sentence that names the node, the value and the remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import assert_sentence, counted
from tests.host.fuzz_cases import ANY_SHAPE, IMAGE_SHAPE, TEXT, VIDEO_SHAPE, WIDGETS, Cases, tensors
from tests.host.fuzz_host import FuzzHost

NODES = json.loads((Path(__file__).parents[1] / "golden" / "node_ids.json").read_text())
SLOW = 20.0
NAN = float("nan")
WRONG = {
    "INT": (None, "1", NAN, float("inf"), 1.5, -(2**70), 2**70, [], {"$": "weird"}),
    "FLOAT": (None, "0.5", NAN, float("inf"), float("-inf"), -1e300, 10**400, {"$": "tensor", "shape": [1]}),
    "STRING": (None, 3, NAN, ["a"], {"$": "bytes", "text": "a"}),
    "BOOLEAN": (None, "true", 2, NAN, []),
    "COMBO": (None, "no such thing", 3, NAN, ["a"], {"$": "weird"}),
}
STREAM = {"filename_prefix": "ar", "fps": 16.0, "format": "mp4", "resume": True, "every": 1, "context": 0}
LINKS = {
    "MODEL": {"$": "model", "kind": "causal"}, "LATENT": {"samples": {"$": "tensor", "shape": [1, 16, 4, 4, 4]}},
    "CONDITIONING": [[TEXT, {}]], "IMAGE": {"$": "tensor", "shape": [2, 8, 8, 3]},
    "SIGMAS": {"$": "tensor", "values": [1.0, 0.5, 0.0]}, "VAE": {"$": "vae", "kind": "tiny"},
    "ARVA_TIMELINE": {"$": "timeline"},
    "ARVA_STREAM": {"$": "node", "node": "ARVAStreamSegments", "inputs": STREAM},
}  # fmt: skip


@pytest.fixture(scope="module")
def host(comfy_root: Path) -> Iterator[FuzzHost]:
    with FuzzHost(comfy_root) as running:
        running.cases = Cases(running.nodes)
        yield running


def judge(test: str, node: str, inputs: dict[str, Any], answer: dict[str, Any]) -> None:
    """Counts a case and fails for what no case may do."""
    counted(test, answer["outcome"])
    case = json.dumps({"node": node, "inputs": inputs})
    assert answer["outcome"] != "fault", f"{answer['type']}: {answer['message']}\n{case}\n{answer.get('traceback', '')}"
    assert not answer["strays"], f"left {answer['strays']}\n{case}"
    assert answer["seconds"] < SLOW, f"took {answer['seconds']:.1f} s\n{case}"
    if answer["outcome"] == "refused":
        assert_sentence(answer["message"])
    if answer["outcome"] == "made":
        assert answer["finite"] or not answer["sound"], f"made NaN or infinity of finite inputs\n{case}"


def cases(share: float) -> settings:
    """A share of the profile's examples, half of it in the short profile."""
    most = settings.default.max_examples
    share = share if most > 100 else share / 2
    return settings(max_examples=max(1, round(most * share)), suppress_health_check=HealthCheck)


@pytest.mark.parametrize("node", NODES)
@cases(0.4)
@given(data=st.data())
def test_a_node_works_or_refuses_in_a_sentence(host: FuzzHost, node: str, data: st.DataObject) -> None:
    inputs = data.draw(host.cases.inputs(node), label=node)
    judge(f"inputs of {host.nodes[node]['title']}", node, inputs, host.run(node, inputs))


@pytest.mark.parametrize("method", ["decode", "encode", "decode_tiled", "encode_tiled"])
@cases(0.2)
@given(data=st.data())
def test_the_tiny_codec_works_or_refuses_in_a_sentence(host: FuzzHost, method: str, data: st.DataObject) -> None:
    given, shapes = ("latents", VIDEO_SHAPE) if "decode" in method else ("pixels", IMAGE_SHAPE)
    inputs = {given: data.draw(st.one_of(tensors(shapes), tensors(shapes), tensors(ANY_SHAPE)))}
    judge("the tiny codec", f"TinyVAE.{method}", inputs, host.run(f"TinyVAE.{method}", inputs))


def test_every_wrong_widget_value_is_named(host: FuzzHost) -> None:
    for node, told in host.nodes.items():
        for one in (one for one in told["inputs"] if one["type"] in WIDGETS):
            for wrong in WRONG[one["type"]][one["optional"] :]:  # None is nothing where nothing is needed
                inputs = usual(told) | {one["name"]: wrong}
                answer = host.run(node, inputs)
                judge("wrong widget values", node, inputs, answer)
                assert answer["outcome"] == "refused", f"{node} takes {wrong!r} for {one['name']}"
                assert answer["message"].startswith(f"{told['title']}: {one['name']} is "), answer["message"]


def test_every_missing_link_is_named(host: FuzzHost) -> None:
    for node, told in host.nodes.items():
        for one in (one for one in told["inputs"] if one["type"] not in WIDGETS):
            for wrong in (3, "text", {"$": "weird"}, {"$": "tensor", "shape": [2], "dtype": "int64"}):
                inputs = usual(told) | {one["name"]: wrong}
                answer = host.run(node, inputs)
                judge("wrong links", node, inputs, answer)
                assert answer["outcome"] == "refused", f"{node} takes {wrong!r} for {one['name']}"
                assert answer["message"].startswith(f"{told['title']}: {one['name']} is "), answer["message"]


def usual(told: dict[str, Any]) -> dict[str, Any]:
    """Every input of a node as it is meant to be."""
    inputs = {}
    for one in told["inputs"]:
        if one["type"] in LINKS or "default" in one:
            inputs[one["name"]] = one.get("default", LINKS.get(one["type"]))
        elif one["type"] == "COMBO":
            inputs[one["name"]] = one["options"][0]
    return inputs
