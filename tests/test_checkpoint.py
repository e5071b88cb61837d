"""A run that is taken up again makes bit by bit what it would have made, and a folder is whole at every moment."""

from __future__ import annotations

import json
import os
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from accel import tensor_file
from accel.attention.ann import AnnConfig
from accel.call import Decision, Kind
from accel.checkpoint import DIGEST, MANIFEST, Checkpoint, differences, saved
from accel.chunks import ChunkConfig
from accel.correct import CorrectionConfig
from accel.engine import Acceleration, HistoryGuidedConfig, SchedulerConfig
from accel.kv.budget import KVBudgetConfig
from accel.kv.frozen import FrozenConfig
from accel.policy import TriModalConfig
from accel.run_state import RunState
from accel.sampling import Segment, SegmentPlan, causal_blocks, diffusion_forcing, next_clip
from accel.schedule import flow_sigmas
from demo.denoiser import TinyDenoiser
from demo.model import TinyConfig, TinyWan
from tests.fakes import SmoothDenoiser, make_run

PLAN = SegmentPlan(frames=14, segment=6, overlap=2, block=2, ar_step=2, steps=8)
CLIPS = SegmentPlan(frames=16, segment=6, overlap=2, block=2, ar_step=0, steps=8)
TABLE = flow_sigmas(8, 3.0)
DESCRIPTION = {"model": "smooth", "plan": {"steps": 8, "block": 2}, "noise": DIGEST + "0"}
SCHEDULER = SchedulerConfig(TriModalConfig(0.4, 1.5), "log-snr", reach=None)
SKETCHED = CorrectionConfig("seg1_l1", sketch=64)
CHUNKS = ChunkConfig(TriModalConfig(0.05, 0.2), "timestep", reach=None)
ACCELERATIONS = {
    "nothing": Acceleration(),
    "history-guided, corrected": Acceleration(HistoryGuidedConfig(0.3), correction=SKETCHED),
    "tri-modal": Acceleration(scheduler=SCHEDULER, correction=CorrectionConfig()),
    "target": Acceleration(scheduler=SchedulerConfig(quality=30.0)),
    "chunks": Acceleration(chunks=CHUNKS, correction=CorrectionConfig()),
    "frozen K/V": Acceleration(scheduler=SCHEDULER, frozen_window=FrozenConfig(1.0)),
    "shared prefix, suffix": Acceleration(shared_prefix=FrozenConfig(0.5, "history"), suffix_window=True),
    "replay": Acceleration(replay=tuple(Decision(name) for name in ("recompute", "predict", "cache") * 30)),
}  # fmt: skip


class Causal(SmoothDenoiser):
    """Keeps what every committed block adds up to, as a K/V store would, and lets it speak."""

    recomputes_history = False

    def __init__(self):
        super().__init__()
        self.memory = torch.zeros(())

    def velocity(self, call, x):
        out = super().velocity(call, x) + 0.1 * self.memory
        if call.kind is not Kind.DENOISE:
            self.memory = 0.5 * self.memory + x.double().mean()
        return out

    def state(self):
        return {"memory": self.memory}

    def load(self, state):
        self.memory = state["memory"]


class SharedTime(SmoothDenoiser):
    shares_time = True


def noise(frames, seed=0):
    return torch.randn(1, 2, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


LOOPS = {
    "diffusion forcing": (
        SmoothDenoiser,
        lambda run, **k: diffusion_forcing(run, noise(14), PLAN, TABLE, history_noise=0.02, **k),
    ),
    "UniPC": (SmoothDenoiser, lambda run, **k: diffusion_forcing(run, noise(14), PLAN, TABLE, "unipc", **k)),
    "next clip": (SharedTime, lambda run, **k: next_clip(run, noise(16), CLIPS, TABLE, **k)),
    "causal": (Causal, lambda run, **k: causal_blocks(run, noise(7), 2, TABLE, prefix=noise(2, 5), **k)),
    "causal, re-noised": (Causal, lambda run, **k: causal_blocks(run, noise(7), 2, TABLE, renoise_seed=1, **k)),
}


def told(run):
    """The run's timeline without its times."""
    content = run.timeline.to_json()
    for record in content["records"]:
        record.pop("seconds")
    for key in ("seconds", "seconds_full_estimate"):
        content["totals"].pop(key)
    return content


def whole(loop, acceleration):
    denoiser, segments = LOOPS[loop]
    run = make_run(acceleration, denoiser())
    return [segment.latents for segment in segments(run)], run


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ACCELERATIONS)
def test_a_run_goes_on_bit_by_bit_after_every_segment(name, loop, tmp_path):
    acceleration, (denoiser, segments) = ACCELERATIONS[name], LOOPS[loop]
    expected, uninterrupted = whole(loop, acceleration)
    assert len(expected) > 2
    for stop in range(1, len(expected) + 1):
        first, folder = make_run(acceleration, denoiser()), tmp_path / str(stop)
        begun = Checkpoint.start(folder, DESCRIPTION)
        made = list(islice(saved(segments(first), first, begun), stop))
        checkpoint, second = Checkpoint.open(folder, DESCRIPTION), make_run(acceleration, denoiser())
        finished = checkpoint.load()
        second.load(finished.state)
        rest = list(saved(segments(second, finished=finished.latents), second, checkpoint))
        assert [segment.index for segment in made + rest] == list(range(len(expected)))
        latents = [*finished.latents, *(segment.latents for segment in rest)]
        assert all(torch.equal(one, other) for one, other in zip(latents, expected, strict=True)), stop
        assert told(second) == told(uninterrupted), stop


def test_the_parts_that_cross_a_border_are_exercised():
    assert whole("diffusion forcing", ACCELERATIONS["history-guided, corrected"])[1].state().tensors
    _, target = whole("diffusion forcing", ACCELERATIONS["target"])
    assert target.state().facts["auto"]["bands"] and target.timeline.totals()["calls"]["predict"]
    _, chunks = whole("diffusion forcing", ACCELERATIONS["chunks"])
    assert chunks.state().facts["planned"] and chunks.timeline.totals()["calls"]["cache"]
    _, guided = whole("diffusion forcing", ACCELERATIONS["history-guided, corrected"])
    assert guided.state().facts["openings"] and guided.timeline.totals()["calls"]["cache"]


@pytest.mark.parametrize(("kind", "guidance"), [("tiny-causal", 2.0), ("tiny-df", 2.0), ("tiny-next-clip", 1.0)])
def test_the_tiny_models_go_on_bit_by_bit(kind, guidance, tmp_path):
    torch.manual_seed(0)
    config = TinyConfig(kind=kind, causal_ar=kind == "tiny-causal", num_layers=2)
    model, x = TinyWan(config).eval(), torch.randn(1, 16, 10, 4, 4, generator=torch.Generator().manual_seed(1))
    context = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(2))
    acceleration = ACCELERATIONS["tri-modal"]
    if not config.causal_ar:
        acceleration = Acceleration(HistoryGuidedConfig(0.3), SCHEDULER, frozen_window=FrozenConfig(1.0))

    def start():
        return make_run(acceleration, TinyDenoiser(model, context, guidance, rollout=10).sized(x))

    def loop(run, finished=()):
        if config.causal_ar:
            return causal_blocks(run, x, 4, TABLE, renoise_seed=3, finished=finished)
        plan = SegmentPlan(10, 6, 2, 2, 0 if kind == "tiny-next-clip" else 2, 8)
        loop = next_clip if kind == "tiny-next-clip" else diffusion_forcing
        return loop(run, x, plan, TABLE, finished=finished)

    with torch.inference_mode():
        uninterrupted = start()
        expected = [segment.latents for segment in loop(uninterrupted)]
        for stop in range(1, len(expected)):
            first, checkpoint = start(), Checkpoint.start(tmp_path / str(stop), {})
            list(islice(saved(loop(first), first, checkpoint), stop))
            finished, second = Checkpoint.open(tmp_path / str(stop)).load(), start()
            second.load(finished.state)
            rest = [segment.latents for segment in loop(second, finished.latents)]
            assert all(torch.equal(*pair) for pair in zip([*finished.latents, *rest], expected, strict=True))
            assert told(second) == told(uninterrupted)


@pytest.mark.parametrize(
    "budget",
    [
        KVBudgetConfig(frames=8), KVBudgetConfig(frames=9, keep="importance-redundancy", recent=1),
        KVBudgetConfig(frames=9, keep="temporal-merge", recent=1), KVBudgetConfig(frames=8, keep="head-groups"),
        KVBudgetConfig(frames=14, storage="8-bit", sink=0),
        KVBudgetConfig(frames=13, keep="temporal-merge", recent=1, offload=2),
    ],
    ids=lambda budget: f"{budget.keep}, {budget.storage}, {budget.offload}",
)  # fmt: skip
def test_bounded_keys_and_values_go_on_bit_by_bit(budget, tmp_path):
    torch.manual_seed(0)
    ann = AnnConfig(0.5, shortest=1, tile=16) if budget.keep in ("window", "temporal-merge") else None
    model = TinyWan(TinyConfig(dim=48, ffn_dim=48, num_layers=4, num_heads=4, causal_ar=True, block=2)).eval()
    x = torch.randn(1, 16, 20, 4, 4, generator=torch.Generator().manual_seed(1))
    context = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(2))

    def start():
        denoiser = TinyDenoiser(model, context, 2.0, rollout=20, budget=budget, ann=ann, calls=3).sized(x)
        return make_run(Acceleration(scheduler=SCHEDULER, kv_budget=budget, ann=ann), denoiser)

    def loop(run, finished=()):
        return causal_blocks(run, x, 2, [1.0, 0.6, 0.0], renoise_seed=3, finished=finished)

    with torch.inference_mode():
        uninterrupted = start()
        expected = [segment.latents for segment in loop(uninterrupted)]
        for stop in (1, 5, 6, 9):
            first, checkpoint = start(), Checkpoint.start(tmp_path / str(stop), {})
            list(islice(saved(loop(first), first, checkpoint), stop))
            finished, second = Checkpoint.open(tmp_path / str(stop)).load(), start()
            second.load(finished.state)
            rest = [segment.latents for segment in loop(second, finished.latents)]
            assert all(torch.equal(*pair) for pair in zip([*finished.latents, *rest], expected, strict=True)), stop
            assert told(second) == told(uninterrupted), stop


def test_a_state_every_few_segments_makes_the_segments_after_it_again(tmp_path):
    expected, _ = whole("diffusion forcing", ACCELERATIONS["tri-modal"])
    run = make_run(ACCELERATIONS["tri-modal"])
    checkpoint = Checkpoint.start(tmp_path / "run", {})
    _, segments = LOOPS["diffusion forcing"]
    list(islice(saved(segments(run), run, checkpoint, every=2), 3))
    checkpoint = Checkpoint.open(tmp_path / "run")
    assert (checkpoint.finished, checkpoint.resumable) == (3, 2)
    assert all(torch.equal(one.latents, other) for one, other in zip(checkpoint.latents(), expected, strict=False))
    finished, second = checkpoint.load(), make_run(ACCELERATIONS["tri-modal"])
    second.load(finished.state)
    rest = list(saved(segments(second, finished=finished.latents), second, checkpoint, every=2))
    assert rest[0].index == 2 and torch.equal(rest[0].latents, expected[2])


def test_a_model_that_cannot_give_its_history_away_is_refused():
    class Mute(SmoothDenoiser):
        recomputes_history = False

    with pytest.raises(ValueError, match=r"Mute keeps the history's keys and values and has no state\(\)"):
        make_run(denoiser=Mute()).state()


def test_finished_latents_of_another_plan_are_refused():
    with pytest.raises(ValueError, match="segment 0 are .* this run needs"):
        next(diffusion_forcing(make_run(), noise(14), PLAN, TABLE, finished=[noise(4)]))


def fill(folder, count=3):
    """A run of ``count`` finished segments, and their latents."""
    checkpoint, latents = Checkpoint.start(folder, DESCRIPTION), []
    for index in range(count):
        latents.append(noise(2, index))
        state = RunState({"a": latents[-1]}, {"n": index})
        checkpoint.save(Segment(index, 2 * index, 2 * index + 2, latents[-1]), state)
    return checkpoint, latents


def check(folder, latents):
    """The folder holds as many of the segments as it says, with the state after them."""
    checkpoint = Checkpoint.open(folder, DESCRIPTION)
    finished = checkpoint.load()
    assert len(finished.latents) == checkpoint.finished
    assert all(torch.equal(one, other) for one, other in zip(finished.latents, latents, strict=False))
    if finished.latents:
        assert finished.state.facts == {"n": checkpoint.finished - 1}
    return checkpoint.finished


class Killed(BaseException):
    pass


def failing(real, number, folder, torn):
    """An operation that works ``number`` times; ``torn`` ends as a process does that is gone."""
    calls = iter(range(100))

    def operate(*arguments, **options):
        if next(calls) < number:
            return real(*arguments, **options)
        for path in folder.glob("*" + tensor_file.PARTIAL) if torn else ():
            shutil.copy(path, folder / ("kept" + path.name))
        raise Killed if torn else OSError(28, "No space left on device")

    return operate


@pytest.mark.parametrize("torn", [False, True], ids=["failed", "killed"])
@pytest.mark.parametrize("operation", ["open", "fsync", "replace", "unlink"])
def test_a_failure_at_any_write_leaves_a_state_to_go_on_from(operation, torn, tmp_path, monkeypatch):
    """``killed`` leaves the temporary file cut off, as a process that is gone cannot clean up."""
    for number in range(40):
        folder = tmp_path / f"{operation}{number}"
        checkpoint, latents = fill(folder, 2)
        later = noise(2, 9)
        with monkeypatch.context() as patch:
            owner = os if operation in ("fsync", "replace") else Path
            patch.setattr(owner, operation, failing(getattr(owner, operation), number, folder, torn))
            try:
                checkpoint.save(Segment(2, 4, 6, later), RunState({"a": later}, {"n": 2}))
                failed = False
            except (OSError, Killed):
                failed = True
        for path in folder.glob("kept*"):
            data = path.read_bytes()
            path.unlink()
            (folder / path.name.removeprefix("kept")).write_bytes(data[: len(data) // 2])
        assert check(folder, [*latents, later]) in ((2, 3) if failed else (3,))
        assert not list(folder.glob("*" + tensor_file.PARTIAL))
        again = Checkpoint.open(folder)
        if again.finished == 2:
            again.save(Segment(2, 4, 6, later), RunState({"a": later}, {"n": 2}))
        assert check(folder, [*latents, later]) == 3
        if not failed:
            assert number > 0
            return
    raise AssertionError("saving never ended")


@pytest.mark.parametrize("name", [MANIFEST, "segment-00001.safetensors", "state-00003.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_refused_with_its_name(name, damage, tmp_path):
    fill(tmp_path / "run")
    path = tmp_path / "run" / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-20] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(data[:-7] if damage == "cut" else data)
    with pytest.raises(ValueError, match=rf"cannot be resumed: {name} .*; start the run anew"):
        Checkpoint.open(tmp_path / "run", DESCRIPTION).load()


def rewrite(folder, **changes):
    manifest = tensor_file.read_json(folder / MANIFEST)
    tensor_file.write_json(folder / MANIFEST, manifest | changes)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "segment-1.safetensors", "state-00001.pt", 3])
def test_a_manifest_that_names_foreign_files_is_refused(name, tmp_path):
    fill(tmp_path)
    rewrite(tmp_path, segments=[{"file": name, "start": 0, "end": 2, "digest": ""}])
    with pytest.raises(ValueError, match="which is none of its own"):
        Checkpoint.open(tmp_path)


def test_another_version_is_refused(tmp_path):
    fill(tmp_path)
    rewrite(tmp_path, version=7)
    with pytest.raises(ValueError, match="has version 7, this release reads 1; resume it with the release that wrote"):
        Checkpoint.open(tmp_path)


def test_other_settings_are_refused_with_what_differs(tmp_path):
    fill(tmp_path)
    now = {"model": "other", "plan": {"steps": 9, "block": 2}, "noise": DIGEST + "1", "cfg": 2.0}
    message = "model is 'other', was 'smooth'; plan steps is 9, was 8; noise is another one; cfg is 2.0, was None"
    with pytest.raises(ValueError, match=f"other settings: {message}; set them back"):
        Checkpoint.open(tmp_path, now)
    assert differences(DESCRIPTION, json.loads(json.dumps(DESCRIPTION))) == []


def test_finished_segments_are_never_rewritten_and_one_state_is_kept(tmp_path):
    checkpoint, _ = fill(tmp_path, 1)
    before = (tmp_path / "segment-00000.safetensors").stat()
    checkpoint.save(Segment(1, 2, 4, noise(2)), RunState({}, None))
    after = (tmp_path / "segment-00000.safetensors").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00002.safetensors"]
    with pytest.raises(ValueError, match="segment 3 cannot follow 2"):
        checkpoint.save(Segment(3, 6, 8, noise(2)))


def test_a_removed_run_leaves_what_others_put_there(tmp_path):
    checkpoint, _ = fill(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    checkpoint.remove()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    checkpoint, _ = fill(tmp_path / "other")
    checkpoint.remove()
    assert not (tmp_path / "other").exists()


def test_notes_survive(tmp_path):
    checkpoint, _ = fill(tmp_path)
    checkpoint.note(video=[1, 2])
    assert Checkpoint.open(tmp_path).notes == {"video": [1, 2]}
    with pytest.raises(ValueError, match="holds a run already"):
        Checkpoint.start(tmp_path, {})


@pytest.mark.parametrize("dtype", tensor_file.DTYPES, ids=str)
def test_tensors_of_any_layout_come_back_as_they_were(dtype, tmp_path):
    values = torch.arange(24).reshape(2, 3, 4) % 2
    tensors = {"a": values.to(dtype).transpose(0, 2), "scalar": torch.ones(()).to(dtype), "none": torch.empty(0, 3)}
    digest = tensor_file.write_tensors(tmp_path / "x.safetensors", tensors, {"facts": [1.5]})
    back, facts = tensor_file.read_tensors(tmp_path / "x.safetensors", digest)
    assert facts == {"facts": [1.5]} and back.keys() == tensors.keys()
    assert all(back[name].dtype == tensor.dtype and torch.equal(back[name].double(), tensor.double())
               for name, tensor in tensors.items())  # fmt: skip


def test_a_type_that_the_format_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a is torch.complex64, which safetensors cannot hold"):
        tensor_file.write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


def test_a_state_is_saved_every_one_or_more_segments():
    with pytest.raises(ValueError, match="every is 0"):
        next(saved(iter(()), make_run(), Checkpoint(None, {}), every=0))


class Crowded(Causal):
    """Runs out of memory at one call; lowering its budget costs it nothing."""

    def __init__(self, full_at=None):
        super().__init__()
        self.full_at = full_at

    def velocity(self, call, x):
        if len(self.calls) == self.full_at:
            self.calls.append(call)
            raise torch.OutOfMemoryError("as a GPU would")
        return super().velocity(call, x)

    def lower(self):
        return "less"


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", ["history-guided, corrected", "tri-modal", "target", "chunks", "replay"])
def test_a_block_made_again_for_want_of_memory_leaves_no_trace_of_the_first_attempt(name, seed):
    signals = {"tri-modal": Acceleration(scheduler=SchedulerConfig(SCHEDULER.thresholds, "current"))}
    acceleration = (ACCELERATIONS | signals)[name]

    def made(full_at=None):
        run = make_run(acceleration, Crowded(full_at))
        segments = list(causal_blocks(run, noise(8), 2, TABLE, seed))
        told = run.state().facts
        lost = len(run.denoiser.calls)
        told["timeline"] = [(r.decision, r.segment, r.increment, r.discrepancy) for r in run.timeline.records]
        remark = run.timeline.settings.pop("out of memory", None)
        return torch.cat([segment.latents for segment in segments], 2), told, run.timeline.settings, remark, lost

    latents, told, settings, _, calls = made()
    for full_at in range(0, calls, 3):
        again = made(full_at)
        assert torch.equal(again[0], latents) and again[3].endswith("was made again with less")
        assert repr(again[1]) == repr(told) and again[2] == settings, full_at
