"""The i8x2 activation: its planes, its error bound, and the families of weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from psigraph.ir.types import BLOCK_SIZE, WEIGHT_DTYPES, family, quantize_i8x2, round_i8x2

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
