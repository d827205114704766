"""Where buffers lie: each placed once, an arena given back whole, constants changed in order with the steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from psigraph.ir.errors import OutOfMemoryError, UsageError
from psigraph.ir.program import Buffer
from psigraph.runtime import host
from psigraph.runtime.memory import ALIGNMENT, Memory
from psigraph.runtime.stream import Stream
from psigraph.runtime.tables import rope_table

OUT_OF_MEMORY = 2


def a_buffer(name: str, kind: str = "scratch", count: int = 3, dtype: str = "f32", zeroed: bool = False) -> Buffer:
    return Buffer(name, kind, dtype, (count,), "plain", 4 * count, zeroed, name)


@pytest.fixture
def memory(stream: Stream) -> Iterator[Memory]:
    made = Memory(stream)
    yield made
    stream.settle()
    made.close()


def lying(memory: Memory, *names: str) -> dict[str, tuple[Buffer, int]]:
    return {name: (memory.buffer(name), memory.address(name)) for name in names}


def test_what_has_a_place_keeps_it(memory: Memory) -> None:
    state, scratch, late = a_buffer("state", "state", zeroed=True), a_buffer("scratch"), a_buffer("late", "input")
    assert memory.place((state, scratch), "the first") is not None
    before = lying(memory, "state", "scratch")
    assert memory.nbytes == 2 * ALIGNMENT
    assert memory.place((scratch, state), "the same") is None
    assert memory.place((state, scratch, late), "one more") is not None
    assert lying(memory, "state", "scratch") == before
    assert memory.nbytes == 3 * ALIGNMENT
    addresses = [memory.address(name) for name in ("state", "scratch", "late")]
    assert len({address // ALIGNMENT for address in addresses}) == 3
    assert all(address % ALIGNMENT == 0 for address in addresses)


def test_new_memory_is_zero_where_somebody_may_read_it_first(memory: Memory) -> None:
    buffers = [a_buffer("state", "state", zeroed=True), a_buffer("scratch"), a_buffer("input", "input")]
    arena = memory.place(buffers, "dirty")
    assert arena is not None
    for buffer in buffers:
        memory.write(buffer.name, np.full(3, 7, np.float32))
    memory.give_back(arena)
    memory.place(buffers, "again")
    assert not any(memory.read(buffer.name).any() for buffer in buffers)


def test_a_table_is_filled_when_it_is_placed(memory: Memory) -> None:
    attrs = (("head_dim", 4), ("theta", 100.0))
    memory.place([Buffer("table.rope", "table", "f32", (20,), "rope", 80, False, "", attrs)], "a table")
    np.testing.assert_array_equal(
        memory.read("table.rope").view(np.float32), rope_table(5, 4, {"theta": 100.0}).reshape(-1)
    )


@pytest.mark.parametrize("kind", ["weight", "state", "constant", "table", "input"])
def test_what_holds_something_is_not_placed_in_another_form(kind: str, memory: Memory) -> None:
    scratch, held = a_buffer("scratch"), a_buffer("held", "constant" if kind == "constant" else "state")
    memory.place((scratch, replace(held, kind=kind) if kind != "table" else held), "the first")
    before, nbytes = lying(memory, "scratch", "held"), memory.nbytes
    with pytest.raises(UsageError, match="the other program keeps held differently; open a new engine"):
        memory.place((replace(scratch, nbytes=4096), replace(held, kind=kind, nbytes=16)), "the second")
    assert (lying(memory, "scratch", "held"), memory.nbytes) == (before, nbytes)


def test_scratch_memory_may_change_and_an_arena_goes_back_whole(memory: Memory) -> None:
    memory.place((a_buffer("kept", "state"), a_buffer("scratch")), "the first")
    memory.write("kept", np.arange(3, dtype=np.float32))
    before, nbytes = lying(memory, "kept", "scratch"), memory.nbytes
    arena = memory.place((a_buffer("kept", "state"), a_buffer("scratch", count=100), a_buffer("new")), "the second")
    assert arena is not None
    assert memory.buffer("scratch").shape == (100,)
    assert memory.address("scratch") != before["scratch"][1]
    memory.give_back(arena)
    assert (lying(memory, "kept", "scratch"), memory.nbytes) == (before, nbytes)
    with pytest.raises(KeyError):
        memory.address("new")
    np.testing.assert_array_equal(memory.read("kept").view(np.float32), [0, 1, 2])


def test_a_place_that_cannot_be_made_ready_is_none(memory: Memory) -> None:
    """Every driver call of it fails once."""
    memory.place((a_buffer("kept", "state"), a_buffer("scratch")), "the first")
    before, nbytes, objects = lying(memory, "kept", "scratch"), memory.nbytes, host.live()
    table = Buffer("table.rope", "table", "f32", (20,), "rope", 80, False, "", (("head_dim", 4), ("theta", 100.0)))
    wanted = (a_buffer("scratch", count=100), a_buffer("new", "state", zeroed=True), table)
    told = []
    for nth in range(1, 20):
        host.inject(nth, OUT_OF_MEMORY)
        try:
            arena = memory.place(wanted, "the second")
        except OutOfMemoryError as error:
            told.append(str(error).partition(" of ")[0].partition(" failed")[0])
        else:
            break
        assert (lying(memory, "kept", "scratch"), memory.nbytes, host.live()) == (before, nbytes, objects)
    host.inject(0, 0)
    assert arena is not None
    zeroed = ["cuMemsetD8Async"] * 2
    assert told == ["the second needs 0.00 MiB", *zeroed, "cuStreamSynchronize", "cuMemcpyHtoD"]


def test_a_constant_changes_in_order_with_what_is_queued(memory: Memory, stream: Stream) -> None:
    constant, copy = a_buffer("numbers", "constant"), a_buffer("copy")
    memory.place((constant, copy), "both")
    for value in (1, 2, 3):
        memory.set_constant("numbers", np.full(3, value, np.float32))
        memory.clear("copy")
        stream.call("cuMemcpyDtoDAsync", memory.address("copy"), memory.address("numbers"), 12, stream.handle)
        memory.set_constant("numbers", np.full(3, -value, np.float32))
        assert memory.read("copy").view(np.float32).tolist() == [value] * 3
        assert memory.read("numbers").view(np.float32).tolist() == [-value] * 3


def test_what_is_no_new_content_of_a_constant(memory: Memory) -> None:
    numbers, ids = a_buffer("numbers", "constant"), a_buffer("ids", "constant", dtype="i32")
    memory.place((numbers, ids, a_buffer("no", "state")), "all")
    for name, values, message in (
        ("no", np.zeros(3, np.float32), "there is no constant no; there are numbers, ids"),
        ("numbers", np.zeros(4, np.float32), r"numbers is float32\[3\], not float32\[4\]"),
        ("numbers", np.zeros((1, 3), np.float32), r"numbers is float32\[3\], not float32\[1, 3\]"),
        ("ids", np.zeros(3, np.int64), r"ids is int32\[3\], not int64\[3\]"),
    ):
        with pytest.raises(UsageError, match=message):
            memory.set_constant(name, values)
