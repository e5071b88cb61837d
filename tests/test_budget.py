"""A K/V budget says what a store takes before it exists, to the byte, and nothing ever takes more."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from accel.kv.budget import IMPORTANCE, KVBudgetConfig, StoreShape, plan
from accel.kv.memory import make_memory
from accel.kv.rotary import TimeRotary

SHAPE = StoreShape(2, 2, 12, (2, 2), 1, 4, TimeRotary.of_wan(12))
WAN = StoreShape(30, 12, 128, (30, 52), 1, 2, TimeRotary.of_wan(128))  # 1.3B at 832 x 480, bfloat16


def roll(memory, blocks, frames=2, seed=0):
    """Forwards noise through every layer, block after block; yields after each commit."""
    generator, first = torch.Generator().manual_seed(seed), 0
    rows = (len(memory.stores) * memory.shape.batch, frames * memory.shape.tokens, memory.shape.heads, 12)
    for _ in range(blocks):
        memory.begin(first, frames)
        for layer in range(memory.shape.layers):
            memory.attend(layer, *(torch.randn(rows, generator=generator) for _ in range(3)))
        memory.commit()
        first += frames
        yield first


configs = st.builds(
    KVBudgetConfig, frames=st.integers(6, 30), sink=st.integers(0, 2), keep=st.sampled_from(["window", IMPORTANCE]),
    recent=st.integers(0, 3), storage=st.sampled_from(["model", "8-bit"]),
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(configs, st.integers(1, 2))
def test_what_is_allocated_is_what_was_planned_and_within_the_budget(config, branches):
    try:
        memory = make_memory(config, SHAPE, branches, 2, 100)
    except ValueError:
        assume(False)
    *_, _ = roll(memory, 20)
    lasting = memory.planned_bytes - branches * SHAPE.scratch_bytes(memory.layout, config)
    wide = memory.layout.places * SHAPE.token_bytes("model") if config.storage == "8-bit" else 0
    assert memory.nbytes == lasting + wide <= memory.planned_bytes
    assert memory.planned_bytes <= 1.02 * branches * config.frames * SHAPE.frame_bytes(config.storage)


def test_wan_1_3b_at_480p_keeps_13_latents_in_4_gb():
    layout = plan(KVBudgetConfig(frames=13), WAN, 1, 3, 81)
    assert layout.whole_frames == 13
    assert 3.7e9 < WAN.bytes(layout, KVBudgetConfig(frames=13)) <= 4.0e9


@pytest.mark.parametrize("keep", ["window", IMPORTANCE])
@pytest.mark.parametrize("branches", [1, 2])
def test_gigabytes_are_of_all_branches_and_never_passed(keep, branches):
    config = KVBudgetConfig(gigabytes=8.0, keep=keep)
    layout = plan(config, WAN, branches, 3, 200)
    assert 0.9 * 8e9 < branches * WAN.bytes(layout, config) <= 8e9


def test_bytes_and_keys_are_the_same_for_every_block_once_the_store_is_full():
    memory = make_memory(KVBudgetConfig(frames=12, keep=IMPORTANCE), SHAPE, 1, 2, 100)
    told = [(memory.nbytes, memory.keys) for _ in roll(memory, 40)]
    assert len(set(told[12:])) == 1 and len({keys for _, keys in told}) > 3


def test_the_middle_keeps_tokens_that_left_the_ring():
    memory = make_memory(KVBudgetConfig(frames=12, keep=IMPORTANCE, recent=2), SHAPE, 1, 2, 100)
    *_, _ = roll(memory, 20)
    ring = memory.stores[0]._rings[0]
    assert ring.kept == memory.layout.middle > 0
    assert ring._frames.max() < 40 - memory.layout.ring and ring._frames.min() >= 1


def test_a_middle_in_main_memory_gives_the_same_attention_and_frees_the_device():
    config = KVBudgetConfig(frames=40, keep=IMPORTANCE, recent=2)
    shape = replace(SHAPE, layers=12)
    here = make_memory(config, shape, 1, 2, 200)
    there = make_memory(replace(config, frames=20, offload=here.layout.middle // shape.tokens), shape, 1, 2, 200)
    middle = there.layout.middle
    here.layout = there.layout
    for store in here.stores:
        store.layout = there.layout
    generator = torch.Generator().manual_seed(1)
    for first in range(0, 120, 2):
        assert here.begin(first, 2) == there.begin(first, 2)
        for layer in range(12):
            rows = [torch.randn(1, 8, 2, 12, generator=generator) for _ in range(3)]
            assert torch.equal(here.attend(layer, *rows), there.attend(layer, *rows))
        here.commit(), there.commit()
    assert there.stores[0]._rings[0].kept == middle and there.nbytes < 0.8 * here.nbytes


class Written(TorchDispatchMode):
    """Bytes that every operation leaves in memory it did not have before, or overwrites."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in ("copy_", "clone", "roll", "cat"):
            self.bytes += out.nbytes
        return out


def test_appending_writes_a_tenth_of_what_clone_and_roll_writes():
    memory = make_memory(KVBudgetConfig(frames=21, sink=0), replace(SHAPE, layers=1), 1, 1, 100)
    *_, first = roll(memory, 30, frames=1)
    rows = [torch.randn(1, 4, 2, 12) for _ in range(3)]
    memory.begin(first, 1)
    ring = memory.stores[0]._rings[0]
    with Written() as ours:
        ring.open(0, first, 1, memory.stores[0]._base, rows[0])
        ring.write(first, rows[1], rows[2])
    with Written() as theirs:
        for side in (ring.slots.keys, ring.slots.values):
            rolled = side.clone().roll(-4, 1)
            rolled[:, -4:] = rows[1]
    assert ours.bytes == 2 * rows[1].nbytes
    assert ours.bytes <= 0.1 * theirs.bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "set one of them"), ({"frames": 8, "gigabytes": 2.0}, "set one of them"), ({"frames": -1}, "0 or more"),
        ({"frames": 8, "keep": "all"}, "keep is 'all'"), ({"frames": 8, "storage": "4-bit"}, "storage '4-bit'"),
        ({"frames": 8, "offload": 4}, "offload is 4"), ({"gigabytes": float("nan")}, "0 or more"),
        ({"frames": 8, "span": 0}, "span 0"),
    ],
)  # fmt: skip
def test_bad_budgets_are_refused_in_a_sentence(options, words):
    with pytest.raises(ValueError, match=rf"^KV Cache Budget: .*{words}"):
        KVBudgetConfig(**options)


def test_a_budget_without_room_says_how_much_is_needed():
    with pytest.raises(ValueError, match="give 6 or more latent frames"):
        plan(KVBudgetConfig(frames=4), WAN, 1, 3, 81)
    with pytest.raises(ValueError, match="0.01 GB have no room"):
        plan(KVBudgetConfig(gigabytes=0.01), WAN, 2, 3, 81)
    assert plan(KVBudgetConfig(frames=6), WAN, 1, 3, 81).whole_frames == 5


@pytest.mark.parametrize("config", [KVBudgetConfig(frames=40), KVBudgetConfig(gigabytes=50.0, keep=IMPORTANCE)])
def test_a_video_that_fits_is_kept_whole_and_no_room_is_made_beyond_it(config):
    layout = plan(config, WAN, 1, 3, 21)
    assert (layout.sink, layout.ring, layout.middle) == (0, 21, 0)


@pytest.mark.parametrize("keep", ["window", IMPORTANCE])
@pytest.mark.parametrize("at", [1, 9, 23, 47])
def test_a_block_that_runs_out_of_memory_is_made_again_with_less(keep, at, monkeypatch):
    from accel.engine import Acceleration, Run
    from accel.kv import memory as module
    from accel.sampling import causal_blocks
    from accel.timeline import Timeline
    from demo.denoiser import TinyDenoiser
    from demo.model import TinyConfig, TinyWan

    torch.manual_seed(0)
    model = TinyWan(TinyConfig(dim=48, ffn_dim=48, num_layers=2, num_heads=2, causal_ar=True, block=2)).eval()
    noise, calls = torch.randn(1, 16, 24, 4, 4), []
    budget = KVBudgetConfig(frames=14, keep=keep, recent=2)
    denoiser = TinyDenoiser(model, torch.randn(1, 8, 64), 1.0, rollout=24, budget=budget).sized(noise)

    def attend(*given):
        calls.append(given)
        if len(calls) == 2 * at:
            raise torch.OutOfMemoryError("as a GPU would")
        return module.attend(*given[1:5])

    monkeypatch.setattr(module, "dense", attend)
    run = Run(Acceleration(kv_budget=budget), denoiser, Timeline())
    made = list(causal_blocks(run, noise, 2, [1.0, 0.7, 0.4, 0.0]))
    calls_made = run.timeline.totals()["calls"]
    assert calls_made["recompute"] == 36 and calls_made["commit"] == 12
    assert all(torch.isfinite(segment.latents).all() for segment in made) and len(made) == 12
    assert f"segment {(at - 1) // 4} was made again" in run.timeline.settings["out of memory"]
    assert denoiser.kept_bytes < make_memory(budget, denoiser._store.shape, 1, 2, 24).planned_bytes


def test_a_start_longer_than_the_ring_is_taken_in_block_by_block():
    from accel.engine import Acceleration, Run
    from accel.sampling import causal_blocks
    from accel.timeline import Timeline
    from demo.denoiser import TinyDenoiser
    from demo.model import TinyConfig, TinyWan

    torch.manual_seed(0)
    model = TinyWan(TinyConfig(dim=48, ffn_dim=48, num_layers=2, num_heads=2, causal_ar=True, block=2)).eval()
    noise, context = torch.randn(1, 16, 14, 4, 4), torch.randn(1, 8, 64)

    def continued(prefix, **options):
        denoiser = TinyDenoiser(model, context, 1.0, rollout=14, **options).sized(noise)
        run = Run(Acceleration(kv_budget=options.get("budget")), denoiser, Timeline())
        made = list(causal_blocks(run, noise, 2, [1.0, 0.5, 0.0], prefix=prefix))
        return torch.cat([segment.latents for segment in made], 2), run.timeline.totals()["calls"]["commit"]

    start = torch.randn(1, 16, 9, 4, 4)
    bounded, commits = continued(start, budget=KVBudgetConfig(frames=7))
    assert bounded.shape[2] == 5 and commits == 5 + 3 and bool(bounded.isfinite().all())
    short, commits = continued(start[:, :, :3], budget=KVBudgetConfig(frames=14))
    whole, _ = continued(start[:, :, :3])
    assert commits == 1 + 6 and torch.allclose(short, whole, atol=1e-5)


def test_without_a_budget_to_lower_running_out_of_memory_is_told(monkeypatch):
    memory = make_memory(KVBudgetConfig(frames=6, sink=0), SHAPE, 1, 2, 100)
    *_, _ = roll(memory, 5)
    assert memory.lower(2) is not None and memory.layout.ring == 4
    assert memory.lower(2) is not None and memory.layout.ring == 3
    assert memory.lower(2) is None
