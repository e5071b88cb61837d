"""Whatever stops a run in the real ComfyUI, the next one is what a fresh one would be, and nothing of it is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from demo.model import TinyConfig, TinyWan, save_model
from tests.host.inprocess import run_in_process

SCRIPT = Path(__file__).with_name("fault_runs.py")
FRAMES = (
    "staircase", "suffix", "shared prefix", "chunk cache", "next clip", "quality target", "streamed segments",
)  # fmt: skip
CAUSAL = (
    "core store", "guided", "window", "importance-redundancy", "temporal-merge", "head-groups", "8-bit", "offload",
    "sparse", "streamed blocks",
)  # fmt: skip
SHORT = ("staircase", "chunk cache", "window", "temporal-merge", "streamed segments")
TURNS = ("core store",)
SIZES = ("staircase", "next clip", "core store", "window", "sparse")
SLOW = 7200.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights, as a diffusion-forcing model and as a causal one."""
    folder = tmp_path_factory.mktemp("faults")
    for name, causal in (("frames", False), ("causal", True)):
        torch.manual_seed(0)
        save_model(TinyWan(TinyConfig(causal_ar=causal, num_layers=2)), folder / f"{name}.safetensors")
    return folder


def run(root: Path, folder: Path, timeout: float = 600.0, **asked: tuple[str, ...]) -> dict[str, Any]:
    """Facts of ``fault_runs.py`` by function and loop."""
    given = [f"{what}={','.join(names)}" for what, names in asked.items()]
    return run_in_process(SCRIPT, str(folder), *given, root=root, core_nodes=[], timeout=timeout)


@pytest.fixture(scope="module")
def short(comfy_root: Path, folder: Path) -> dict[str, Any]:
    return run(
        comfy_root,
        folder,
        short=SHORT,
        lowered=("window", "head-groups"),
        turns=TURNS,
        sizes=SIZES[:1],
        dropped=("window",),
    )


def check_nothing_is_left(told: dict[str, Any], cases: int) -> None:
    """After each case: the next run bit for bit as on a fresh MODEL, no tensor alive, not even until the garbage
    collector comes, and MODEL and network as they were."""
    assert told["cases"] == cases > 0
    for left in ("different", "alive", "waiting for the collector", "changed"):
        assert told[left] == [], left


@pytest.mark.parametrize("name", SHORT)
def test_a_run_that_is_stopped_leaves_nothing(short: dict[str, Any], name: str) -> None:
    interrupt, memory = (short["short"][name][kind] for kind in ("interrupt", "no memory"))
    check_nothing_is_left(interrupt, 1)
    check_nothing_is_left(memory, 1)
    assert interrupt["ended"] == {"InterruptProcessingException": 1}
    assert memory["ended"] == ({"finished": 1} if can_lower(name) else {"OutOfMemoryError": 1})


def can_lower(name: str) -> bool:
    """Whether the loop keeps K/V in a store of ours whose budget can be lowered."""
    return name in CAUSAL and name not in ("core store", "head-groups")


def test_a_store_that_cannot_be_allocated_lowers_its_budget_once(short: dict[str, Any]) -> None:
    once, for_good = (short["lowered"]["window"][kind] for kind in ("once", "for good"))
    assert once["ended"] == {"finished": 1} and for_good["ended"] == {"OutOfMemoryError": 1}
    (remark,) = once["remarks"]
    assert remark.startswith("segment 0 was made again with 1 first and 5 latest latent frames, ")
    groups = short["lowered"]["head-groups"]["once"]
    (sentence,) = groups["said"]
    assert sentence.startswith("Segment 0 does not fit the memory, and its K/V budget is as low as it can be: use a ")
    for told in (once, for_good, groups):
        check_nothing_is_left(told, 1)


@pytest.mark.parametrize("name", TURNS)
def test_two_prompts_and_two_samplers_can_take_one_model_in_turns(short: dict[str, Any], name: str) -> None:
    told = short["turns"][name]
    assert told["same"] == [True] * 4 and told["another"]
    assert told["changed"] == []


@pytest.mark.parametrize("name", SIZES[:1])
def test_sizes_dtypes_and_settings_can_change_between_runs(short: dict[str, Any], name: str) -> None:
    assert short["sizes"][name] == {"different": [], "cases": 9}


def test_a_model_that_nobody_holds_goes_at_once(short: dict[str, Any]) -> None:
    assert short["dropped"]["window"] == [0, 0]


@pytest.fixture(scope="module", params=[FRAMES[:3], FRAMES[3:], CAUSAL[:3], CAUSAL[3:6], CAUSAL[6:]], ids=", ".join)
def long(request: pytest.FixtureRequest, comfy_root: Path, folder: Path) -> dict[str, Any]:
    names = request.param
    sizes = tuple(name for name in SIZES if name in names)
    asked = {"cancelled": names, "failing": names, "turns": names, "sizes": sizes, "dropped": names, "digests": names}
    return run(comfy_root, folder, SLOW, **asked)


@pytest.mark.long
def test_a_cancel_at_every_call_leaves_nothing(long: dict[str, Any]) -> None:
    for told in (told for kinds in long["cancelled"].values() for told in kinds.values()):
        check_nothing_is_left(told, told["of"])
        assert told["ended"] == {"InterruptProcessingException": told["of"]}
    print(f"{count(long['cancelled'])} cancels in {', '.join(long['cancelled'])}")


@pytest.mark.long
def test_errors_and_full_memory_leave_nothing(long: dict[str, Any]) -> None:
    for name, kinds in long["failing"].items():
        for kind, told in kinds.items():
            check_nothing_is_left(told, sum(told["ended"].values()))
            if kind == "error":
                assert set(told["ended"]) == {"RuntimeError"}
            elif kind == "no memory in a forward":
                assert set(told["ended"]) == {"finished" if can_lower(name) else "OutOfMemoryError"}, name
            else:
                assert set(told["ended"]) <= {"OutOfMemoryError", "finished"}
                assert can_lower(name) or "finished" not in told["ended"], (name, kind)
    print(f"{count(long['failing'])} errors in {', '.join(long['failing'])}")


def count(facts: dict[str, Any]) -> int:
    return sum(told["cases"] for kinds in facts.values() for told in kinds.values())


@pytest.mark.long
def test_all_loops_take_turns_and_go_at_once(long: dict[str, Any]) -> None:
    for told in long["turns"].values():
        assert told["same"] == [True] * 4 and told["another"] and told["changed"] == []
    assert all(told == {"different": [], "cases": 9} for told in long["sizes"].values())
    assert all(waiting == [0, 0] for waiting in long["dropped"].values())


@pytest.mark.long
def test_another_process_makes_the_same_bits(comfy_root: Path, folder: Path, long: dict[str, Any]) -> None:
    names = tuple(long["digests"])
    assert run(comfy_root, folder, SLOW, digests=names)["digests"] == long["digests"]
