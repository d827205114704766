"""Weights from the file to the GPU: read in slabs, copied, and laid out in tiles there.

Two page-locked slabs and two device slabs take turns: while the GPU lays out one, the
next is read (`preadv` straight into page-locked memory, several threads) and copied.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ..ir.errors import ModelFileError
from ..ir.program import Buffer, Program
from .cuda.driver import Driver, HostMemory
from .program import LoadedProgram

SLAB_BYTES = 32 * 2**20
READ_BYTES = 4 * 2**20
REPACK_THREADS = 128
TILE_ROWS = 16

Progress = Callable[[int, int], None]


class WeightSource(Protocol):
    """Where the bytes of tensors are: a model file."""

    def fileno(self) -> int: ...

    def place(self, name: str) -> tuple[int, int]:
        """(offset in the file, bytes) of a tensor."""


class _Slab:
    """One page-locked and one device buffer, and the event that frees them."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.driver = driver
        self.host: HostMemory | None = None
        self.device = 0
        self.event: Any = None
        try:
            self.host = driver.host_memory(nbytes)
            self.device = driver.allocate(nbytes, "the buffer for loading weights")
            self.event = driver.call("cuEventCreate", 0)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.event is not None:
            self.driver.give_back("cuEventDestroy", self.event)
        if self.device:
            self.driver.give_back("cuMemFree", self.device)
        if self.host is not None:
            self.host.close()


def upload_weights(
    loaded: LoadedProgram, program: Program, source: WeightSource, progress: Progress | None = None
) -> int:
    """Fill every weight buffer of a loaded program. Returns the bytes read from the file.

    ModelFileError if the file ends before a tensor does.
    """
    driver, stream, functions = loaded.stream.driver, loaded.stream.handle, loaded.functions
    weights = [buffer for buffer in program.buffers if buffer.kind == "weight"]
    sizes = [source.place(buffer.source)[1] for buffer in weights]
    total, slab_bytes = sum(sizes), min(SLAB_BYTES, max(sizes, default=1))
    done = 0
    slabs: list[_Slab] = []
    try:
        slabs.append(_Slab(driver, slab_bytes))
        slabs.append(_Slab(driver, slab_bytes))
        turn = 0
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for buffer in weights:
                offset, nbytes = source.place(buffer.source)
                for first_row, row_count, at, size in _pieces(buffer, nbytes):
                    slab = slabs[turn % 2]
                    turn += 1
                    driver.call("cuEventSynchronize", slab.event)
                    _read(pool, source.fileno(), slab, offset + at, size, buffer.source)
                    _place(
                        driver,
                        stream,
                        functions,
                        buffer,
                        slab,
                        loaded.memory.address(buffer.name),
                        first_row,
                        row_count,
                        at,
                        size,
                    )
                    driver.call("cuEventRecord", slab.event, stream)
                    done += size
                    if progress:
                        progress(done, total)
        driver.call("cuStreamSynchronize", stream)
    except BaseException:
        driver.give_back("cuStreamSynchronize", stream)  # copies may still read the slabs
        raise
    finally:
        for slab in slabs:
            slab.close()
    return total


def _pieces(buffer: Buffer, nbytes: int) -> list[tuple[int, int, int, int]]:
    """(first row, rows, byte offset, bytes) of slabs that hold whole tiles."""
    if buffer.layout != "tiles":
        return [(0, 0, at, min(SLAB_BYTES, nbytes - at)) for at in range(0, nbytes, SLAB_BYTES)]
    rows = buffer.shape[0]
    row_bytes = nbytes // rows
    step = max(TILE_ROWS, SLAB_BYTES // row_bytes // TILE_ROWS * TILE_ROWS)
    if step * row_bytes > SLAB_BYTES:
        raise ModelFileError(f"{row_bytes} bytes a row are more than kernels support", buffer.source)
    return [
        (first, min(step, rows - first), first * row_bytes, min(step, rows - first) * row_bytes)
        for first in range(0, rows, step)
    ]


def _read(pool: ThreadPoolExecutor, descriptor: int, slab: _Slab, offset: int, size: int, name: str) -> None:
    assert slab.host is not None
    view = slab.host.view

    def part(at: int) -> None:
        end = min(at + READ_BYTES, size)
        while at < end:
            count = os.preadv(descriptor, [view[at:end]], offset + at)
            if count == 0:
                raise ModelFileError("the file ends before the tensor does", name, offset + at)
            at += count

    list(pool.map(part, range(0, size, READ_BYTES)))


def _place(
    driver: Driver,
    stream: Any,
    functions: dict[str, Any],
    buffer: Buffer,
    slab: _Slab,
    address: int,
    first_row: int,
    row_count: int,
    at: int,
    size: int,
) -> None:
    assert slab.host is not None
    if buffer.layout != "tiles":
        driver.call("cuMemcpyHtoDAsync", address + at, slab.host.address, size, stream)
        return
    driver.call("cuMemcpyHtoDAsync", slab.device, slab.host.address, size, stream)
    rows, columns = buffer.shape
    all_tiles = -(-rows // TILE_ROWS)
    tile_bytes = buffer.nbytes // all_tiles
    tiles = -(-row_count // TILE_ROWS)
    driver.launch(
        functions[str(dict(buffer.attrs)["repack"])],
        tiles * (-(-columns // 256)),
        REPACK_THREADS,
        0,
        stream,
        (
            (slab.device, ctypes.c_void_p),
            (address + first_row // TILE_ROWS * tile_bytes, ctypes.c_void_p),
            (row_count, ctypes.c_int),
            (columns, ctypes.c_int),
        ),
    )
