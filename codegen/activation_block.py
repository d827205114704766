"""How an i8x2 vector lies in memory, and what kernels write to store or read it.

256 columns are a *block* of 640 bytes: 32 lanes x (4 chunks x 4 digits), then of the four groups of a chunk
4 x (4 chunks x (scale, bias) as float32), so that a lane of a product has its share by one load of 16 bytes and two
of 32 together (`ActivationBlock` in the device header). docs/layout.md tells the numbers' meaning.

Every block of a product reads the whole vector at the same moment, and the few slices of the L2 cache that hold it
answer one after the other. So a vector is there several times, and the blocks take turns with the copies.
"""

from __future__ import annotations

from .weight_types import SUPERBLOCK_COLUMNS, superblocks

BLOCK_BYTES = 640
COPIES = 4


def copy_bytes(size: int) -> int:
    """Bytes of one copy of a vector of `size` values, padded to whole superblocks."""
    return superblocks(size) * BLOCK_BYTES


def activation_bytes(size: int) -> int:
    """Bytes of all copies of a vector of `size` values."""
    return COPIES * copy_bytes(size)


assert BLOCK_BYTES == 2 * SUPERBLOCK_COLUMNS + SUPERBLOCK_COLUMNS // 16 * 8
