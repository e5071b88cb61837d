"""A run in progress on disk, so that cancel, crash or power cut cost the segment being made and nothing before it.

One folder holds one run::

    run.json                     the manifest: what the run is, finished segments, digests of the files
    segment-00000.safetensors    ``latents`` [B, C, T, H, W], the new latent frames of one finished segment
    state-00006.safetensors      what six finished segments leave to the seventh (``run_state.RunState``)

Files are written whole or not at all, and the manifest last, so that at any moment it names only files that are there;
a run that is taken up from them makes bit by bit what it would have made. Nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from torch import Tensor

from .engine import Run
from .run_state import RunState
from .sampling import Segment
from .tensor_file import PARTIAL, read_json, read_tensors, write_json, write_tensors

VERSION = 1
MANIFEST = "run.json"
DIGEST = "sha256:"
REMEDY = "start the run anew and remove the folder"
_NAME = re.compile(r"(segment|state)-\d{5,9}\.safetensors")


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run in progress goes on with.

    Attributes:
        latents: of the finished segments, ``[B, C, T, H, W]`` on the host, as ``Segment.latents``.
        state: for ``Run.load``; None where no segment is finished.
    """

    latents: tuple[Tensor, ...] = ()
    state: RunState | None = None


class Checkpoint:
    """One run in progress in one folder; ``start`` a new one or ``open`` that of a run that was cut off.

    Attributes:
        folder: where it lies. description: everything that determines the result, as plain JSON; values that begin with
            ``DIGEST`` stand for content. notes: plain JSON of whoever keeps the checkpoint.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        self.folder, self.description = folder, dict(description)
        self.notes: dict[str, Any] = {}
        self._segments: list[dict[str, Any]] = []
        self._state: dict[str, Any] | None = None

    @classmethod
    def start(cls, folder: Path, description: Mapping[str, Any]) -> Checkpoint:
        """Begins a run in a new folder.

        Raises:
            ValueError: the folder holds a run already. OSError: it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            raise ValueError(f"Checkpoint: {folder} holds a run already; choose another folder, or resume that run.")
        checkpoint = cls(folder, description)
        checkpoint._publish()
        return checkpoint

    @classmethod
    def open(cls, folder: Path, description: Mapping[str, Any] | None = None) -> Checkpoint:
        """The run in a folder.

        Args:
            description: what it has to be; None takes any.

        Raises:
            ValueError: no run, one of another version or with other settings, or a manifest that is damaged or names
                what it must not.
        """
        try:
            manifest = read_json(folder / MANIFEST)
        except ValueError as error:
            raise ValueError(f"Checkpoint: {folder} cannot be resumed: {error}; {REMEDY}.") from None
        if manifest.get("version") != VERSION:
            raise ValueError(
                f"Checkpoint: {folder} has version {shorten(manifest.get('version'))}, this release reads {VERSION}; "
                "resume it with the release that wrote it, or start the run anew."
            )
        _check_manifest(folder, manifest)
        checkpoint = cls(folder, manifest["description"])
        checkpoint.notes = manifest["notes"]
        checkpoint._segments, checkpoint._state = manifest["segments"], manifest["state"]
        if description is not None and (changes := differences(checkpoint.description, description)):
            raise ValueError(
                f"Checkpoint: {folder} belongs to other settings: {'; '.join(changes)}; set them back to resume it."
            )
        return checkpoint

    @property
    def finished(self) -> int:
        """Segments whose latents are on disk."""
        return len(self._segments)

    @property
    def resumable(self) -> int:
        """Segments after which the run can go on: those that the last saved state comes after."""
        return self._state["after"] if self._state else 0

    def save(self, segment: Segment, state: RunState | None = None) -> None:
        """A segment was finished: writes its latents and, where given, the state after it.

        Raises:
            ValueError: not the next segment. OSError: the disk is full or cannot be written; what was there is still
                good.
        """
        if segment.index != self.finished:
            raise ValueError(f"Checkpoint: segment {segment.index} cannot follow {self.finished}; save them in order.")
        name = f"segment-{segment.index:05}.safetensors"
        entry = {"file": name, "start": segment.start, "end": segment.end}
        entry["digest"] = write_tensors(self.folder / name, {"latents": segment.latents})
        segments, kept = [*self._segments, entry], self._state
        if state is not None:
            after = segment.index + 1
            kept = {"file": f"state-{after:05}.safetensors", "after": after}
            kept["digest"] = write_tensors(self.folder / kept["file"], state.tensors, state.facts)
        self._publish(segments, kept)

    def note(self, **notes: Any) -> None:
        """Puts plain JSON into the manifest's notes."""
        self.notes |= notes
        self._publish()

    def load(self) -> Finished:
        """What the run goes on with; segments after the last saved state are forgotten and will be made again.

        Raises:
            ValueError: a file is missing or damaged.
        """
        keep = self.resumable
        latents = tuple(self._latents(entry) for entry in self._segments[:keep])
        state = RunState(*self._read(self._state)) if self._state else None
        self._publish(self._segments[:keep], self._state)
        return Finished(latents, state)

    def latents(self) -> Iterator[Segment]:
        """The finished segments one by one, those after the last saved state too.

        Raises:
            ValueError: a file is missing or damaged.
        """
        for index, entry in enumerate(self._segments):
            yield Segment(index, entry["start"], entry["end"], self._latents(entry))

    def remove(self) -> None:
        """Removes the run's files, the manifest first, and the folder where nothing else is in it."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        self._sweep(keep=())
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _publish(self, segments: list | None = None, state: dict[str, Any] | None = None) -> None:
        """Writes the manifest, with these files where given, then removes what it no longer names."""
        segments = self._segments if segments is None else segments
        state = state or self._state
        manifest = {"version": VERSION, "description": self.description, "notes": self.notes}
        write_json(self.folder / MANIFEST, manifest | {"segments": segments, "state": state})
        self._segments, self._state = segments, state
        self._sweep({entry["file"] for entry in (*segments, *([state] if state else []))})

    def _sweep(self, keep: Sequence[str] | set[str]) -> None:
        for path in self.folder.iterdir():
            name = path.name.removesuffix(PARTIAL)
            ours = name == MANIFEST or _NAME.fullmatch(name)
            if ours and (path.name.endswith(PARTIAL) or (name != MANIFEST and name not in keep)):
                path.unlink(missing_ok=True)

    def _latents(self, entry: Mapping[str, Any]) -> Tensor:
        tensors, _ = self._read(entry)
        if "latents" not in tensors:
            raise ValueError(f"Checkpoint: {self.folder / entry['file']} holds no latents; {REMEDY}.")
        return tensors["latents"]

    def _read(self, entry: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
        try:
            return read_tensors(self.folder / entry["file"], entry["digest"])
        except ValueError as error:
            raise ValueError(f"Checkpoint: {self.folder} cannot be resumed: {error}; {REMEDY}.") from None


def _check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises ValueError for a manifest that no release wrote, or that names files which are none of its own."""
    segments, state = manifest.get("segments"), manifest.get("state", ())
    dicts = (manifest.get("description"), manifest.get("notes"), {} if state is None else state)
    whole = isinstance(segments, list) and all(isinstance(value, dict) for value in (*dicts, *(segments or ())))
    if not whole:
        raise ValueError(f"Checkpoint: {folder} has a manifest that cannot be read; {REMEDY}.")
    end = None
    for index, entry in enumerate(segments):
        _check_file(folder, entry, f"segment-{index:05}.safetensors")
        start, last, end = entry.get("start"), end, entry.get("end")
        if not all(type(place) is int for place in (start, end)) or not 0 <= start < end or last not in (None, start):
            raise ValueError(
                f"Checkpoint: {folder} lists segment {index} from {shorten(start)} to {shorten(end)}; {REMEDY}."
            )
    if state is not None:
        after = state.get("after")
        if type(after) is not int or not 0 < after <= len(segments):
            raise ValueError(f"Checkpoint: {folder} lists {len(segments)} of {shorten(after)} segments; {REMEDY}.")
        _check_file(folder, state, f"state-{after:05}.safetensors")


def _check_file(folder: Path, entry: Mapping[str, Any], name: str) -> None:
    if entry.get("file") != name or not isinstance(entry.get("digest"), str) or (folder / name).is_symlink():
        raise ValueError(
            f"Checkpoint: {folder} names the file {shorten(entry.get('file'))}, which is none of its own; {REMEDY}."
        )


def saved(segments: Iterator[Segment], run: Run, checkpoint: Checkpoint, every: int = 1) -> Iterator[Segment]:
    """Hands on finished segments after their latents were saved, and the run's state after every ``every``-th.

    Raises:
        ValueError: ``every`` below 1.
    """
    if every < 1:
        raise ValueError(f"Checkpoint: every is {every}; save the state every 1 or more segments.")
    for segment in segments:
        checkpoint.save(segment, run.state() if (segment.index + 1) % every == 0 else None)
        yield segment


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two descriptions, one phrase for each value; digests are told as another content."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys((*then, *now))
        return [
            phrase
            for key in keys
            for phrase in differences(then.get(key), now.get(key), f"{name} {key}".strip())
        ]  # fmt: skip
    if then == now:
        return []
    if any(isinstance(value, str) and value.startswith(DIGEST) for value in (then, now)):
        return [f"{name} is another one"]
    return [f"{name} is {shorten(now)}, was {shorten(then)}"]
