"""Every kernel compiles for every architecture without spilling, and loads contiguous data 128 bits at a time."""

from __future__ import annotations

import pytest

from tests.triton_aot import ARCHITECTURES, CASES, built
from tests.triton_interpreter import needs_triton

pytestmark = needs_triton
QUICK = tuple(name for name, case in CASES.items() if not case.long)
LONG = tuple(name for name, case in CASES.items() if case.long)


def check(names: tuple[str, ...], name: str, architecture: int) -> None:
    (made,) = [one for one in built(names) if (one.case, one.architecture) == (name, architecture)]
    assert (made.stack, made.local, made.spills) == (0, 0, 0), made
    assert made.wide_loads >= CASES[name].wide_loads, made
    assert made.found, f"{CASES[name].uses[architecture]} is not in the machine code: {made}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", QUICK)
def test_a_kernel_compiles_well(name: str, architecture: int) -> None:
    check(QUICK, name, architecture)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", LONG)
def test_a_kernel_compiles_well_for_all_its_arguments(name: str, architecture: int) -> None:
    check(LONG, name, architecture)
