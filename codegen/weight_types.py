"""One row per weight type: how the file stores it, and which struct of the device header multiplies it.

A new quantization is a row here, a struct in `device/quant.cuh` that says how a
superblock of a tile is multiplied, and a struct in `device/repack.cuh` that says
where the file keeps a value. Sources: ggml's block layouts (ggml-common.h), as decoded by
the `gguf` package's `quants.dequantize`.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE_ROWS = 16
SUPERBLOCK_COLUMNS = 256


@dataclass(frozen=True)
class WeightType:
    """A weight type of the file.

    name            as in the IR and, in capitals, in GGUF.
    family          `integer`: multiplied as bytes with i8x2 activations on the tensor cores;
                    `float`: multiplied as float32 with float32 activations.
    struct          the device header's struct for a superblock of a tile.
    block_columns   columns of one block in the file.
    block_bytes     bytes of one block in the file.
    superblock_bytes  bytes of 16 rows x 256 columns in the packed form; equal to the file's
                    bytes, because packing only moves bits.
    """

    name: str
    family: str
    struct: str
    block_columns: int
    block_bytes: int
    superblock_bytes: int

    def file_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a [rows, columns] matrix in the file."""
        return rows * (columns // self.block_columns) * self.block_bytes

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a [rows, columns] matrix in tiles, padded to whole tiles and superblocks."""
        return tiles(rows) * superblocks(columns) * self.superblock_bytes


WEIGHT_TYPES: dict[str, WeightType] = {
    row.name: row
    for row in (
        WeightType("q4_k", "integer", "Q4K", 256, 144, 2304),
        WeightType("q5_k", "integer", "Q5K", 256, 176, 2816),
        WeightType("q6_k", "integer", "Q6K", 256, 210, 3360),
        WeightType("q8_0", "integer", "Q80", 32, 34, 4352),
        WeightType("f16", "float", "F16", 1, 2, 8192),
        WeightType("bf16", "float", "BF16", 1, 2, 8192),
        WeightType("f32", "float", "F32", 1, 4, 16384),
    )
}


def tiles(rows: int) -> int:
    """Tiles of 16 rows that hold `rows` rows."""
    return -(-rows // TILE_ROWS)


def superblocks(columns: int) -> int:
    """Superblocks of 256 columns that hold `columns` columns."""
    return -(-columns // SUPERBLOCK_COLUMNS)


def padded_columns(columns: int) -> int:
    """Columns after padding to whole superblocks."""
    return superblocks(columns) * SUPERBLOCK_COLUMNS
