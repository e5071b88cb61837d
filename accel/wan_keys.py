"""The weights of a Wan transformer under Wan's own names, whatever file they come from.

Files hold them bare, under a prefix (``model.diffusion_model.``, ``generator_ema.model.``), with the traces of how they
were trained (``_fsdp_wrapped_module.``), beside other networks of the training, or under the names that diffusers gave
them. Nothing is dropped in silence: what is not the transformer's is named in ``WanWeights.left_out``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}
PREFERRED = ("generator_ema", "ema", "generator", "student", "model", "diffusion_model", "transformer", "net", "")
OTHERS = {"critic", "fake_score", "real_score", "teacher", "discriminator"}
ORIGINAL, DIFFUSERS = "original", "diffusers"
ANCHORS = {ORIGINAL: "head.modulation", DIFFUSERS: "condition_embedder.time_proj.weight"}
FRAME_RATES = {16: 0, 24: 1}
FRAME_RATE_KEYS = (
    "fps_embedding.weight", "fps_projection.0.weight", "fps_projection.0.bias", "fps_projection.2.weight",
    "fps_projection.2.bias",
)  # fmt: skip
SCALES = ("scale_weight", "weight_scale")
PATCH = 4  # latent values of a channel in a token
VARIANTS = (
    "img_emb", "ref_conv", "vace_", "control_adapter", "casual_audio_encoder", "audio_", "face_adapter",
    "patch_embedding_", "cond_encoder", "trainable_cond_mask",
)  # fmt: skip
TOLD, LONGEST = 3, 80  # names in a sentence, characters of a name

_TOP = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "fps_embedding": "fps_embedding",
    "fps_projection.net.0.proj": "fps_projection.0",
    "fps_projection.net.2": "fps_projection.2",
    "proj_out": "head.head",
}
_BLOCK_NAMES = {
    **{f"attn1.to_{name}": f"self_attn.{name}" for name in "qkv"},
    **{f"attn2.to_{name}": f"cross_attn.{name}" for name in "qkv"},
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    **{f"attn1.norm_{name}": f"self_attn.norm_{name}" for name in "qk"},
    **{f"attn2.norm_{name}": f"cross_attn.norm_{name}" for name in "qk"},
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_PARAMETERS = {
    "scale_shift_table": "head.modulation",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
}
_BLOCK = re.compile(r"blocks\.(\d{1,6})\.")
_BLOCK_KEY = re.compile(r"(blocks\.\d+\.)(.+)")
_OWN = {
    "blocks", "head", "fps_embedding", "fps_projection", "time_embedding", "time_projection", "text_embedding",
    "patch_embedding", "scaled_fp8",
}  # fmt: skip
_OWN_BLOCK = {"self_attn", "cross_attn", "ffn", "norm3", "modulation"}
_FIRST_QUERIES = ("blocks.0.self_attn.q.weight", "blocks.0.attn1.to_q.weight")
_LINEAR = (
    "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1", "head.head",
    "patch_embedding",
)  # fmt: skip
_BLOCK_LINEAR = (*(f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"), "ffn.0", "ffn.2", "norm3")
_BLOCK_WEIGHTS = tuple(f"{part}_attn.norm_{name}" for part in ("self", "cross") for name in "qk")


@dataclass(frozen=True, slots=True)
class WanWeights:
    """A Wan transformer's weights.

    Attributes:
        tensors: by Wan's own names. layout: ``original`` or ``diffusers``, as the file had them.
        prefix: what stood before each name in the file. left_out: what else the file holds, with the number of tensors.
    """

    tensors: dict[str, Tensor]
    layout: str
    prefix: str
    left_out: dict[str, int]

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.tensors["head.modulation"].shape[-1]

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return len(_blocks(self.tensors))

    @property
    def channels(self) -> int:
        """Latent channels read: 16 for text-to-video of Wan 2.1, 36 where an image is concatenated."""
        return self.tensors["patch_embedding.weight"].shape[1]

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.tensors.values())

    @property
    def tells_frame_rate(self) -> bool:
        """Whether the model is told the frame rate, as the 1.3B model of SkyReels-V2 is."""
        return any(key.startswith(("fps_embedding.", "fps_projection.")) for key in self.tensors)

    @property
    def extras(self) -> dict[str, int]:
        """How many tensors lie under each name that a text-to-video transformer does not have."""
        counts: dict[str, int] = {}
        for key in self.tensors:
            name, *inside = key.split(".")
            strange = name not in _OWN
            if name == "blocks" and (not _BLOCK.match(key) or inside[1] not in _OWN_BLOCK):
                strange, name = True, f"blocks.{inside[min(1, len(inside) - 1)] if inside else ''}"
            if strange:
                counts[name] = counts.get(name, 0) + 1
        return counts

    @property
    def text_to_video(self) -> bool:
        """Whether nothing but text and noisy latents goes in."""
        same_channels = self.channels * PATCH == self.tensors["head.head.weight"].shape[0]
        return same_channels and not any(name.startswith(VARIANTS) for name in self.extras)


def flatten(tree: Any) -> dict[str, Tensor]:
    """The tensors of dicts within dicts, as training files have them, by their joined keys. Anything else in them
    (step counters, settings) is no weight."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(node, Tensor):
            yield path, node
        elif isinstance(node, Mapping):
            for key, value in node.items():
                yield from walk(value, f"{path}.{key}" if path else str(key))

    return dict(walk(tree, ""))


def read_wan(tensors: Mapping[str, Tensor]) -> WanWeights:
    """The Wan transformer of a file.

    Where a training file holds several, the moving average (``generator_ema``) counts more than the generator, and what
    only served the training (``critic``) is left out.

    Args:
        tensors: by the file's names (``flatten``).

    Raises:
        ValueError: no Wan transformer, several that are equally likely, or one that is not whole; a clause that says
            what is wrong.
    """
    names = {_unwrapped(key): key for key in tensors}
    if len(names) != len(tensors):
        twice = sorted(set(tensors) - set(names.values()))
        raise ValueError(f"it holds weights twice, as {_some(twice)} shows; save each once")
    layout, prefix = _place(names)
    found = {name[len(prefix) :]: tensors[key] for name, key in names.items() if name.startswith(prefix)}
    outside = [name for name in names if not name.startswith(prefix)]
    if layout == DIFFUSERS:
        found = from_diffusers(found)
    weights = WanWeights(found, layout, prefix, _groups(outside, prefix))
    absent = missing(found)
    if absent:
        raise ValueError(f"it is not whole, for it lacks {_some(absent)}; download it again")
    bent = [f"{name} {list(found[name].shape)}" for name, shape in _shapes(found) if found[name].shape != shape]
    if bent:
        raise ValueError(f"it has weights of impossible shapes ({_some(bent)}); download it again")
    return weights


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of diffusers' ``WanTransformer3DModel`` or ``SkyReelsV2Transformer3DModel`` by Wan's own names.

    Raises:
        ValueError: a name that has no counterpart.
    """
    renamed, unknown = {}, []
    for key, value in tensors.items():
        name = _original_name(key)
        if name is None:
            unknown.append(key)
        elif name:
            renamed[name] = value
    if unknown:
        raise ValueError(
            f"it is in diffusers' layout with weights that Wan does not have ({_some(unknown)}); use a file in Wan's "
            "own layout"
        )
    return renamed


def missing(tensors: Collection[str]) -> list[str]:
    """Names that a Wan transformer needs and ``tensors`` does not have."""
    blocks = _blocks(tensors)
    wanted = ["head.modulation", *(f"{name}.{part}" for name in _LINEAR for part in ("weight", "bias"))]
    for block in sorted(blocks | set(range(max(len(blocks), 1)))):
        wanted.append(f"blocks.{block}.modulation")
        wanted += [f"blocks.{block}.{name}.{part}" for name in _BLOCK_LINEAR for part in ("weight", "bias")]
        wanted += [f"blocks.{block}.{name}.weight" for name in _BLOCK_WEIGHTS]
    if any(key.startswith("fps_") for key in tensors):
        wanted += FRAME_RATE_KEYS
    return [name for name in wanted if name not in tensors]


def fold_frame_rate(tensors: Mapping[str, Tensor], fps: int) -> dict[str, Tensor]:
    """A Wan transformer for one frame rate, without the embedding that tells it.

    SkyReels-V2 adds ``fps_projection(fps_embedding[class])`` to the output of ``time_projection``, whatever the noise
    level, so it can as well be a part of that layer's bias. Computed in float64 and rounded once, to the bias' dtype.

    Args:
        fps: 16 or 24; the model knows 16 and everything else.

    Raises:
        ValueError: another frame rate.
    """
    if fps not in FRAME_RATES:
        raise ValueError(f"fps is {fps}; use one of {', '.join(map(str, FRAME_RATES))}")
    told = {key: _exact(tensors, key) for key in FRAME_RATE_KEYS}
    embedded = told["fps_embedding.weight"][FRAME_RATES[fps]]
    hidden = F.silu(F.linear(embedded, told["fps_projection.0.weight"], told["fps_projection.0.bias"]))
    shift = F.linear(hidden, told["fps_projection.2.weight"], told["fps_projection.2.bias"])
    folded = {key: value for key, value in tensors.items() if not key.startswith(("fps_embedding.", "fps_projection."))}
    bias = tensors["time_projection.1.bias"]
    folded["time_projection.1.bias"] = (bias.double() + shift).to(bias.dtype if bias.itemsize > 1 else torch.bfloat16)
    return folded


def _exact(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """A weight in float64, times its scale where it is quantised to one."""
    module, _, part = key.rpartition(".")
    value = tensors[key].double()
    scale = next((tensors[f"{module}.{name}"] for name in SCALES if f"{module}.{name}" in tensors), None)
    return value if scale is None or part != "weight" else value * scale.double()


def _blocks(names: Collection[str]) -> set[int]:
    """Numbers of the transformer blocks."""
    return {int(found[1]) for found in map(_BLOCK.match, names) if found}


def _shapes(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes that must be right for the others to be read from them; those of quantised weights are not known."""
    modulation, patches = tensors["head.modulation"].shape, tensors["patch_embedding.weight"].shape
    dim = modulation[-1] if modulation else 0
    yield "head.modulation", (1, 2, dim)
    yield "patch_embedding.weight", (dim, *(patches[1:2] or (0,)), 1, 2, 2)
    yield "head.head.bias", (*tensors["head.head.weight"].shape[:1],)
    yield "time_projection.1.bias", (6 * dim,)
    if "fps_embedding.weight" in tensors:
        yield "fps_embedding.weight", (2, dim)
        yield "fps_projection.0.weight", (dim, dim)
        yield "fps_projection.0.bias", (dim,)
        yield "fps_projection.2.weight", (6 * dim, dim)
        yield "fps_projection.2.bias", (6 * dim,)


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _place(names: Collection[str]) -> tuple[str, str]:
    """Layout and prefix of the transformer to take."""
    places = [
        (layout, name[: -len(anchor)])
        for layout, anchor in ANCHORS.items()
        for name in names
        if name == anchor or name.endswith(f".{anchor}")
    ]
    if not places and any(name.endswith(_FIRST_QUERIES) for name in names):
        raise ValueError(f"it is not whole, for it lacks {' or '.join(ANCHORS.values())}; download it again")
    if not places:
        raise ValueError(
            f"it holds no Wan transformer (its weights are {_some(sorted(names))}); other models load with core's Load "
            "Diffusion Model"
        )
    places = [place for place in places if not OTHERS & set(place[1].split("."))] or places
    best = min(_rank(prefix) for _, prefix in places)
    likely = [place for place in places if _rank(place[1]) == best]
    if len(likely) > 1:
        under = ", ".join(prefix or "no name" for _, prefix in likely)
        raise ValueError(f"it holds several transformers (under {under}); save the one to load in a file of its own")
    return likely[0]


def _rank(prefix: str) -> int:
    parts = set(prefix.split("."))
    return next((rank for rank, name in enumerate(PREFERRED) if name in parts), len(PREFERRED))


def _groups(names: Collection[str], prefix: str) -> dict[str, int]:
    """How many tensors lie under each first name that is not the transformer's."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        group = ".".join(parts[:2]) if prefix.startswith(f"{parts[0]}.") else parts[0]
        counts[group] = counts.get(group, 0) + 1
    return counts


def _original_name(key: str) -> str | None:
    """Wan's name of a weight in diffusers' layout; empty for one that is not used, None for an unknown one."""
    if "norm_added_q" in key:
        return ""
    if key in _PARAMETERS:
        return _PARAMETERS[key]
    block = _BLOCK_KEY.fullmatch(key)
    place, rest = block.groups() if block else ("", key)
    if block and rest == "scale_shift_table":
        return f"{place}modulation"
    module, _, part = rest.rpartition(".")
    known = (_BLOCK_NAMES if block else _TOP).get(module)
    return None if known is None else f"{place}{known}.{part}"


def _some(names: Collection[str]) -> str:
    shown = [" ".join(name.split())[:LONGEST] for name in list(names)[:TOLD]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
