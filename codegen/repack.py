"""The kernels that lay a matrix out in tiles on the device, one a weight type."""

from __future__ import annotations

from ..ir.program import Kernel
from .weight_types import WEIGHT_TYPES, superblocks, tiles
from .writer import kernel_text

REPACK_THREADS = 128


def repack_kernel(dtype: str) -> Kernel:
    """repack_<dtype>(file, tiles, rows, columns): see `device/repack.cuh`; in numpy, tests/support/packing.py."""
    row = WEIGHT_TYPES[dtype]
    name = f"repack_{dtype}"
    text = kernel_text(
        name,
        REPACK_THREADS,
        ("const u8* file", "u8* tiles", "int rows", "int columns"),
        f"repack<File{row.struct}, {row.superblock_bytes}>(file, tiles, rows, columns);\n",
        includes=("repack.cuh",),
        comment=(
            f"{name}: a {dtype} matrix as the file has it -> tiles; {REPACK_THREADS} threads, a block a superblock",
        ),
    )
    return Kernel(name, text)


def repack_grid(rows: int, columns: int) -> int:
    """Blocks of a repack launch."""
    return tiles(rows) * superblocks(columns)
