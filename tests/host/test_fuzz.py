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
from tests.host.fuzz_cases import Cases
from tests.host.fuzz_host import FuzzHost

NODES = json.loads((Path(__file__).parents[1] / "golden" / "node_ids.json").read_text())
SLOW = 10.0


@pytest.fixture(scope="module")
def host(comfy_root: Path) -> Iterator[FuzzHost]:
    with FuzzHost(comfy_root) as running:
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


@pytest.mark.parametrize("node", NODES)
@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_node_works_or_refuses_in_a_sentence(host: FuzzHost, node: str, data: st.DataObject) -> None:
    inputs = data.draw(Cases(host.nodes).inputs(node), label=node)
    judge("node inputs", node, inputs, host.run(node, inputs))
