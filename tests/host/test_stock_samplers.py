"""Core's own samplers follow the acceleration nodes: off is off, every call is told, only what is legal is reused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.host.comfy import ComfyServer
from tests.host.inprocess import run_in_process
from tests.host.test_nodes import checkpoints

__all__ = ["checkpoints"]

SCRIPT = Path(__file__).with_name("stock_runs.py")
CORE_NODES = ["nodes_ar_video.py", "nodes_custom_sampler.py", "nodes_cfg.py", "nodes_model_advanced.py"]
TWO_CALLS = {"heun", "dpm_2", "exp_heun_2_x0", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "seeds_2",
             "exp_heun_2_x0_sde", "dpmpp_2s_ancestral_cfg_pp"}  # fmt: skip
TRAJECTORY = {"euler", "euler_cfg_pp", "heun", "dpm_2", "uni_pc", "uni_pc_bh2", "dpmpp_2m", "res_multistep", "deis",
              "lms", "ipndm", "ipndm_v", "gradient_estimation", "dpmpp_2m_cfg_pp", "exp_heun_2_x0"}  # fmt: skip
CLOSE = 2e-4  # latents reach 15, and core takes Euler steps from x0


@pytest.fixture(scope="module")
def facts(comfy_root: Path, checkpoints: dict[str, Path]) -> dict[str, Any]:
    files = [str(checkpoints["frames"]), str(checkpoints["causal"])]
    return run_in_process(SCRIPT, *files, root=comfy_root, core_nodes=CORE_NODES)


def test_thresholds_of_zero_leave_every_sampler_as_it_is(facts: dict[str, Any]) -> None:
    assert len(facts["samplers"]) >= 35
    assert [name for name, told in facts["samplers"].items() if not told["off is off"]] == []


def test_every_guided_call_of_every_sampler_has_one_record(facts: dict[str, Any]) -> None:
    for name, told in facts["samplers"].items():
        (guided, forwards), (calls, spent) = told["full"], told["accelerated"]
        assert forwards == guided, name
        assert calls == guided == len(told["decisions"]), name
        assert spent == told["decisions"].count("recompute") < guided, name


def test_samplers_of_two_calls_a_step_are_counted_right(facts: dict[str, Any]) -> None:
    steps = facts["samplers"]["euler"]["full"][0]
    for name in TWO_CALLS:
        assert facts["samplers"][name]["full"][0] == 2 * steps - 1, name


def test_only_samplers_on_a_trajectory_predict(facts: dict[str, Any]) -> None:
    for name, told in facts["samplers"].items():
        predicted = "predict" in told["decisions"]
        assert predicted == (told["sampler"] is None), name
        assert "cache" in told["decisions"] or predicted, name
    assert {name for name, told in facts["samplers"].items() if told["sampler"] is None} >= TRAJECTORY
    for name in ("euler_ancestral", "dpmpp_2m_sde", "lcm", "ddpm", "sa_solver", "seeds_2"):
        assert "x0 is held and nothing is predicted" in facts["samplers"][name]["sampler"]


def test_a_sampler_with_adaptive_steps_is_refused(facts: dict[str, Any]) -> None:
    assert facts["adaptive"].startswith("Tri-Modal Scheduler: sampler is dpm_adaptive, which sets its steps by")


def test_prompts_of_later_segments_are_refused_by_cores_samplers_and_keep_their_areas_in_ours(
    facts: dict[str, Any],
) -> None:
    for message in facts["segment prompts"]:
        assert message.startswith("Segment Prompt: only AR Segment Sampler reads prompts that begin at a later segment")
    assert facts["segment prompts, areas"] == [True, False, False]


def test_a_sampler_that_nobody_knows_only_holds_x0(facts: dict[str, Any]) -> None:
    made, note = facts["unknown"]
    assert note.startswith("of_another_pack is not a sampler this pack knows")
    assert "cache" in made and "predict" not in made
    assert facts["another kind"].startswith("Tri-Modal Scheduler: sampler is Trainer, which this pack knows nothing of")


@pytest.mark.parametrize("name", ["tri-modal", "corrected", "history", "timestep", "latent"])
def test_a_run_of_core_is_one_segment_of_ours(facts: dict[str, Any], name: str) -> None:
    difference, core, ours = facts["like ours"][name]
    assert core == ours and set(core) > {"recompute"}
    assert difference < CLOSE


@pytest.mark.parametrize("name", ["CFGGuider", "DualCFGGuider", "DualModelGuider"])
def test_guiders_go_on_working(facts: dict[str, Any], name: str) -> None:
    off_is_off, made, (guided, forwards), error = facts["guiders"][name]
    passes = 2 if name == "DualModelGuider" else 1
    assert off_is_off
    assert len(made) == guided == 8 and forwards == passes * made.count("recompute") < passes * guided
    assert 0.0 < error < 0.5


def test_guidance_functions_act_on_held_outputs(facts: dict[str, Any]) -> None:
    assert facts["guidance acts on held outputs"]


def test_conditionings_that_change_while_sampling_are_not_answered_from_before(facts: dict[str, Any]) -> None:
    assert facts["one prompt"].count("recompute") == 2
    made, note = facts["two halves"]
    assert made.count("recompute") == 3 and "it changed at noise level" in note
    assert facts["half cfg"].count("recompute") == 3
    assert facts["hook keyframes"].count("recompute") == 3


def test_conditionings_of_a_part_of_the_picture_are_held_as_they_are_combined(facts: dict[str, Any]) -> None:
    assert facts["area off"] and "cache" in facts["area"]


def test_nothing_of_a_run_outlives_it(facts: dict[str, Any]) -> None:
    assert facts["cancelled"] and facts["state after cancel"] == [] and facts["state at the end"] == []
    assert facts["again"] and facts["after cancel"] and facts["after another shape"]
    assert facts["other shape"] == [2, 16, 3, 6, 6]
    assert facts["no timeline of a cancelled run"]
    assert facts["options"] == ["arva_acceleration"]
    assert facts["wrappers"] == {"outer_sample": ["arva"]}
    assert facts["exact leaves nothing"] == [False, []]


def test_the_timeline_of_a_run_is_found_by_its_latent_and_no_tensor_is_kept(facts: dict[str, Any]) -> None:
    assert facts["found"] == [True, True] and facts["not found"] is None
    assert facts["kept"] == ["Timeline", "str"]


@pytest.mark.parametrize("name", ["HunyuanVideo", "LTXV"])
def test_other_flow_models_are_accelerated_and_the_report_says_what_is_measured(
    facts: dict[str, Any], name: str
) -> None:
    told = facts["models"][name]
    assert told["off"]
    for label in ("tri-modal", "timestep", "history"):
        run = told[label]
        guided, forwards = run["counts"]
        assert run["finite"] and 0.0 < run["error"] < 0.5
        assert len(run["decisions"]) == guided == 8
        assert forwards == run["decisions"].count("recompute") < 8
    assert told["tri-modal"]["signal"] is None
    assert "Tri-Modal Scheduler's timestep cannot be read from" in told["timestep"]["report"]
    assert "History-Guided Cache's auto cannot be read from" in told["history"]["report"]


def test_models_that_are_no_flow_are_refused(facts: dict[str, Any]) -> None:
    assert facts["no flow"].startswith("Tri-Modal Scheduler: model is WAN21")
    assert "flow models only" in facts["no flow"]


def test_a_quality_target_is_refused_where_its_errors_are_not_the_videos(facts: dict[str, Any]) -> None:
    guided, single = facts["targets"]
    assert guided.startswith("Accelerate AR Video: quality target measures the guided video's error")
    assert single == "nothing was refused"


def test_causal_blocks_of_core_hold_x0_and_keep_their_kv_store_in_order(facts: dict[str, Any]) -> None:
    same, made = facts["causal off"]
    assert same and made == (["recompute"] * 8 + ["commit"]) * 3
    (guided, forwards), records = facts["causal"]
    decisions = [decision for _, decision, _ in records]
    assert len(records) == guided == 27
    assert forwards == guided - decisions.count("cache") < guided and "predict" not in decisions
    assert [record for record in records if record[1] == "commit"] == [
        [0, "commit", [0, 4]], [1, "commit", [4, 8]], [2, "commit", [8, 10]]
    ]  # fmt: skip
    assert {segment for segment, decision, _ in records if decision == "cache"} == {0, 1, 2}
    assert "ar_video adds noise along the way" in facts["causal report"]


def test_causal_blocks_of_core_are_those_of_the_segment_sampler(facts: dict[str, Any]) -> None:
    difference, ours = facts["causal like ours"]
    assert difference < CLOSE
    assert ours == [decision for _, decision, _ in facts["causal"][1]]
    assert facts["start image"] == [["prefill", "recompute"], [[0, 2], [2, 6]]]
    assert facts["start image like ours"] < CLOSE
    assert facts["causal euler off"]


def test_what_needs_our_own_loop_is_refused(facts: dict[str, Any]) -> None:
    assert facts["elsewhere"].startswith("KV Cache Budget: acts in AR Segment Sampler only, and this model goes to ar")
    assert facts["chunks"].startswith("Chunk Cache: acts in AR Segment Sampler only, and this model goes to euler")


def core_graph(threshold: float) -> dict[str, Any]:
    """API-format graph: KSampler on the embedded model, with Run Timeline and AR Timeline."""
    scheduler = {
        "model": ["1", 0], "cache_below": threshold, "predict_below": threshold, "signal": "log-snr", "order": "1",
        "decay": 1.0, "max_skip": 5, "warmup": 1, "reach": 0.0,
    }  # fmt: skip
    sampling = {
        "model": ["2", 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 3, "steps": 6,
        "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    nodes = {
        "1": ("UNETLoader", {"unet_name": "tiny-df.safetensors", "weight_dtype": "default"}),
        "2": ("ARVATriModalScheduler", scheduler),
        "3": ("ARVATinyPrompt", {"text": "red disc, float, still"}),
        "4": ("ARVATinyLatent", {"frames": 4, "width": 64, "height": 64, "batch_size": 1}),
        "5": ("KSampler", sampling),
        "6": ("ARVARunTimeline", {"latent": ["5", 0]}),
        "7": ("ARVATimeline", {"timeline": ["6", 1], "filename_prefix": "timeline/core"}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def told(server: ComfyServer, entry: dict[str, Any]) -> list[str]:
    """Decisions of the timeline that node 7 saved."""
    (files,) = entry["outputs"]["7"]["arva_timeline"]
    saved = server.output_dir / files["json"]["subfolder"] / files["json"]["filename"]
    return [record["decision"] for record in json.loads(saved.read_text())["records"]]


def test_the_widget_sees_a_run_of_core_grow_and_its_result_stands_on_the_sampler(server: ComfyServer) -> None:
    entry = server.run(core_graph(0.9))
    events = server.events_of(entry["prompt_id"], "arva.timeline")
    assert events and all(event["node"] == "5" and event["views"] == ["7"] for event in events)
    assert events[-1]["done"] and sum(len(event["records"]) for event in events) == 6
    assert "cache" in told(server, entry)


def test_a_sampler_that_core_does_not_run_again_keeps_its_own_timeline(server: ComfyServer) -> None:
    fast, slow = core_graph(0.8), core_graph(0.01)
    expected = {"fast": told(server, server.run(fast)), "slow": told(server, server.run(slow))}
    assert expected["slow"] == ["recompute"] * 6 != expected["fast"]
    without = {key: node for key, node in core_graph(0.7).items() if key not in ("6", "7")}
    without["8"] = {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "latents/core"}}
    server.run(without)
    later = server.run(without | core_graph(0.7))
    assert "5" in [
        node for event in server.events_of(later["prompt_id"], "execution_cached") for node in event["nodes"]
    ]
    assert "cache" in told(server, later)


def test_without_acceleration_the_report_says_that_every_call_was_computed(server: ComfyServer) -> None:
    graph = core_graph(0.9)
    graph["5"]["inputs"]["model"] = ["1", 0]
    del graph["2"]
    graph["8"] = {"class_type": "PreviewAny", "inputs": {"source": ["6", 2]}}
    (text,) = server.run(graph)["outputs"]["8"]["text"]
    assert text.startswith("Run Timeline: no accelerated run made this latent.")
