"""The kernels that lay a matrix out in tiles on the device, one a weight type."""

from __future__ import annotations

from ..ir.program import HEADER_NAME, Kernel
from .device import repack_header
from .weight_types import WEIGHT_TYPES, superblocks, tiles

REPACK_THREADS = 128


def repack_kernel(dtype: str) -> Kernel:
    """repack_<dtype>(file, tiles, rows, columns): see `psigraph_repack.cuh` and `packing`."""
    row = WEIGHT_TYPES[dtype]
    name = f"repack_{dtype}"
    text = (
        f'#include "{HEADER_NAME}"\n'
        f"// {name}: a {dtype} matrix as the file has it -> tiles; {REPACK_THREADS} threads, a block a superblock\n"
        + repack_header()
        + f'\nextern "C" __global__ void __launch_bounds__({REPACK_THREADS}) {name}'
        + "(const u8* file, u8* tiles, int rows, int columns) {\n"
        + f"    repack<File{row.struct}, {row.superblock_bytes}>(file, tiles, rows, columns);\n}}\n"
    )
    return Kernel(name, text)


def repack_grid(rows: int, columns: int) -> int:
    """Blocks of a repack launch."""
    return tiles(rows) * superblocks(columns)
