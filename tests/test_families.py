"""What a checkpoint is taken for: found where the file says it, asked where it does not, never guessed in silence."""

from __future__ import annotations

import json

import pytest
import torch

from accel.families import (
    AUTO,
    CAUSAL_FORCING,
    CAUSVID,
    CHOICES,
    FAMILIES,
    KREA,
    OTHER_CAUSAL,
    PLAIN,
    SELF_FORCING,
    SKYREELS,
    find_family,
    fitting,
    foreign,
    host_metadata,
)
from accel.wan_keys import WanWeights, flatten, read_wan
from tests.miniatures import CAUSAL, GOLDEN, prefixed, training_file, wan_weights

BARE = read_wan(wan_weights(CAUSAL))
TOLD = read_wan(wan_weights(GOLDEN, frame_rate=True))
CAUSAL_TOLD = {"config": json.dumps({"transformer": {"causal_ar": True, "num_heads": 1}})}
CAUSALS = [name for name, family in FAMILIES.items() if family.causal]


def of_size(dim: int) -> WanWeights:
    """Weights that are only looked at for their shapes."""
    shapes = {
        "head.modulation": (1, 2, dim),
        "head.head.weight": (64, dim),
        "patch_embedding.weight": (dim, 16, 1, 2, 2),
    }
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return WanWeights(tensors | {"blocks.0.modulation": torch.empty(1, 6, dim, device="meta")}, "original", "", {})


def refusal(*given) -> str:
    with pytest.raises(ValueError) as raised:
        find_family(*given)
    return str(raised.value)


def test_a_model_that_is_told_its_frame_rate_is_skyreels() -> None:
    finding = find_family(AUTO, TOLD, {}, "model.safetensors")
    assert finding.family == SKYREELS and "frame rate" in finding.reason and finding.notes == ()
    report = finding.report("model.safetensors", TOLD, 24)
    assert report.startswith("model.safetensors: SkyReels-V2 DF, because it embeds the frame rate")
    assert "bidirectional attention" in report and "Frame rate: 24 a second" in report
    assert report.splitlines()[-1].startswith("AR Segment Sampler: mode diffusion forcing")


def test_metadata_that_says_causal_is_believed() -> None:
    finding = find_family(AUTO, BARE, CAUSAL_TOLD, "x.safetensors")
    assert finding.family == OTHER_CAUSAL and "metadata" in finding.reason


def test_a_moving_average_of_training_is_taken_for_causal_and_that_is_said() -> None:
    weights = read_wan(flatten(training_file(wan_weights(CAUSAL))))
    finding = find_family(AUTO, weights, {}, "self_forcing_dmd.pt")
    assert finding.family == OTHER_CAUSAL and "generator_ema" in finding.reason
    report, size = finding.report("self_forcing_dmd.pt", weights, 24), len(BARE.tensors)
    assert "set family to plain Wan if" in report and "under generator_ema.model" in report
    assert f"Left out: generator ({size} tensors), critic ({size} tensors)." in report.splitlines()


@pytest.mark.parametrize("prefix", ["", "model.", "generator.model.", "model.diffusion_model."])
def test_where_nothing_tells_the_family_is_asked_for(prefix) -> None:
    sentence = refusal(AUTO, read_wan(prefixed(wan_weights(CAUSAL), prefix)), {}, "model.safetensors")
    assert "2 blocks of 128 channels" in sentence and "neither its weights nor its metadata" in sentence
    assert all(name in sentence for name in FAMILIES) and "its name" not in sentence


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        (1536, [SELF_FORCING, CAUSAL_FORCING, CAUSVID, OTHER_CAUSAL, PLAIN]),
        (5120, [SKYREELS, KREA, OTHER_CAUSAL, PLAIN]),
    ],
)
def test_only_families_that_fit_the_size_are_offered(dim, expected) -> None:
    assert fitting(of_size(dim)) == expected
    sentence = refusal(AUTO, of_size(dim), {}, "x")
    assert all(name in sentence for name in expected) and (KREA in sentence) == (dim == 5120)


@pytest.mark.parametrize(
    ("file", "dim", "family"),
    [("krea-realtime-video-14b.safetensors", 5120, KREA), ("causvid.pt", 1536, CAUSVID),
     ("Wan2_1-SkyReels-V2-DF-14B-720P_fp16.safetensors", 5120, SKYREELS), ("self_forcing_dmd.pt", 1536, SELF_FORCING),
     ("causal_forcing-framewise.safetensors", 1536, CAUSAL_FORCING)],
)  # fmt: skip
def test_a_file_name_suggests_and_does_not_decide(file, dim, family) -> None:
    assert refusal(AUTO, of_size(dim), {}, file).endswith(f"(its name suggests {family})")


@pytest.mark.parametrize("choice", list(FAMILIES))
def test_a_choice_that_nothing_contradicts_is_taken(choice) -> None:
    assert find_family(choice, BARE, {}, "x").family == choice


@pytest.mark.parametrize(
    ("choice", "weights", "metadata", "said"),
    [
        *((name, TOLD, {}, "embeds the frame rate") for name in FAMILIES if name != SKYREELS),
        (SKYREELS, of_size(1536), {}, "lacks fps_embedding"),
        (SKYREELS, BARE, CAUSAL_TOLD, "metadata says causal_ar"),
        ("Wan", BARE, {}, "family is 'Wan'; use one of auto, "),
    ],
)
def test_a_choice_that_the_file_contradicts_is_refused(choice, weights, metadata, said) -> None:
    assert said in refusal(choice, weights, metadata, "x")


def test_a_model_that_reads_more_than_text_is_none_of_them() -> None:
    wide = wan_weights(CAUSAL)
    wide["patch_embedding.weight"] = torch.ones(128, 36, 1, 2, 2)
    weights = read_wan(wide)
    finding = find_family(AUTO, weights, {}, "x")
    assert finding.family == PLAIN and "It reads 36 channels" in finding.notes[0]
    for name in [*CAUSALS, SKYREELS]:
        assert "reads 36 channels" in refusal(name, weights, {}, "x")
    image = read_wan(wan_weights(CAUSAL) | {"img_emb.proj.0.bias": torch.ones(1)})
    assert "has img_emb" in refusal(SELF_FORCING, image, {}, "x")


def test_causal_models_of_other_latents_are_refused() -> None:
    assert "reads 4 channels; set family to plain Wan" in refusal(SELF_FORCING, read_wan(wan_weights(GOLDEN)), {}, "x")


def test_weights_that_the_host_does_not_know_are_named() -> None:
    stray = read_wan(wan_weights(CAUSAL) | {"_cls_pred_branch.0.weight": torch.ones(1)})
    said = ("ComfyUI does not know _cls_pred_branch and leaves that out.",)
    assert find_family(AUTO, stray, CAUSAL_TOLD, "x").notes == said
    assert find_family(SELF_FORCING, stray, {}, "x").notes == said


def test_another_size_than_published_is_said() -> None:
    assert "another size (5120)" in find_family(KREA, of_size(1536), {}, "x").notes[0]


def test_plain_overrules_metadata_and_says_so() -> None:
    assert "overrules" in find_family(PLAIN, BARE, CAUSAL_TOLD, "x").notes[0]
    assert "causal_ar" not in host_metadata(PLAIN, BARE, CAUSAL_TOLD)["config"]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_host_is_told_what_shapes_and_weights_do_not_say(family) -> None:
    told = host_metadata(family, BARE, {"format": "pt"})
    expected = {"text_dim": 64} | ({"causal_ar": True} if FAMILIES[family].causal else {})
    assert told["format"] == "pt" and json.loads(told["config"])["transformer"] == expected


def test_what_the_file_tells_the_host_is_kept() -> None:
    given = {"config": json.dumps({"transformer": {"num_heads": 2, "text_dim": 7}})}
    told = json.loads(host_metadata(SELF_FORCING, BARE, given)["config"])["transformer"]
    assert told == {"num_heads": 2, "text_dim": 7, "causal_ar": True}


def test_heads_that_cannot_be_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="48 channels, no multiple of 128.*num_heads"):
        host_metadata(SKYREELS, TOLD, {})


@pytest.mark.parametrize("config", ["{", "[]", '{"transformer": 3}', '"x"'])
def test_metadata_that_is_no_configuration_is_refused(config) -> None:
    assert "no JSON with a transformer" in refusal(AUTO, BARE, {"config": config}, "x")


@pytest.mark.parametrize(
    ("name", "said"),
    [("videodit_blocks.layers.0.self_attention.linear_qkv.q.weight", "MAGI-1"),
     ("model.blocks.0.action_model.keyboard_embed.0.weight", "Matrix-Game"),
     ("double_blocks.0.action_model.mouse_mlp.0.weight", "Matrix-Game"),
     ("clean_x_embedder.proj_4x.weight", "FramePack")],
)  # fmt: skip
def test_models_that_the_host_cannot_run_are_refused_with_the_way_out(name, said) -> None:
    sentence = foreign([name, "x_embedder.weight"])
    assert f"it is {said}," in sentence and "'Write an adapter' in the pack's README" in sentence


def test_wan_is_not_foreign() -> None:
    assert foreign(TOLD.tensors) is None


def test_every_family_says_what_to_set() -> None:
    assert (AUTO, *FAMILIES) == CHOICES
    assert all(family.sampler and not family.sampler.endswith(".") for family in FAMILIES.values())
