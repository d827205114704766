"""Bit-exact repacking of weights into tiles, and its inverse, in numpy.

The runtime repacks on the device (`repack_kernel`); this is the same permutation written
twice independently, so that a test can hold one against the other, and `unpack` proves
that nothing is lost: unpack(pack(raw)) == raw for every type.

Layout of a packed [rows, columns] matrix: [tile][superblock][planes]; what the planes of
a superblock are stands beside each struct in `device/quant.cuh`. Index names:
lane = 4 g + t holds rows g and g + 8 of a tile and, of group j in chunk c, columns
64 c + 16 j + 4 t + i, i = 0..3.
"""

from __future__ import annotations

import numpy as np

from psigraph.codegen.weight_types import (
    SUPERBLOCK_COLUMNS,
    TILE_ROWS,
    WEIGHT_TYPES,
    padded_columns,
    superblocks,
    tiles,
)


def pack(raw: np.ndarray, dtype: str, rows: int, columns: int) -> np.ndarray:
    """Tiles of a matrix.

    raw: uint8, the tensor's bytes as in the file, row after row. Returns uint8 of
    `WeightType.packed_bytes`. ValueError if the byte count does not fit.
    """
    row = WEIGHT_TYPES[dtype]
    if raw.size != row.file_bytes(rows, columns):
        raise ValueError(f"{dtype}[{rows},{columns}] has {row.file_bytes(rows, columns)} bytes, not {raw.size}")
    blocks = _padded_blocks(raw, dtype, rows, columns)
    planes = _SPLIT[dtype](blocks)
    return np.ascontiguousarray(np.concatenate(planes, axis=-1)).reshape(-1)


def unpack(packed: np.ndarray, dtype: str, rows: int, columns: int) -> np.ndarray:
    """The inverse of `pack`: the tensor's bytes as in the file, padding dropped."""
    row = WEIGHT_TYPES[dtype]
    shaped = packed.reshape(tiles(rows), superblocks(columns), row.superblock_bytes)
    blocks = _JOIN[dtype](shaped)
    per_superblock = SUPERBLOCK_COLUMNS // row.block_columns
    flat = blocks.reshape(tiles(rows) * TILE_ROWS, superblocks(columns) * per_superblock, row.block_bytes)
    return np.ascontiguousarray(flat[:rows, : columns // row.block_columns]).reshape(-1)


def _padded_blocks(raw: np.ndarray, dtype: str, rows: int, columns: int) -> np.ndarray:
    """uint8[tile, 16, superblock, bytes of 256 columns], zero where the matrix ends."""
    row = WEIGHT_TYPES[dtype]
    per_superblock = SUPERBLOCK_COLUMNS // row.block_columns
    blocks = np.zeros(
        (tiles(rows) * TILE_ROWS, padded_columns(columns) // row.block_columns, row.block_bytes), np.uint8
    )
    blocks[:rows, : columns // row.block_columns] = raw.reshape(rows, -1, row.block_bytes)
    return blocks.reshape(tiles(rows), TILE_ROWS, superblocks(columns), per_superblock * row.block_bytes)


def _by_lane(values: np.ndarray) -> np.ndarray:
    """[tile, 16 rows, superblock, 256] -> [tile, superblock, c, g, t, j, row half, i]."""
    t, _, s, _ = values.shape
    split = values.reshape(t, 2, 8, s, 4, 4, 4, 4)  # tile, half, g, superblock, c, j, t, i
    return split.transpose(0, 3, 4, 2, 6, 5, 1, 7)


def _from_lanes(lanes: np.ndarray) -> np.ndarray:
    """The inverse of `_by_lane`."""
    t, s = lanes.shape[:2]
    return lanes.transpose(0, 6, 3, 1, 2, 5, 4, 7).reshape(t, 16, s, 256)


def _flat(array: np.ndarray) -> np.ndarray:
    """[tile, superblock, ...] -> uint8[tile, superblock, bytes]."""
    array = np.ascontiguousarray(array)
    return array.reshape(*array.shape[:2], -1).view(np.uint8)


def _nibble_plane(quants: np.ndarray) -> np.ndarray:
    lanes = _by_lane(quants)
    return _flat((lanes[..., 0, :] & 15) | ((lanes[..., 1, :] & 15) << 4))


def _nibbles(plane: np.ndarray) -> np.ndarray:
    t, s = plane.shape[:2]
    both = plane.reshape(t, s, 4, 8, 4, 4, 1, 4)
    return _from_lanes(np.concatenate([both & 15, both >> 4], axis=6))


def _rows_last(header: np.ndarray) -> np.ndarray:
    """[tile, row, superblock, bytes] -> [tile, superblock, row * bytes]."""
    return _flat(header.transpose(0, 2, 1, 3))


def _rows_first(plane: np.ndarray, width: int) -> np.ndarray:
    t, s = plane.shape[:2]
    return plane.reshape(t, s, 16, width).transpose(0, 2, 1, 3)


def _q4_quants(qs: np.ndarray) -> np.ndarray:
    """128 bytes -> 256 nibbles: of each 32 bytes, low nibbles first."""
    part = qs.reshape(*qs.shape[:-1], 4, 1, 32)
    return np.concatenate([part & 15, part >> 4], axis=-2).reshape(*qs.shape[:-1], 256)


def _q4_bytes(quants: np.ndarray) -> np.ndarray:
    part = quants.reshape(*quants.shape[:-1], 4, 2, 32)
    return ((part[..., 0, :] & 15) | ((part[..., 1, :] & 15) << 4)).reshape(*quants.shape[:-1], 128)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes -> 8 scales and 8 minima (ggml, get_scale_min_k4)."""
    a, b, c = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=-1)
    minima = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=-1)
    return scales, minima


def _from_six_bits(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    a = scales[..., :4] | (scales[..., 4:] >> 4 << 6)
    b = minima[..., :4] | (minima[..., 4:] >> 4 << 6)
    c = (scales[..., 4:] & 15) | (minima[..., 4:] << 4)
    return np.concatenate([a, b, c], axis=-1)


def _scale_planes(header: np.ndarray) -> np.ndarray:
    """16 bytes a row -> the 256 bytes that the device's `SixBit` reads."""
    t, _, s, _ = header.shape
    scales, minima = _six_bits(header[..., 4:])

    def split(values: np.ndarray) -> np.ndarray:  # tile, superblock, row half, half, g, c
        return values.reshape(t, 2, 8, s, 4, 2).transpose(0, 3, 1, 5, 2, 4)

    scale, minimum = split(scales), split(minima)
    planes = [_flat(scale[:, :, row] | (minimum[:, :, row] >> 4 << 6)) for row in (0, 1)]
    planes.append(_flat((minimum[:, :, 0] & 15) | (minimum[:, :, 1] << 4)))
    d = header[..., :4].reshape(t, 2, 8, s, 4).transpose(0, 3, 2, 1, 4)
    return np.concatenate([*planes, _flat(d)], axis=-1)


def _headers(planes: np.ndarray) -> np.ndarray:
    """The inverse of `_scale_planes`."""
    t, s = planes.shape[:2]
    a, b, c = (planes[..., at : at + 64].reshape(t, s, 2, 8, 4) for at in (0, 64, 128))
    scale = np.stack([a & 63, b & 63], axis=2)  # tile, superblock, row half, half, g, c
    minimum = np.stack([(c & 15) | (a >> 6 << 4), (c >> 4) | (b >> 6 << 4)], axis=2)

    def join(values: np.ndarray) -> np.ndarray:
        return values.transpose(0, 2, 4, 1, 5, 3).reshape(t, 16, s, 8)

    d = planes[..., 192:].reshape(t, s, 8, 2, 4).transpose(0, 3, 2, 1, 4).reshape(t, 16, s, 4)
    return np.concatenate([d, _from_six_bits(join(scale), join(minimum))], axis=-1)


def _split_q4_k(blocks: np.ndarray) -> list[np.ndarray]:
    return [_nibble_plane(_q4_quants(blocks[..., 16:144])), _scale_planes(blocks[..., :16])]


def _join_q4_k(packed: np.ndarray) -> np.ndarray:
    quants = _q4_bytes(_nibbles(packed[..., :2048]))
    return np.concatenate([_headers(packed[..., 2048:]), quants], axis=-1)


def _split_q5_k(blocks: np.ndarray) -> list[np.ndarray]:
    quants = _q4_quants(blocks[..., 48:176])
    bits = np.unpackbits(blocks[..., 16:48, None], axis=-1, bitorder="little")  # [.., 32 columns, 8 parts of 32]
    fifth = _by_lane(bits.swapaxes(-1, -2).reshape(*quants.shape))
    shifts = (2 * np.arange(4)[:, None, None] + np.arange(2)[:, None]).astype(np.uint8)  # j, half, 1
    plane = np.bitwise_or.reduce(np.bitwise_or.reduce(fifth << shifts, axis=-2), axis=-2)
    return [_nibble_plane(quants), _flat(plane), _scale_planes(blocks[..., :16])]


def _join_q5_k(packed: np.ndarray) -> np.ndarray:
    t, s = packed.shape[:2]
    quants = _q4_bytes(_nibbles(packed[..., :2048]))
    plane = packed[..., 2048:2560].reshape(t, s, 4, 8, 4, 1, 1, 4)
    shifts = (2 * np.arange(4)[:, None, None] + np.arange(2)[:, None]).astype(np.uint8)
    fifth = _from_lanes((plane >> shifts) & 1).reshape(t, 16, s, 8, 32).swapaxes(-1, -2)
    high = np.packbits(fifth, axis=-1, bitorder="little")[..., 0]
    return np.concatenate([_headers(packed[..., 2560:]), high, quants], axis=-1)


def _split_q6_k(blocks: np.ndarray) -> list[np.ndarray]:
    low = blocks[..., :128].reshape(*blocks.shape[:-1], 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=-2).reshape(*blocks.shape[:-1], 256)
    high = blocks[..., 128:192].reshape(*blocks.shape[:-1], 2, 1, 32)
    high = ((high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3).reshape(*blocks.shape[:-1], 256)
    lanes = _by_lane(high)  # tile, superblock, c, g, t, j, row half, i
    shifts = 2 * np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1, 1, 1)
    words = np.bitwise_or.reduce(lanes << shifts, axis=2)  # tile, superblock, g, t, j, row half, i
    plane = words.reshape(*words.shape[:4], 2, 2, 2, 4).transpose(0, 1, 4, 2, 3, 5, 6, 7)
    t, _, s, _ = blocks.shape
    scales = blocks[..., 192:208].reshape(t, 2, 8, s, 4, 4)  # tile, half, g, superblock, c, group
    scales = scales.transpose(0, 3, 2, 5, 1, 4)  # tile, superblock, g, group, half, c
    return [_nibble_plane(low), _flat(plane), _flat(scales), _rows_last(blocks[..., 208:210])]


def _join_q6_k(packed: np.ndarray) -> np.ndarray:
    t, s = packed.shape[:2]
    low = _nibbles(packed[..., :2048]).reshape(t, 16, s, 2, 2, 64)
    low = ((low[..., 0, :] & 15) | (low[..., 1, :] << 4)).reshape(t, 16, s, 128)
    plane = packed[..., 2048:3072].reshape(t, s, 2, 8, 4, 2, 2, 4).transpose(0, 1, 3, 4, 2, 5, 6, 7)
    shifts = 2 * np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1, 1, 1)
    lanes = (plane.reshape(t, s, 1, 8, 4, 4, 2, 4) >> shifts) & 3
    high = _from_lanes(lanes).reshape(t, 16, s, 2, 4, 32)
    high = np.bitwise_or.reduce(high << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=-2).reshape(t, 16, s, 64)
    scales = packed[..., 3072:3328].reshape(t, s, 8, 4, 2, 4).transpose(0, 4, 2, 1, 5, 3).reshape(t, 16, s, 16)
    return np.concatenate([low, high, scales, _rows_first(packed[..., 3328:], 2)], axis=-1)


def _split_q8_0(blocks: np.ndarray) -> list[np.ndarray]:
    t, _, s, _ = blocks.shape
    parts = blocks.reshape(t, 16, s, 8, 34)
    lanes = _by_lane((parts[..., 2:] ^ 0x80).reshape(t, 16, s, 256))  # tile, superblock, c, g, t, j, half, i
    halves = lanes.reshape(*lanes.shape[:5], 2, 2, 2, 4)  # j = 2 a + b
    plane = halves.transpose(0, 1, 2, 5, 3, 4, 6, 7, 8)  # tile, superblock, c, a, g, t, b, half, i
    return [_flat(plane), _rows_last(parts[..., :2].reshape(t, 16, s, 16))]


def _join_q8_0(packed: np.ndarray) -> np.ndarray:
    t, s = packed.shape[:2]
    plane = packed[..., :4096].reshape(t, s, 4, 2, 8, 4, 2, 2, 4).transpose(0, 1, 2, 4, 5, 3, 6, 7, 8)
    quants = _from_lanes(plane.reshape(t, s, 4, 8, 4, 4, 2, 4)).reshape(t, 16, s, 8, 32) ^ 0x80
    scales = _rows_first(packed[..., 4096:], 16).reshape(t, 16, s, 8, 2)
    return np.concatenate([scales, quants], axis=-1).reshape(t, 16, s, 272)


def _split_float(blocks: np.ndarray) -> list[np.ndarray]:
    width = blocks.shape[-1]
    values = blocks.view({512: np.uint16, 1024: np.uint32}[width])
    return [_flat(_by_lane(values).transpose(0, 1, 2, 5, 3, 4, 6, 7))]  # tile, superblock, c, j, g, t, half, i


def _join_float(packed: np.ndarray) -> np.ndarray:
    t, s, width = packed.shape
    values = packed.view({8192: np.uint16, 16384: np.uint32}[width]).reshape(t, s, 4, 4, 8, 4, 2, 4)
    return np.ascontiguousarray(_from_lanes(values.transpose(0, 1, 2, 4, 5, 3, 6, 7))).view(np.uint8)


_SPLIT = {
    "q4_k": _split_q4_k,
    "q5_k": _split_q5_k,
    "q6_k": _split_q6_k,
    "q8_0": _split_q8_0,
    "f16": _split_float,
    "bf16": _split_float,
    "f32": _split_float,
}
_JOIN = {
    "q4_k": _join_q4_k,
    "q5_k": _join_q5_k,
    "q6_k": _join_q6_k,
    "q8_0": _join_q8_0,
    "f16": _join_float,
    "bf16": _join_float,
    "f32": _join_float,
}
