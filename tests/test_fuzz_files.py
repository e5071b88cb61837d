"""Whatever became of a file that is read, it gives what was written or a sentence; nothing else is touched."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel.checkpoint import DIGEST, MANIFEST, Checkpoint, saved
from accel.correct import CorrectionConfig
from accel.engine import Acceleration, HistoryGuidedConfig, SchedulerConfig
from accel.run_state import RunState
from accel.sampling import SegmentPlan, diffusion_forcing
from accel.schedule import flow_sigmas
from accel.tensor_file import read_json, read_tensors, write_json, write_tensors
from accel.timeline import Timeline
from demo.codec import TinyCodec
from demo.model import TinyConfig, TinyWan, load_model, save_model
from headless.run_workflow import WORKFLOW, WorkflowFailed, changed, read_workflow
from tests.fakes import make_run
from tests.fuzzing import altered, assert_sentence, counted, damaged

PLAN = SegmentPlan(frames=8, segment=4, overlap=2, block=2, ar_step=1, steps=4)
DESCRIPTION = {"model": "smooth", "plan": {"steps": 4}, "noise": DIGEST + "0"}
ACCELERATION = Acceleration(
    HistoryGuidedConfig(0.3), SchedulerConfig(quality=30.0), correction=CorrectionConfig("seg1_l1", sketch=8)
)
SECONDS = 30.0
quiet = settings(suppress_health_check=list(HealthCheck))


@contextmanager
def judged(test: str, sentence: bool = True):
    """Counts a case; the one exception that may leave it is a ValueError, in a sentence where ``sentence``."""
    began = time.perf_counter()
    try:
        yield
    except ValueError as error:
        counted(test, "refused")
        assert not isinstance(error, UnicodeError | json.JSONDecodeError), repr(error)
        if sentence:
            assert_sentence(str(error))
    else:
        counted(test, "read")
    assert time.perf_counter() - began < SECONDS


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of three segments of a run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpoint = Checkpoint.start(folder, DESCRIPTION)
    run = make_run(ACCELERATION)
    noise = torch.randn(1, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    segments = saved(diffusion_forcing(run, noise, PLAN, flow_sigmas(4)), run, checkpoint)
    next(segments), next(segments)
    checkpoint.note(video={"settings": ["mp4", 16.0, 4], "files": ["a.mp4"], "ends": [{"sizes": [1], "frames": 4}]})
    return folder


@pytest.fixture(scope="module")
def state(run_folder: Path) -> RunState:
    return Checkpoint.open(run_folder).load().state


@quiet
@given(data=st.data())
def test_json_with_a_checksum_is_what_was_written_or_refused(tmp_path_factory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "facts.json"
    facts = {"version": 1, "numbers": [1, 2.5, None], "text": "ä", "deep": {"a": [{}]}}
    write_json(path, facts)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with judged("JSON with a checksum", sentence=False):
        assert read_json(path) == facts


@quiet
@given(data=st.data())
def test_tensors_with_a_digest_are_what_was_written_or_refused(tmp_path_factory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "state.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True])}
    digest = write_tensors(path, tensors, {"facts": 1})
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    if data.draw(st.booleans()):  # a digest of the damaged file: what its author meant to write
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with judged("tensors with a forged digest", sentence=False):
            read_tensors(path, digest)
        return
    with judged("tensors with a digest", sentence=False):
        read, facts = read_tensors(path, digest)
        assert facts == {"facts": 1} and all(torch.equal(read[name], tensors[name]) for name in tensors)


@quiet
@given(data=st.data())
def test_a_damaged_run_is_resumed_as_it_was_or_refused(run_folder: Path, tmp_path_factory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(run_folder, folder)
    whole = contents(folder)
    name = data.draw(st.sampled_from(sorted(whole)))
    change = data.draw(st.sampled_from(("bytes", "bytes", "bytes", "gone", "folder", "swapped")))
    if change == "bytes":
        (folder / name).write_bytes(data.draw(damaged(whole[name])))
    else:
        (folder / name).unlink()
        if change == "folder":
            (folder / name).mkdir()
        if change == "swapped":
            (folder / name).write_bytes(whole[data.draw(st.sampled_from(sorted(whole)))])
    before = contents(folder)
    try:
        with judged("run folders"):
            finished = Checkpoint.open(folder, DESCRIPTION).load()
            assert len(finished.latents) == 2 and contents(folder).keys() == whole.keys()
            assert all(contents(folder)[name] == whole[name] for name in whole if name != MANIFEST)
            return
        assert contents(folder) == before
    finally:
        shutil.rmtree(folder.parent)


@quiet
@given(data=st.data())
def test_a_manifest_of_any_content_is_read_or_refused(run_folder: Path, tmp_path_factory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("manifest") / "run"
    shutil.copytree(run_folder, folder)
    outside = folder.with_name("segment-00000.safetensors")
    outside.write_bytes(b"of somebody else")
    manifest = read_json(folder / MANIFEST)
    changed = data.draw(altered(manifest))
    if isinstance(changed, dict):
        write_json(folder / MANIFEST, changed)
    else:
        (folder / MANIFEST).write_text(json.dumps(changed))
    try:
        with judged("manifests"):
            checkpoint = Checkpoint.open(folder, DESCRIPTION)
            checkpoint.load()
            list(checkpoint.latents())
            checkpoint.remove()
        assert outside.read_bytes() == b"of somebody else"
    finally:
        shutil.rmtree(folder.parent)


@quiet
@given(data=st.data())
def test_a_state_of_any_content_is_taken_over_or_refused(state: RunState, data: st.DataObject) -> None:
    facts = data.draw(st.one_of(altered(state.facts), st.just(state.facts)))
    names = sorted(state.tensors)
    tensors = dict(state.tensors)
    for name in data.draw(st.lists(st.sampled_from(names), max_size=2)):
        other = data.draw(
            st.sampled_from((None, torch.zeros(0), torch.zeros(2, 3), torch.tensor(True), torch.tensor(1)))
        )
        tensors.pop(name, None) if other is None else tensors.update({name: other})
    with judged("run states"):
        make_run(ACCELERATION).load(RunState(tensors, facts))


def used(timeline: Timeline) -> None:
    """Everything that is made of a timeline."""
    json.dumps(timeline.to_json(), allow_nan=False)
    timeline.to_svg().encode()
    timeline.summary(), timeline.log_line(), timeline.totals()


@quiet
@given(data=st.data())
def test_a_timeline_of_any_content_is_shown_or_refused(state: RunState, data: st.DataObject) -> None:
    changed = data.draw(altered(state.facts["timeline"]))
    with judged("timelines"):
        used(Timeline.from_json(changed))


@quiet
@given(data=st.data())
def test_a_damaged_timeline_file_is_shown_or_refused(state: RunState, data: st.DataObject) -> None:
    text = data.draw(damaged(json.dumps(state.facts["timeline"]).encode())).decode(errors="replace")
    with judged("timeline files"):
        used(Timeline.from_json(text))


SMALL = TinyConfig(dim=12, ffn_dim=8, num_layers=1, num_heads=1, text_dim=8, freq_dim=8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, Callable[[Path], Any]]]:
    """Bytes and readers of a tiny model and of a tiny codec."""
    folder = tmp_path_factory.mktemp("weights")
    save_model(TinyWan(SMALL), folder / "model.safetensors")
    TinyCodec(torch.zeros(192, 16), torch.zeros(192), torch.ones(16)).save(folder / "codec.safetensors")
    readers = {"model": load_model, "codec": TinyCodec.load}
    for name, reader in readers.items():
        reader(folder / f"{name}.safetensors")  # the first one brings parts of torch into memory, which takes its time
    return {name: ((folder / f"{name}.safetensors").read_bytes(), reader) for name, reader in readers.items()}


@quiet
@given(data=st.data())
def test_damaged_weights_are_read_or_refused(weights, tmp_path_factory, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(("model", "codec")))
    whole, reader = weights[name]
    path = tmp_path_factory.getbasetemp() / f"{name}.safetensors"
    path.write_bytes(data.draw(damaged(whole)))
    with judged("weights"):
        reader(path)


@quiet
@given(data=st.data())
def test_a_damaged_workflow_file_is_refused_or_changed(tmp_path_factory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "workflow.json"
    path.write_bytes(data.draw(damaged(WORKFLOW.read_bytes())))
    try:
        graph = changed(read_workflow(path), data.draw(st.lists(st.text(max_size=12), max_size=2)))
    except WorkflowFailed as error:
        counted("workflow files", "refused")
        assert "give" in str(error) or "write" in str(error)
    else:
        counted("workflow files", "read")
        assert isinstance(graph, dict)


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_no_reader_unpickles(weights, run_folder: Path, tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "unpickled"
    payload = pickle.dumps(Marker(marker), protocol)
    torch.save({"latents": Marker(marker)}, tmp_path / "torch.pt")
    for content in (payload, (tmp_path / "torch.pt").read_bytes()):
        for name, (_, reader) in weights.items():
            path = tmp_path / f"{name}.safetensors"
            path.write_bytes(content)
            with pytest.raises(ValueError):
                reader(path)
            with pytest.raises(ValueError):
                read_tensors(path, hashlib.sha256(content).hexdigest())
        folder = tmp_path / "run"
        shutil.copytree(run_folder, folder)
        for name in contents(folder):
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError):
            Checkpoint.open(folder).load()
        shutil.rmtree(folder)
    assert not marker.exists()
