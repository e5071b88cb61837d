"""Which autoregressive video model a Wan checkpoint is, and what that means for sampling it.

All of them are Wan 2.1 transformers; what tells them apart is mostly how they were trained, which the weights do not
say. Where they do not, the question is asked instead of answered.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .wan_keys import WanWeights

AUTO = "auto"
SKYREELS, SELF_FORCING, CAUSAL_FORCING = "SkyReels-V2 DF", "Self-Forcing", "Causal-Forcing"
CAUSVID, KREA, OTHER_CAUSAL, PLAIN = "CausVid", "Krea Realtime", "other causal Wan", "plain Wan"
HEAD_DIM, CHANNELS = 128, 16  # of an attention head, and of Wan 2.1's latents
SMALL, LARGE = 1536, 5120  # channels of a token of Wan 2.1's 1.3B and 14B models
ADAPTER = "drive it through an adapter, as 'Write an adapter' in the pack's README shows"


@dataclass(frozen=True, slots=True)
class Family:
    """One way of training a Wan transformer to make video piece by piece.

    Attributes:
        causal: whether it was trained with causal attention, for a K/V store. dims: channels of a token of its
            published models; empty where any is possible. shift: flow shift it was trained with; None where the host
            has the right one. hints: parts of file names that suggest it.
        sampler: what the AR Segment Sampler is to be set to, as its authors have it.
    """

    causal: bool
    dims: tuple[int, ...] = ()
    shift: float | None = None
    hints: tuple[str, ...] = ()
    sampler: str = ""


FAMILIES = {
    SKYREELS: Family(
        False, (SMALL, LARGE), 8.0, ("skyreels-v2-df", "skyreels_v2_df", "diffusion-forcing"),
        "mode diffusion forcing, segment 25, overlap 5, block 5, ar_step 5 (or block 1, ar_step 0), solver unipc, "
        "30 to 50 steps, cfg 6, shift 8, history_noise 0.02",
    ),
    SELF_FORCING: Family(
        True, (SMALL,), 5.0, ("self_forcing", "self-forcing", "selfforcing"),
        "mode causal blocks, block 3, 4 steps, cfg 1, shift 5",
    ),
    CAUSAL_FORCING: Family(
        True, (SMALL,), 5.0, ("causal_forcing", "causal-forcing", "causalforcing"),
        "mode causal blocks, block 3 (chunkwise) or 1 (framewise), 4 steps, cfg 1, shift 5",
    ),
    CAUSVID: Family(
        True, (SMALL,), 8.0, ("causvid",),
        "mode causal blocks, block 3, sigmas 1, 0.757, 0.522, 0 (or 4 steps with shift 8 for its warp_4step files), "
        "cfg 1",
    ),
    KREA: Family(
        True, (LARGE,), 5.0, ("krea-realtime", "krea_realtime"), "mode causal blocks, block 3, 4 steps, cfg 1, shift 5"
    ),
    OTHER_CAUSAL: Family(True, sampler="mode causal blocks, block, steps and shift as the model was trained, cfg 1"),
    PLAIN: Family(
        False, sampler="for models trained with diffusion forcing or clip after clip; others go with core's samplers"
    ),
}  # fmt: skip
CHOICES = (AUTO, *FAMILIES)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a checkpoint was taken for.

    Attributes:
        family: a key of ``FAMILIES``. reason: why, as a clause. notes: sentences that its user should know.
    """

    family: str
    reason: str
    notes: tuple[str, ...] = ()

    def report(self, file: str, weights: WanWeights, fps: int) -> str:
        """The finding, what the file holds and what the sampler is to be set to, a few lines."""
        attention = "causal" if FAMILIES[self.family].causal else "bidirectional"
        place = f", under {weights.prefix.removesuffix('.')}" if weights.prefix else ""
        lines = [
            f"{file}: {self.family}, because {self.reason}.",
            f"Wan transformer with {attention} attention, {weights.parameters / 1e9:.2f} billion weights in "
            f"{weights.layers} blocks of {weights.dim} channels, {weights.layout} layout{place}.",
        ]
        if weights.tells_frame_rate:
            lines.append(f"Frame rate: {fps} a second, now part of time_projection's bias.")
        if weights.left_out:
            outside = ", ".join(f"{name} ({count} tensors)" for name, count in weights.left_out.items())
            lines.append(f"Left out: {outside}.")
        lines += self.notes
        lines.append(f"AR Segment Sampler: {FAMILIES[self.family].sampler}.")
        return "\n".join(lines)


def foreign(names: Collection[str]) -> str | None:
    """Why a checkpoint is none that the host can run, as a clause with a remedy; None where nothing says so."""
    parts = {part for name in names for part in name.split(".")}
    if "videodit_blocks" in parts:
        return (
            "it is MAGI-1, whose transformer (attention in parallel, learned rotary bands, a text encoder of its own) "
            f"ComfyUI does not have; {ADAPTER}"
        )
    if "action_model" in parts:
        return (
            "it is Matrix-Game, which is steered by keyboard and mouse through action modules that ComfyUI's "
            f"transformers do not have; {ADAPTER}"
        )
    if "clean_x_embedder" in parts:
        return (
            f"it is FramePack, a HunyuanVideo that packs its history through embedders ComfyUI does not have; {ADAPTER}"
        )
    return None


def transformer_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file's metadata tells the host about its transformer.

    Raises:
        ValueError: it is no JSON of the right form; a clause.
    """
    try:
        told = json.loads(metadata.get("config", "{}")).get("transformer", {})
    except (json.JSONDecodeError, AttributeError, TypeError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise ValueError(f"its metadata entry config is no JSON with a transformer: {metadata['config'][:60]!r}")
    return told


def host_metadata(family: str, weights: WanWeights, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata that ComfyUI needs beside the weights: whether attention is causal, and sizes it would take for
    granted (it derives the others from shapes).

    Raises:
        ValueError: the number of heads is not known; a clause.
    """
    told = transformer_config(metadata)
    told.pop("causal_ar", None)
    if FAMILIES[family].causal:
        told["causal_ar"] = True
    if "num_heads" not in told and weights.dim % HEAD_DIM:
        raise ValueError(
            f"it has {weights.dim} channels, no multiple of {HEAD_DIM}, and its metadata entry config does not give "
            "num_heads; save it with that"
        )
    for name, layer, usual in (("text_dim", "text_embedding.0", 4096), ("freq_dim", "time_embedding.0", 256)):
        weight = weights.tensors[f"{layer}.weight"]
        if weight.dtype.is_floating_point and weight.ndim == 2 and weight.shape[1] != usual:
            told.setdefault(name, weight.shape[1])
    return dict(metadata) | {"config": json.dumps({"transformer": told})}


def find_family(choice: str, weights: WanWeights, metadata: Mapping[str, str], file: str) -> Finding:
    """What to take a Wan checkpoint for.

    Args:
        choice: ``auto`` or a key of ``FAMILIES``. metadata: of the file. file: its name, which may suggest something
            but decides nothing.

    Raises:
        ValueError: the weights contradict the choice, or with ``auto`` do not tell; a clause with the remedy.
    """
    if choice not in CHOICES:
        raise ValueError(f"family is {choice!r}; use one of {', '.join(CHOICES)}")
    causal = bool(transformer_config(metadata).get("causal_ar"))
    finding = _found(weights, metadata, causal, file) if choice == AUTO else _chosen(choice, weights, causal)
    if weights.extras and weights.text_to_video:
        note = f"ComfyUI does not know {', '.join(weights.extras)} and leaves that out."
        finding = replace(finding, notes=(*finding.notes, note))
    return finding


def _found(weights: WanWeights, metadata: Mapping[str, str], causal_told: bool, file: str) -> Finding:
    if weights.tells_frame_rate:
        note = () if weights.text_to_video else (_other_inputs(weights),)
        return Finding(SKYREELS, "it embeds the frame rate, as the 1.3B model of SkyReels-V2 does", note)
    if causal_told:
        return Finding(OTHER_CAUSAL, "its metadata says causal_ar")
    if "tiny" in metadata:
        return Finding(PLAIN, "its metadata says that it is one of the embedded tiny models")
    if not weights.text_to_video:
        return Finding(PLAIN, "it reads more than text", (_other_inputs(weights),))
    if "generator_ema" in weights.prefix.split("."):
        note = (
            "The trainers of Self-Forcing and Causal-Forcing write generator_ema, so the model is taken for a causal "
            "one; set family to plain Wan if it was trained with bidirectional attention."
        )
        return Finding(OTHER_CAUSAL, "its weights lie under generator_ema", (note,))
    raise ValueError(_question(weights, file))


def _chosen(choice: str, weights: WanWeights, causal_told: bool) -> Finding:
    family, notes = FAMILIES[choice], []
    if weights.tells_frame_rate and choice != SKYREELS:
        raise ValueError(
            f"family is {choice}, but it embeds the frame rate, as SkyReels-V2 DF does; set family to {SKYREELS} or "
            "auto"
        )
    if choice == SKYREELS and not weights.tells_frame_rate and weights.dim == SMALL:
        raise ValueError(
            f"family is {SKYREELS}, but it lacks fps_embedding and fps_projection, which the 1.3B model has; use the "
            "original file or one that keeps them, or another family"
        )
    if choice == SKYREELS and causal_told:
        raise ValueError(f"family is {SKYREELS}, but its metadata says causal_ar; set family to auto or a causal one")
    if (choice != PLAIN and not weights.text_to_video) or (family.causal and weights.channels != CHANNELS):
        raise ValueError(f"family is {choice}, but {_reads(weights)}; set family to {PLAIN}")
    if choice == PLAIN and causal_told:
        notes.append("Its metadata says causal_ar, which family plain Wan overrules.")
    if family.dims and weights.dim not in family.dims and weights.dim in (SMALL, LARGE):
        notes.append(f"The published models of {choice} have another size ({' or '.join(map(str, family.dims))}).")
    return Finding(choice, "family was chosen", tuple(notes))


def fitting(weights: WanWeights) -> list[str]:
    """Families that a text-to-video checkpoint without further signs may belong to."""
    size = weights.dim
    return [
        name
        for name, family in FAMILIES.items()
        if not family.dims or size not in (SMALL, LARGE) or (size in family.dims and (name, size) != (SKYREELS, SMALL))
    ]


def _question(weights: WanWeights, file: str) -> str:
    choices, lower = fitting(weights), file.lower()
    hint = next((name for name in choices if any(part in lower for part in FAMILIES[name].hints)), None)
    guess = f" (its name suggests {hint})" if hint else ""
    return (
        f"it is a Wan text-to-video transformer with {weights.layers} blocks of {weights.dim} channels, and neither "
        f"its weights nor its metadata tell how it was trained; set family to {', '.join(choices[:-1])} or "
        f"{choices[-1]}{guess}"
    )


def _reads(weights: WanWeights) -> str:
    more = ", ".join(weights.extras)
    return f"it reads {weights.channels} channels" + (f" and has {more}" if more else "")


def _other_inputs(weights: WanWeights) -> str:
    reads = _reads(weights)
    return f"{reads[0].upper()}{reads[1:]}, so the AR Segment Sampler, which gives text alone, cannot sample it."
