"""Tiles: the numpy permutation has an inverse and equals the repack kernels, which were written on their own."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import pack, unpack
from run_node import driver
from weights import any_bytes

from psigraph.codegen.device import device_headers
from psigraph.codegen.repack import REPACK_THREADS, repack_grid, repack_kernel
from psigraph.codegen.weight_types import WEIGHT_TYPES, padded_columns, superblocks, tiles
from psigraph.runtime import host

SHAPES = [(16, 256), (1, 256), (17, 512), (40, 768), (33, 32), (16, 96), (31, 672)]


def suits(dtype: str, columns: int) -> bool:
    return columns % WEIGHT_TYPES[dtype].block_columns == 0


@pytest.mark.parametrize("dtype", WEIGHT_TYPES)
@given(rows=st.integers(1, 50), blocks=st.integers(1, 20), seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_unpack_inverts_pack(dtype, rows, blocks, seed):
    row = WEIGHT_TYPES[dtype]
    columns = blocks * row.block_columns
    raw = any_bytes(dtype, rows, columns, seed)
    packed = pack(raw, dtype, rows, columns)
    assert packed.size == row.packed_bytes(rows, columns)
    np.testing.assert_array_equal(unpack(packed, dtype, rows, columns), raw)


@pytest.mark.parametrize("dtype", WEIGHT_TYPES)
def test_every_bit_has_one_place(dtype):
    """Each bit of the file moves exactly one bit of the tiles: nothing is shared, nothing is computed."""
    rows, columns = 16, 256
    size = WEIGHT_TYPES[dtype].file_bytes(rows, columns)
    base = pack(np.zeros(size, np.uint8), dtype, rows, columns)
    chosen = np.random.default_rng(1).choice(size * 8, 400, replace=False)
    seen = set()
    for bit in chosen:
        raw = np.zeros(size, np.uint8)
        raw[bit // 8] = 1 << (bit % 8)
        changed = np.flatnonzero(np.unpackbits(base ^ pack(raw, dtype, rows, columns)))
        assert changed.size == 1, f"bit {bit} moves {changed.size} bits"
        seen.add(int(changed[0]))
    assert len(seen) == len(chosen)


def test_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"q4_k\[16,256\] has 2304 bytes, not 2303"):
        pack(np.zeros(2303, np.uint8), "q4_k", 16, 256)


@pytest.mark.parametrize("dtype", WEIGHT_TYPES)
def test_repack_kernel_gives_the_same_tiles(dtype):
    kernel = repack_kernel(dtype)
    gpu = driver()
    module, function = gpu.load_kernel(host.compile_kernel(kernel.text, kernel.name, device_headers()), kernel.name)
    for rows, columns in SHAPES:
        if not suits(dtype, columns):
            continue
        raw = any_bytes(dtype, rows, columns, rows + columns)
        wanted = pack(raw, dtype, rows, columns)
        for order in ("forward", "reverse", "shuffle"):
            host.set_order(order)
            np.testing.assert_array_equal(
                _run(gpu, function, raw, wanted.size, rows, columns), wanted, err_msg=f"{rows} x {columns}, {order}"
            )
    host.set_order("forward")
    gpu.api.cuModuleUnload(module)


def _run(gpu, function, raw: np.ndarray, size: int, rows: int, columns: int) -> np.ndarray:
    """The tiles that the kernel writes; every byte of them, so that none of what was there before is left."""
    out = np.empty(size, np.uint8)
    file, packed = gpu.allocate(raw.size, "file"), gpu.allocate(size, "tiles")
    gpu.call("cuMemcpyHtoD", file, raw.ctypes.data, raw.size)
    gpu.call("cuMemsetD8", packed, 0xAA, size)
    args = [(file, ctypes.c_void_p), (packed, ctypes.c_void_p), (rows, ctypes.c_int), (columns, ctypes.c_int)]
    gpu.launch(function, repack_grid(rows, columns), REPACK_THREADS, 0, 0, args)
    gpu.call("cuMemcpyDtoH", out.ctypes.data, packed, size)
    gpu.call("cuMemFree", file)
    gpu.call("cuMemFree", packed)
    assert host.violations() == []
    return out


def test_sizes():
    assert (tiles(1), tiles(16), tiles(17)) == (1, 1, 2)
    assert (superblocks(1), superblocks(256), superblocks(257), padded_columns(257)) == (1, 1, 2, 512)
    for row in WEIGHT_TYPES.values():
        assert row.superblock_bytes == row.file_bytes(16, 256)
