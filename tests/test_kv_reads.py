"""Bounded K/V never make the host wait for the device, but for one small read a block where tokens merge."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel.kv import late
from accel.kv.budget import IMPORTANCE, MERGE, WINDOW, KVBudgetConfig, StoreShape
from accel.kv.memory import make_memory
from accel.kv.rotary import TimeRotary

LAYERS, BLOCK, BLOCKS, FORWARDS = 2, 3, 6, 2
SHAPE = StoreShape(LAYERS, 2, 12, (2, 3), 1, 4, TimeRotary.of_wan(12))
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"}


class Reads(TorchDispatchMode):
    """Operations whose result the host waits for, and copies from one device to another that it waits for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [one for one in (*args, out) if isinstance(one, torch.Tensor)]
        name = function.__name__.split(".")[0]
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        masked = any(one is not None and one.dtype == torch.bool for one in indices)
        if name.strip("_") in {read.strip("_") for read in READS} or masked:
            self.found.append(name)
        if len({one.device for one in tensors}) > 1 and not (kwargs or {}).get("non_blocking"):
            self.found.append(f"{name} between devices")
        return out


class Told:
    """Stands for ``Readback``: remembers how many numbers came in which read, and makes some up for the device
    ``meta``."""

    reads: list[int] = []

    def __init__(self):
        self._waiting = []

    def send(self, values, label):
        self.reads.append(len(values))
        self._waiting.append(([30.0] * len(values) if values.is_meta else values.tolist(), label))

    def arrived(self, leave):
        waiting, self._waiting = self._waiting, []
        return waiting


@pytest.fixture
def reads(monkeypatch):
    monkeypatch.setattr(Told, "reads", [])
    monkeypatch.setattr(late, "Readback", Told)
    return Told.reads


def memory(keep, branches=2):
    frames, recent = (9, 0) if keep == WINDOW else (18, 3)
    return make_memory(KVBudgetConfig(frames=frames, keep=keep, recent=recent), SHAPE, branches, BLOCK, 100)


def rolled(kept, device, start=0, blocks=BLOCKS, change=0.15):
    """What every operation on the store found, block by block; of all layers and branches at once."""
    generator, found = torch.Generator().manual_seed(3), []
    rows = (len(kept.stores), BLOCK * SHAPE.tokens, SHAPE.heads, SHAPE.head_dim)
    film = torch.randn(rows, generator=generator)
    for block in range(blocks):
        film = film + change * torch.randn(rows, generator=generator)
        if block < start:
            continue
        x = film.to(device)
        with Reads() as found_now:
            for _ in range(FORWARDS):
                kept.begin(BLOCK * block, BLOCK)
                for layer in range(LAYERS):
                    kept.attend(layer, x, x, x)
            kept.commit()
        found.append(found_now.found)
    return found


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("keep", [WINDOW, IMPORTANCE, MERGE])
def test_no_layer_reads_from_the_device_or_copies_to_it(keep, device, reads):
    kept = memory(keep)
    assert rolled(kept, device) == [[]] * BLOCKS, "any read from meta would have raised as well"
    pushing = sum(bool(kept.layout.pushed_out(BLOCK * block, BLOCK)) for block in range(BLOCKS))
    assert pushing >= 3 and reads == ([2 * LAYERS] * pushing if keep == MERGE else [])


def test_the_read_is_of_what_came_out():
    kept = memory(MERGE)
    rolled(kept, "cpu")
    rings = [ring for store in kept.stores for ring in store._rings]
    lengths = [
        int(number) for store in kept.stores for name, number in store._middle.state().items() if "length" in name
    ]
    assert [ring.kept for ring in rings] == lengths and min(lengths) > 0
    assert kept.keys == sum(ring.filled(BLOCK * BLOCKS) for ring in rings) / len(rings)


def test_a_resumed_run_reads_once_a_branch_in_its_first_block_and_once_a_block_from_then_on(reads):
    first, again = memory(MERGE), memory(MERGE)
    rolled(first, "cpu", blocks=3)
    again.load({name: tensor.clone() for name, tensor in first.state().items()})
    reads.clear()
    assert rolled(again, "cpu", start=3) == [[]] * (BLOCKS - 3)
    assert reads == [LAYERS] * 2 + [2 * LAYERS] * (BLOCKS - 4)
    whole = memory(MERGE)
    rolled(whole, "cpu")
    ended, wanted = again.state(), whole.state()
    assert ended.keys() == wanted.keys()
    for ring, other in zip(again.stores[1]._rings, whole.stores[1]._rings, strict=True):
        assert all(torch.equal(*sides) for sides in zip(ring.read(18)[:2], other.read(18)[:2], strict=True))
