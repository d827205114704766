"""Kernels with one bug each: it is reported by kind and line; the same kernel without it passes every check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from psigraph.codegen.device import device_headers
from psigraph.runtime.host.check import HostCheckError, KernelCall, check_kernel, compare_orders, run_build

PLANTED = Path(__file__).parent / "planted"
UNIT = 2.0**-24  # unit roundoff of float32
Text = Callable[[str], str]


def numbers(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


# name: (build that sees it, kind, words of its message, the launch)
REPORTED = {
    "missing_barrier": (
        "watch",
        "race",
        "parts[lane]|parts[threadIdx.x >> 5]",
        (4, 256, 0, [numbers(1024), np.zeros(4, np.float32)], {}),
    ),
    "off_by_one_row": (
        "address",
        "out of bounds",
        "matrix[row * columns + i]",
        (3, 128, 0, [numbers(10 * 48), numbers(48), np.zeros(10, np.float32), 10, 48], {"writes": (2,)}),
    ),
    "divergent_barrier": (
        "fast",
        "divergent barrier",
        "__syncthreads",
        (1, 64, 0, [numbers(50), np.zeros(50, np.float32), 50], {}),
    ),
    "stale_read": (
        "watch",
        "stale read",
        "__ldg(x + i)",
        (2, 64, 0, [numbers(128), np.zeros(128, np.float32)], {"produced": (0,), "writes": (1,), "programmatic": True}),
    ),
    "missing_wait": (
        "fast",
        "missing wait",
        "block 1",
        (
            2,
            64,
            0,
            [numbers(60), np.zeros(60, np.float32), 60],
            {"produced": (0,), "writes": (1,), "programmatic": True},
        ),
    ),
    "early_read": (
        "watch",
        "early read",
        "argument 0",
        (2, 64, 0, [numbers(128), np.zeros(128, np.float32)], {"produced": (0,), "writes": (1,), "programmatic": True}),
    ),
    "early_write": (
        "watch",
        "early write",
        "out[i] = 2.0f * weights[i]",
        (2, 64, 0, [numbers(128), np.zeros(128, np.float32)], {"writes": (1,), "programmatic": True}),
    ),
    "partial_warp": ("fast", "partial warp", "0xfffffc00", (1, 32, 0, [numbers(10), np.zeros(1, np.float32), 10], {})),
    "shared_overrun": (
        "address",
        "out of bounds",
        "places[threadIdx.x] =",
        (1, 64, 0, [numbers(64), np.zeros(64, np.float32)], {}),
    ),
    "misaligned_load": (
        "address",
        "misaligned",
        "const float4*",
        (1, 32, 0, [numbers(132), np.zeros(32, np.float32)], {}),
    ),
    "early_ring_read": (
        "watch",
        "bulk copy",
        "shared_memory + i * 512",
        (
            1,
            32,
            1056,
            [np.arange(1024, dtype=np.uint32).view(np.uint8)[:1024].copy(), np.zeros(32, np.uint32)],
            {"writes": (1,)},
        ),
    ),
    "block_race": (
        "watch",
        "race",
        "*out += sum",
        (4, 32, 0, [np.arange(128, dtype=np.int32), np.zeros(1, np.int32)], {"writes": (1,)}),
    ),
}


def planted(kernel_text: Text, name: str, fixed: bool) -> KernelCall:
    grid, block, shared_bytes, args, rest = REPORTED[name][3]
    return KernelCall(
        planted_source(kernel_text, name, fixed),
        name,
        grid,
        block,
        shared_bytes,
        args,
        **rest,
        headers=device_headers(),
    )


def planted_source(kernel_text: Text, name: str, fixed: bool) -> str:
    body = (PLANTED / f"{name}.cu").read_text()
    return kernel_text(f"#define FIXED 1\n{body}" if fixed else body)


@pytest.mark.parametrize("name", sorted(REPORTED))
def test_planted_bug_is_reported(kernel_text: Text, name: str) -> None:
    build, kind, words, _ = REPORTED[name]
    with pytest.raises(HostCheckError) as caught:
        run_build(planted(kernel_text, name, fixed=False), build)
    assert caught.value.kind == kind
    assert any(word in caught.value.message for word in words.split("|"))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", sorted(REPORTED))
def test_kernel_without_the_bug_passes(kernel_text: Text, name: str) -> None:
    check_kernel(planted(kernel_text, name, fixed=True))


def test_missing_barrier_shows_in_the_order_of_threads(kernel_text: Text) -> None:
    with pytest.raises(HostCheckError) as caught:
        compare_orders(planted(kernel_text, "missing_barrier", fixed=False))
    assert caught.value.kind == "order"


def within_bounds(result: np.ndarray, weights: np.ndarray, x: np.ndarray) -> bool:
    """The per-element bar: |error| <= 8 u sum |w x|, against float64."""
    exact = weights.astype(np.float64) @ x.astype(np.float64)
    return bool((np.abs(result - exact) <= 8 * UNIT * (np.abs(weights).astype(np.float64) @ np.abs(x))).all())


@pytest.mark.parametrize("fixed", [False, True])
def test_wrong_row_is_seen_by_the_bar_of_each_element(kernel_text: Text, fixed: bool) -> None:
    rows, columns = 1000, 64
    weights, x = numbers(rows * columns), numbers(columns, 2)
    args = [weights, x, np.zeros(rows, np.float32), rows, columns]
    source = planted_source(kernel_text, "shifted_row", fixed)
    call = KernelCall(source, "shifted_row", rows // 4, 128, 0, args, writes=(2,), headers=device_headers())
    result = check_kernel(call)[2]
    assert within_bounds(result, weights.reshape(rows, columns), x) is fixed


@pytest.mark.parametrize("fixed", [False, True])
def test_wrong_scale_is_seen_by_the_bar_of_each_element(kernel_text: Text, fixed: bool) -> None:
    rows, columns = 64, 256
    rng = np.random.default_rng(3)
    quants = rng.integers(-127, 128, (rows, columns // 32, 32)).astype(np.int8)
    scales = rng.uniform(0.01, 0.02, (rows, columns // 32)).astype(np.float16)
    x = numbers(columns)
    args = [quants, scales.view(np.uint16), x, np.zeros(rows, np.float32), rows, columns]
    source = planted_source(kernel_text, "wrong_scale_index", fixed)
    result = check_kernel(
        KernelCall(source, "wrong_scale_index", rows // 4, 128, 0, args, writes=(3,), headers=device_headers())
    )[3]
    weights = (quants * scales.astype(np.float32)[..., None]).reshape(rows, columns)
    assert within_bounds(result, weights, x) is fixed


@pytest.mark.parametrize("fixed", [False, True])
def test_shared_memory_that_nobody_set_is_nan(kernel_text: Text, fixed: bool) -> None:
    args = [numbers(60), np.zeros(2, np.float32), 60]
    source = planted_source(kernel_text, "unset_shared", fixed)
    result = check_kernel(KernelCall(source, "unset_shared", 1, 64, 256, args, writes=(1,), headers=device_headers()))[
        1
    ]
    assert bool(np.isfinite(result).all()) is fixed


def test_a_write_to_an_input_is_reported(kernel_text: Text) -> None:
    call = planted(kernel_text, "early_write", fixed=True)
    with pytest.raises(HostCheckError, match="argument 1"):
        run_build(
            KernelCall(
                call.source, call.name, call.grid, call.block, 0, call.args, writes=(), headers=device_headers()
            ),
            "watch",
        )
