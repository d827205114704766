"""The numerical bars of kernels, per element and as a whole.

Every kernel is held against float64 on the same dequantized weights and the same (rounded) activations, so what is
left is the rounding of float32 arithmetic. UNIT is its unit roundoff. A sum of products may be off by
SUM_UNITS * UNIT * sum(abs(w * x)): a worst case for a short chain of additions, which a kernel's tree of 4 columns
by 4 groups by lanes by warps is. The normalised mean square error catches a systematic error that stays below it.
"""

from __future__ import annotations

import numpy as np
from run_node import ActivationBlock

UNIT = 2.0**-24
SUM_UNITS = 8
NMSE = {"f32": 1e-10, "i8x2": 3e-4, "f16": 1e-6}
HALF_DIGIT = 0.5 / 32258  # of the largest value of a group: what rounding to two digits costs


def assert_close(got: np.ndarray | ActivationBlock, want: np.ndarray, bound: np.ndarray | float, what: str) -> None:
    """got within `bound` of want element by element, and NMSE below the bar of its type."""
    if isinstance(got, ActivationBlock):
        assert_digits(got, want, bound, what)
        return
    values = np.asarray(got, np.float64).ravel()
    _within(values, want.ravel(), np.broadcast_to(bound, want.shape).ravel(), what)
    _nmse(values, want.ravel(), NMSE["f16" if got.dtype == np.float16 else "f32"], what)


def assert_digits(got: ActivationBlock, want: np.ndarray, bound: np.ndarray | float, what: str) -> None:
    """An i8x2 vector that stands for `want`, itself known up to `bound`; scales, biases and padding too."""
    groups = want.reshape(-1, 16)
    limit = np.broadcast_to(bound, want.shape).reshape(groups.shape)
    largest = (np.abs(groups) + limit).max(axis=1, keepdims=True)
    # Groups of subnormal numbers are zero. inverse and products: three roundings.
    limit = limit + largest * HALF_DIGIT * 1.001 + 4 * UNIT * np.abs(groups) + 1.6e-36
    _within(got.values, want.ravel(), limit.ravel(), what)
    _nmse(got.values, want.ravel(), NMSE["i8x2"], what)
    used = got.size // 16
    assert (np.abs(got.high) <= 127).all(), what
    assert (np.abs(got.low) <= 127).all(), what
    np.testing.assert_array_equal(got.bias, got.scale * got.whole.sum(axis=1).astype(np.float32), err_msg=what)
    for part in (got.high, got.low, got.scale, got.bias):
        assert not part[used:].any(), f"{what}: padding is not zero"


def _within(got: np.ndarray, want: np.ndarray, bound: np.ndarray, what: str) -> None:
    error = np.abs(got - want)
    bad = ~(error <= bound)
    if bad.any():
        worst = int(np.argmax(np.where(bad, np.nan_to_num(error / np.maximum(bound, 1e-300), nan=np.inf), 0)))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.size} elements beyond their bound; element {worst} is {got[worst]}, "
            f"float64 says {want[worst]}, allowed {bound[worst]:.3g}"
        )


def _nmse(got: np.ndarray, want: np.ndarray, bar: float, what: str) -> None:
    power = float((want * want).sum())
    error = float(((got - want) ** 2).sum())
    # Below 1e-30 everything is subnormal or zero in the squares; the bound per element holds there.
    assert error <= bar * power + 1e-60, f"{what}: NMSE {error / power if power else np.inf:.2e}"
