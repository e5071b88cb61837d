"""A Wan transformer's weights come out the same whatever file they lay in, and nothing of a file is lost in silence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.wan_keys import DIFFUSERS, ORIGINAL, flatten, fold_frame_rate, from_diffusers, missing, read_wan
from demo.model import TinyWan
from tests.miniatures import (
    CAUSAL,
    GOLDEN,
    UnfoldedWan,
    diffusers_layout,
    prefixed,
    training_file,
    wan_weights,
)

PREFIXES = (
    "", "model.", "diffusion_model.", "model.diffusion_model.", "generator.", "generator_ema.", "generator_ema.model.",
    "transformer.", "net.",
)  # fmt: skip
WRAPPED = ("model._fsdp_wrapped_module.", "_orig_mod.model.", "module.model._fsdp_wrapped_module._orig_mod.")
PLAIN, TOLD = wan_weights(CAUSAL), wan_weights(GOLDEN, frame_rate=True)


def same(found, weights) -> bool:
    return found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize("layout", [ORIGINAL, DIFFUSERS])
@pytest.mark.parametrize("prefix", [*PREFIXES, *WRAPPED])
def test_every_prefix_and_layout_gives_the_same_weights(prefix, layout) -> None:
    file = prefixed(diffusers_layout(TOLD) if layout == DIFFUSERS else TOLD, prefix)
    found = read_wan(file)
    assert same(found.tensors, TOLD) and found.layout == layout and found.left_out == {}
    assert "_fsdp_wrapped_module" not in found.prefix and found.prefix in PREFIXES
    assert (found.dim, found.layers, found.channels, found.tells_frame_rate) == (48, 2, 4, True)
    assert found.text_to_video and found.parameters == sum(value.numel() for value in TOLD.values())


def test_wrappers_inside_a_name_are_dropped_too() -> None:
    file = {f"model.{key.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.')}": PLAIN[key] for key in PLAIN}
    assert same(read_wan(file).tensors, PLAIN)


def test_of_a_training_file_the_moving_average_is_taken_and_the_rest_is_named() -> None:
    found = read_wan(flatten(training_file(PLAIN, "model._fsdp_wrapped_module.")))
    assert same(found.tensors, PLAIN) and found.prefix == "generator_ema.model."
    assert found.left_out == {"generator": len(PLAIN), "critic": len(PLAIN)}
    without = read_wan(flatten(training_file(PLAIN, ema=False)))
    assert same(without.tensors, PLAIN) and without.left_out == {"critic": len(PLAIN)}


def test_what_else_a_checkpoint_holds_is_named() -> None:
    file = prefixed(PLAIN, "model.diffusion_model.") | {"first_stage_model.conv.weight": torch.ones(2)}
    assert read_wan(file).left_out == {"first_stage_model": 1}
    beside = prefixed(PLAIN, "generator.model.") | {"generator._cls_pred_branch.0.weight": torch.ones(2)}
    assert read_wan(beside).left_out == {"generator._cls_pred_branch": 1}


def test_every_tensor_of_a_file_is_taken_or_named() -> None:
    for file in (
        flatten(training_file(PLAIN)),
        prefixed(TOLD, "net.") | {"x.y": torch.ones(1)},
        diffusers_layout(TOLD),
    ):
        found = read_wan(file)
        assert len(found.tensors) + sum(found.left_out.values()) == len(file)


@given(st.sampled_from(sorted(PLAIN)))
def test_a_file_that_lacks_a_weight_is_refused_by_its_name(key) -> None:
    file = {name: value for name, value in PLAIN.items() if name != key}
    assert missing(file) == [key]
    with pytest.raises(ValueError, match="it is not whole"):
        read_wan(file)


def test_a_block_in_the_middle_is_missed() -> None:
    file = {key: value for key, value in PLAIN.items() if not key.startswith("blocks.0.")}
    with pytest.raises(ValueError, match="it lacks blocks.0.modulation, .* and 24 more; download it again"):
        read_wan(file)


@pytest.mark.parametrize(
    ("name", "told"),
    [("blocks.1000000.a.weight", "blocks.a"), ("blocks.x.weight", "blocks.weight"), ("blocks", "blocks."),
     ("blocks.0.lora.weight", "blocks.lora"), ("extra.weight", "extra")],
)  # fmt: skip
def test_a_strange_name_does_no_harm_and_is_told(name, told) -> None:
    found = read_wan(PLAIN | {name: torch.ones(1)})
    assert found.layers == 2 and found.extras == {told: 1} and read_wan(PLAIN).extras == {}


SHAPED = (
    "head.modulation", "patch_embedding.weight", "head.head.weight", "time_projection.1.bias", "fps_embedding.weight",
    "fps_projection.0.weight", "fps_projection.2.bias",
)  # fmt: skip


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 3, 4, 5)])
def test_a_weight_of_an_impossible_shape_is_refused(name, shape) -> None:
    with pytest.raises(ValueError, match="impossible shapes .*; download it again"):
        read_wan(TOLD | {name: torch.ones(shape)})


def test_long_names_are_cut_in_a_sentence() -> None:
    with pytest.raises(ValueError) as raised:
        read_wan({"a" * 500 + "\n b": torch.ones(1)})
    assert len(str(raised.value)) < 250 and "\n" not in str(raised.value)


def test_several_transformers_that_are_equally_likely_are_refused() -> None:
    with pytest.raises(ValueError, match=r"several transformers \(under a.b., c.d.\); save the one"):
        read_wan(prefixed(PLAIN, "a.b.") | prefixed(PLAIN, "c.d."))
    with pytest.raises(ValueError, match="weights twice"):
        read_wan(PLAIN | prefixed(PLAIN, "_orig_mod."))


def test_other_models_are_refused_with_some_of_their_names() -> None:
    with pytest.raises(ValueError, match=r"no Wan transformer \(its weights are img_in.proj.weight"):
        read_wan({"img_in.proj.weight": torch.ones(1)})


def test_diffusers_weights_without_a_counterpart_are_refused() -> None:
    file = diffusers_layout(PLAIN) | {"blocks.0.attn3.to_q.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="weights that Wan does not have .blocks.0.attn3.to_q.weight.;"):
        from_diffusers(file)
    unused = diffusers_layout(PLAIN) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(1)}
    assert same(from_diffusers(unused), PLAIN)


IMAGE = {
    "condition_embedder.image_embedder.norm1.weight": "img_emb.proj.0.weight",
    "condition_embedder.image_embedder.ff.net.0.proj.bias": "img_emb.proj.1.bias",
    "condition_embedder.image_embedder.ff.net.2.weight": "img_emb.proj.3.weight",
    "condition_embedder.image_embedder.norm2.bias": "img_emb.proj.4.bias",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "blocks.3.attn2.add_k_proj.bias": "blocks.3.cross_attn.k_img.bias",
    "blocks.3.attn2.add_v_proj.weight": "blocks.3.cross_attn.v_img.weight",
    "blocks.3.attn2.norm_added_k.weight": "blocks.3.cross_attn.norm_k_img.weight",
}


@pytest.mark.parametrize(("theirs", "ours"), IMAGE.items())
def test_image_to_video_has_wans_names_too(theirs, ours) -> None:
    assert list(from_diffusers({theirs: torch.ones(1)})) == [ours]


def test_what_is_no_tensor_is_no_weight() -> None:
    assert flatten({"a": {"b": torch.ones(1), "step": 3}, "note": "x"}).keys() == {"a.b"}
    assert flatten([torch.ones(1)]) == {} and flatten(torch.ones(1)).keys() == {""}


@pytest.mark.parametrize(("fps", "rate_class"), [(16, 0), (24, 1)])
def test_a_folded_frame_rate_answers_as_the_embedding_does(fps, rate_class) -> None:
    folded = TinyWan(GOLDEN).eval().requires_grad_(False)
    folded.load_state_dict(fold_frame_rate(TOLD, fps))
    x, text = torch.randn(1, 4, 3, 4, 6), torch.randn(1, 8, 32)
    levels = torch.tensor([[0.1, 0.5, 0.9]])
    told = UnfoldedWan(GOLDEN, TOLD, rate_class)
    assert float((folded(x, levels, text) - told(x, levels, text)).abs().max()) < 1e-5
    other = UnfoldedWan(GOLDEN, TOLD, 1 - rate_class)
    assert float((folded(x, levels, text) - other(x, levels, text)).abs().max()) > 1e-3


def test_folding_rounds_once_and_leaves_everything_else_as_it_is() -> None:
    half = {key: value.bfloat16() for key, value in TOLD.items()}
    folded = fold_frame_rate(half, 24)
    bias = "time_projection.1.bias"
    exact = fold_frame_rate({key: value.double() for key, value in half.items()}, 24)[bias]
    assert folded[bias].dtype == torch.bfloat16 and torch.equal(folded[bias], exact.bfloat16())
    assert folded.keys() == {key for key in half if not key.startswith("fps_")}
    assert all(folded[key] is half[key] for key in folded if key != bias)
    assert torch.equal(half[bias], TOLD[bias].bfloat16())


def test_weights_that_are_quantised_to_a_scale_are_folded_at_their_size() -> None:
    scale = torch.tensor(0.5)
    small = TOLD | {"fps_projection.2.weight": TOLD["fps_projection.2.weight"] / scale}
    small |= {"fps_projection.2.scale_weight": scale}
    bias = "time_projection.1.bias"
    assert torch.allclose(fold_frame_rate(small, 16)[bias], fold_frame_rate(TOLD, 16)[bias], atol=1e-6)


def test_a_frame_rate_that_the_model_is_not_told_is_refused() -> None:
    with pytest.raises(ValueError, match="fps is 30; use one of 16, 24"):
        fold_frame_rate(TOLD, 30)
    with pytest.raises(ValueError, match="lacks fps_projection.2.bias;"):
        read_wan({key: value for key, value in TOLD.items() if key != "fps_projection.2.bias"})
