"""Many prompts of two clients, some of them cancelled: none lost, none mixed up, memory flat."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host.comfy import ComfyServer
from tests.host.load_run import GROWTH, SERVER, WARM, run_load


def test_a_few_prompts_of_two_clients_are_all_accounted_for(server: ComfyServer) -> None:
    load = run_load(server, 6, seed=2, names=("tiny_causal", "tiny_next_clip"))
    assert load.faults == []
    assert sum(load.ended.values()) == 6 and load.ended["success"] >= 3


@pytest.mark.long
def test_two_hundred_mixed_prompts_after_a_warm_up_are_accounted_for_and_memory_stays_flat(comfy_root: Path) -> None:
    with ComfyServer(comfy_root, extra_args=SERVER) as server:
        load = run_load(server, WARM + 200)
    assert load.faults == []
    assert sum(load.ended.values()) == WARM + 200
    assert {"success", "deleted", "interrupted"} == set(load.ended)
    assert load.growth(WARM) < GROWTH
