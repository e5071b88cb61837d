"""Named acceleration settings, a model each, with what was measured of them: the table ``presets.json`` in words.

The settings are written by hand; ``python -m bench.presets`` measures them in closed loop and rewrites the figures.
``measured`` is null where nobody has. A model that is not in the table gets the settings of the one in ``fallback``
that is sampled the same way, and the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from .correct import CorrectionConfig
from .engine import Acceleration, HistoryGuidedConfig, SchedulerConfig
from .policy import TriModalConfig

TABLE = Path(__file__).with_name("presets.json")
EXACT = "exact"
QUALITIES = (EXACT, "high", "balanced", "fast")
TARGET = "target"
DIGEST_LETTERS = 12
_THRESHOLDS = tuple(item.name for item in fields(TriModalConfig))
_NODES = {
    "history_guided": ("History-Guided Cache", {"delta": "threshold"}, ()),
    "scheduler": (
        "Tri-Modal Scheduler",
        {"tau_cache": "cache_below", "tau_predict": "predict_below"},
        ("guards", "quality"),
    ),
    "chunks": ("Chunk Cache", {"tau_cache": "cache_below", "tau_predict": "predict_below"}, ("guards", "last")),
    "frozen_window": ("Active Frame Window", {}, ("commit",)),
    "shared_prefix": ("Shared Prefix Cache", {}, ("commit",)),
    "correction": ("Residual Correction", {}, ("clamp", "sketch", "min_denominator", "segment0")),
}  # by part: its node, inputs with another name than the field, and fields without an input


@dataclass(frozen=True, slots=True)
class Measured:
    """What a preset did to one model: means over seeds, against the full run of the same seed.

    Attributes:
        flop_ratio: FLOPs of the full run over those of this one. psnr: dB, pooled over frames; None where every video
            was equal to its reference. ssim: mean over frames.
        seeds: how many seeds, each with a prompt of its own. date: ISO 8601. command: what measured it.
        weights: first letters of the SHA-256 of the checkpoint that was measured.
    """

    flop_ratio: float
    psnr: float | None
    ssim: float
    seeds: int
    date: str
    command: str
    weights: str


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of the table.

    Attributes:
        model: the embedded model it belongs to. name: ``high``, ``balanced``, ``fast`` or another.
        acceleration: what it sets. schedule: how the video was sampled when it was measured.
        measured: None where nobody has measured it.
    """

    model: str
    name: str
    acceleration: Acceleration
    schedule: str
    measured: Measured | None


class Presets:
    """The table, by model and name.

    Raises:
        ValueError: settings that the configs refuse. TypeError: a setting or a figure that does not exist.
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.fallback: Mapping[str, str] = table["fallback"]
        self.notes: Mapping[str, str] = table["notes"]
        self._rows = {
            (model, name): Preset(
                model, name, acceleration_of(row["settings"]), entry["schedule"],
                Measured(**row["measured"]) if row["measured"] else None,
            )
            for model, entry in table["models"].items()
            for name, row in entry["presets"].items()
        }  # fmt: skip

    def __iter__(self) -> Iterator[Preset]:
        return iter(self._rows.values())

    def knows(self, model: str | None) -> bool:
        """Whether the table has settings of its own for this model."""
        return any(model == name for name, _ in self._rows)

    def find(self, name: str, model: str | None, regime: str) -> Preset:
        """The preset for a model; for one that is not in the table, that of its regime's (``frames``, ``causal``)."""
        return self._rows[model if self.knows(model) else self.fallback[regime], name]

    def report(self, name: str, model: str | None, regime: str, weights: str | None = None) -> str:
        """A few lines: what ``name`` sets on a model, and on what measurement it rests.

        Args:
            name: one of ``QUALITIES``. model: the embedded model it is, None where it is another. regime: how it is
                sampled. weights: first letters of the SHA-256 of its checkpoint, None where not known.
        """
        if name == EXACT:
            return f"{EXACT}: no acceleration is set; every model call is computed."
        preset = self.find(name, model, regime)
        lines = [f"{name}, {described_model(model, preset)}", *words(preset.acceleration)]
        lines.append(_measurement(preset, self.knows(model), weights))
        return "\n".join([*lines, *filter(None, [self.notes.get(regime)])])


def acceleration_of(settings: Mapping[str, Mapping[str, Any]]) -> Acceleration:
    """The ``Acceleration`` that a row's ``settings`` name, its thresholds beside the scheduler's other fields."""
    parts: dict[str, Any] = {}
    for part, values in settings.items():
        if part == "scheduler":
            thresholds = TriModalConfig(**{key: value for key, value in values.items() if key in _THRESHOLDS})
            rest = {key: value for key, value in values.items() if key not in _THRESHOLDS}
            parts[part] = SchedulerConfig(thresholds, **rest)
        else:
            parts[part] = {"history_guided": HistoryGuidedConfig, "correction": CorrectionConfig}[part](**values)
    return Acceleration(**parts)


def quality_target(quality: float | str) -> Acceleration:
    """Decisions that hold a PSNR in dB, or a level of ``auto.QUALITIES``, on any model: see ``accel.auto``. The
    thresholds are found during the run; caps are wide because the predicted error is what limits a skip."""
    return Acceleration(
        scheduler=SchedulerConfig(TriModalConfig(0.0, 3.0, decay=1.0, max_skip=14), reach=4.0, quality=quality)
    )


def target_report(quality: float, regime: str) -> str:
    """What ``quality_target`` sets, in a few lines."""
    lines = [
        f"{TARGET}: {quality:g} dB PSNR to the video that {EXACT} makes, on any model.",
        "Every computed call is compared with what would have been predicted in its place; calls are skipped as long "
        "as the errors add up to no more. AR Timeline says what quality they predict.",
        "The errors that a run brings in are counted, not what later segments make of them: a single video can come "
        f"out several dB off, and a long one lower. Compare it with quality {EXACT} by Compare Runs.",
    ]
    return "\n".join([*lines, *filter(None, [PRESETS.notes.get(regime)])])


def words(acceleration: Acceleration) -> list[str]:
    """One line a part, as its node calls it: ``Tri-Modal Scheduler: cache_below 0, predict_below 3, ...``."""
    lines = []
    for part, (node, renamed, hidden) in _NODES.items():
        config = getattr(acceleration, part)
        if config is None:
            continue
        values = _values(config)
        values = _values(values.pop("thresholds", None)) | values
        shown = {renamed.get(key, key): value for key, value in values.items() if key not in hidden}
        lines.append(f"{node}: " + ", ".join(f"{name} {_plain(value)}" for name, value in shown.items()))
    return lines


def described_model(model: str | None, preset: Preset) -> str:
    """``for tiny-df``, or that the model is not measured here and whose settings it gets."""
    if model == preset.model:
        return f"for {model}"
    return f"for a model that is not measured here: the settings of {preset.model}, which is sampled the same way"


def digest(checkpoint: Path) -> str:
    """First letters of a checkpoint's SHA-256."""
    return sha256(checkpoint.read_bytes()).hexdigest()[:DIGEST_LETTERS]


def _measurement(preset: Preset, known: bool, weights: str | None) -> str:
    figures = preset.measured
    if figures is None:
        return f"Not measured yet on {preset.model} (python -m bench.presets measures it)."
    seeds = "1 seed" if figures.seeds == 1 else f"{figures.seeds} seeds"
    quality = (
        "the same video as" if figures.psnr is None else f"PSNR {figures.psnr:.1f} dB and SSIM {figures.ssim:.3f} to"
    )
    line = (
        f"Measured on {preset.model}: {figures.flop_ratio:.2f}x fewer FLOPs, {quality} the full run (mean of {seeds}, "
        f"{figures.date}, {figures.command}; {preset.schedule})."
    )
    if not known:
        return f"{line} Yours can differ: compare it with quality {EXACT}."
    if weights is not None and weights != figures.weights:
        return f"{line} These were other weights ({figures.weights}, not {weights}): measure again."
    return line


def _values(config: Any) -> dict[str, Any]:
    return {} if config is None else {item.name: getattr(config, item.name) for item in fields(config)}


def _plain(value: float | str | None) -> str:
    return "no limit" if value is None else value if isinstance(value, str) else f"{value:g}"


PRESETS = Presets(json.loads(TABLE.read_text(encoding="utf-8")))
MEASURED_ON = "tiny-df"
BALANCED, FAST, HISTORY_GUIDED = (
    PRESETS.find(name, MEASURED_ON, "frames").acceleration for name in ("balanced", "fast", "history-guided")
)
