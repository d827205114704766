"""The i8x2 activation: its planes, its error bound, and the families of weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from psigraph.ir.types import (
    BLOCK_SIZE,
    WEIGHT_DTYPES,
    family,
    quantize_i8x2,
    quantize_q8,
    round_i8x2,
    round_q8,
    widen_q8,
)

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@given(arrays(np.float32, (48,), elements=FINITE))
@settings(max_examples=150, deadline=None)
def test_error_is_bounded_by_the_largest_of_the_group(values):
    high, low, scale = quantize_i8x2(values)
    assert high.dtype == low.dtype == np.int8
    assert scale.dtype == np.float32
    assert min(high.min(), low.min()) >= -127
    rounded = round_i8x2(values.astype(np.float64)).reshape(3, 16)
    amax = np.abs(values.reshape(3, 16)).max(axis=1, keepdims=True).astype(np.float64)
    # Half a step of amax/32258, and float32 rounding of v * 127/amax, at most 127 * 2^-23 of a
    # step of 254, which is 0.004 steps; below 1e-35 a group counts as zero.
    assert (np.abs(rounded - values.reshape(3, 16)) <= amax * 0.51 / 32258 + 1e-35).all()


def test_zero_and_subnormal_groups():
    assert not round_i8x2(np.zeros(32)).any()
    assert not round_i8x2(np.full(16, 1e-42, dtype=np.float32)).any()


def test_value_is_scale_times_254_high_plus_low():
    values = np.linspace(-2, 3, 16, dtype=np.float32)
    high, low, scale = quantize_i8x2(values)
    np.testing.assert_array_equal(round_i8x2(values), (scale[:, None] * (254.0 * high + low)).ravel().astype("f4"))
    assert scale[0] == np.float32(3) * np.float32(1 / 32258)
    assert high[0, -1] == 127
    assert low[0, -1] == 0


def test_families():
    assert [family(dtype) for dtype in WEIGHT_DTYPES] == ["integer"] * 4 + ["float"] * 3
    assert set(BLOCK_SIZE) == set(WEIGHT_DTYPES)
    with pytest.raises(KeyError, match="i8x2 is no weight type"):
        family("i8x2")


@pytest.mark.parametrize("columns", [16, 32, 80, 128])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 300.0])
def test_a_q8_row_is_off_by_half_a_step(columns, size):
    rows = (np.random.default_rng(columns).standard_normal((3, 5, columns)) * size).astype(np.float32)
    integers, scales = quantize_q8(rows)
    assert integers.dtype == np.int8
    assert integers.shape == rows.shape
    assert scales.dtype == np.float16
    assert scales.shape == (3, 5, -(-columns // 32))
    rounded = round_q8(rows)
    assert rounded.dtype == np.float16
    np.testing.assert_array_equal(rounded, widen_q8(integers, scales))
    amax = np.repeat(np.maximum.reduceat(np.abs(rows), range(0, columns, 32), axis=-1), 32, axis=-1)[..., :columns]
    # Half a step; the scale rounded to a half, 127 times; the product rounded to a half.
    bound = amax / 254 * 1.001 + 2 * 2.0**-11 * amax + 128 * 2.0**-25
    assert (np.abs(rounded.astype(np.float64) - rows) <= bound).all()


def test_q8_has_the_numbers_of_q8_0():
    """The bytes of the `gguf` package's own q8_0, for rows whose groups are whole."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rows = np.random.default_rng(0).standard_normal((7, 128)).astype(np.float32)
    blocks = quantize(rows, GGMLQuantizationType.Q8_0).reshape(7, 4, 34)
    integers, scales = quantize_q8(rows)
    np.testing.assert_array_equal(scales.view(np.uint8).reshape(7, 4, 2), blocks[..., :2])
    np.testing.assert_array_equal(integers.view(np.uint8).reshape(7, 4, 32), blocks[..., 2:])


def test_q8_of_zeros_and_of_subnormal_numbers():
    assert not round_q8(np.zeros((2, 32))).any()
    assert not round_q8(np.full((1, 16), 1e-42, np.float32)).any()


def test_a_group_that_holds_no_number_stays_none():
    values = np.ones((3, 16), np.float32)
    values[0, 5], values[2, 7] = np.nan, np.inf
    with np.errstate(all="raise"):
        high, low, scale = quantize_i8x2(values)
    assert np.isnan(scale[0])
    assert scale[2] == np.inf
    assert (high[1] == 127).all()
    assert not high[[0, 2]].any()
    assert not low[[0, 2]].any()
