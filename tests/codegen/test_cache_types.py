"""The rows of cache types: sizes, and the q8 layout there and back."""

from __future__ import annotations

import half_memory
import numpy as np
import pytest
import q8_memory

from psigraph.codegen.cache_types import CACHE_TYPES
from psigraph.ir.types import CACHE_DTYPES, quantize_q8, round_q8


def test_every_type_of_the_ir_has_a_row():
    assert tuple(CACHE_TYPES) == CACHE_DTYPES


@pytest.mark.parametrize(("head_dim", "kv_heads", "context"), [(16, 2, 7), (48, 1, 16), (64, 2, 33), (128, 3, 40)])
def test_q8_memory_there_and_back(head_dim, kv_heads, context):
    rows = np.random.default_rng(head_dim).standard_normal((kv_heads, context, head_dim)).astype(np.float32)
    integers, scales = quantize_q8(rows)
    memory = q8_memory.pack(integers, scales)
    assert memory.nbytes == CACHE_TYPES["q8"].nbytes((1, kv_heads, context, head_dim))
    found, factors = q8_memory.unpack(memory, kv_heads, head_dim)
    np.testing.assert_array_equal(found[:, :context], integers)
    np.testing.assert_array_equal(factors[:, :context], scales)
    assert not factors[:, context:].any()
    np.testing.assert_array_equal(q8_memory.pack(found, factors), memory)
    np.testing.assert_array_equal(q8_memory.values_of(memory, kv_heads, head_dim)[:, :context], round_q8(rows))


@pytest.mark.parametrize(("head_dim", "kv_heads", "context"), [(16, 2, 7), (48, 1, 16), (64, 2, 33), (128, 3, 40)])
def test_halves_there_and_back(head_dim, kv_heads, context):
    rows = np.random.default_rng(head_dim).standard_normal((kv_heads, context, head_dim)).astype(np.float16)
    memory = half_memory.pack(rows)
    assert memory.nbytes == CACHE_TYPES["f16"].nbytes((1, kv_heads, context, head_dim))
    np.testing.assert_array_equal(half_memory.unpack(memory, kv_heads, context, head_dim), rows)
    np.testing.assert_array_equal(memory[:, 0], rows[:, 0])


@pytest.mark.parametrize("parts", range(1, 33))
def test_eight_rows_of_a_part_lie_in_banks_of_their_own(parts):
    """Where a row is a whole number of 128 bytes; elsewhere places only have to be places."""
    places = half_memory.part_places(parts)
    assert (np.sort(places, axis=1) == np.arange(parts)).all()
    if parts % 8 == 0:
        assert (np.sort(places % 8, axis=0) == np.arange(8)[:, None]).all()


def test_bytes_of_a_position():
    half, q8 = CACHE_TYPES["f16"], CACHE_TYPES["q8"]
    assert half.position_bytes(128) == 256
    assert q8.position_bytes(128) == 136  # 53 % of that
    assert q8.position_bytes(80) == 80 + 2 * 3
    assert half.nbytes((1, 8, 100, 128)) == 8 * 112 * 256  # whole tiles
    assert q8.nbytes((1, 8, 100, 128)) == 8 * 112 * 136


@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_rows_and_tiles_begin_at_16_bytes(head_dim):
    for kind in CACHE_TYPES.values():
        assert kind.tile_bytes(head_dim) % 16 == 0
        if head_dim * kind.value_bytes % 128 == 0:  # `part_address` relies on it
            assert kind.tile_bytes(head_dim) % 128 == 0
