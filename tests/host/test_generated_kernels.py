"""Every kernel of a real step runs alone, on what it met there, in the builds that look at each load and store.

Out of bounds, misaligned, races between threads and blocks, divergent barriers, reads and writes before the wait,
stale reads, dependence on the order of threads: nothing of it in what psigraph writes. That the checks would notice
is shown on the same kernels with one line changed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from step_launches import Step, bandwidth_launch, layout_launches, step_of, texts_of

from psigraph.codegen.weight_types import WEIGHT_TYPES
from psigraph.passes.pipeline import PIPELINE
from psigraph.runtime.host.check import ORDERS, HostCheckError, KernelCall, build_all, run_build

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
Q4, Q8 = TINY / "tiny-qwen3-q4_k_m.gguf", TINY / "tiny-qwen3-q8_0.gguf"
ALL_PASSES = tuple(step.name for step in PIPELINE if not step.lowering)
WAIT = "wait_for_previous_kernel(stamps);"


def problems_of(call: KernelCall, wanted: dict[int, np.ndarray]) -> str:
    """What the checks say of a launch, or "" if nothing; wanted: argument -> what lies there after it, in any order."""
    try:
        build_all(call, ("address", "watch", "fast"))
        for build in ("address", "watch"):
            run_build(call, build)
        for order in ORDERS:
            found = run_build(call, "fast", order)
            wrong = [place for place, array in wanted.items() if found[place].tobytes() != array.tobytes()]
            if wrong:
                return f"{order}: arguments {wrong} are not what the step left"
    except HostCheckError as error:
        return f"{error.kind}: {error}"
    return ""


# Between them: every kernel of both files, fused and not, with the likeliest token and with one drawn by chance; each
# program beside the first brings those whose text the one named last has not.
@pytest.mark.parametrize(
    ("path", "disable", "sampling", "beside", "fewest", "kv_type"),
    [
        (Q4, (), False, None, 10, "f16"),
        (Q8, (), False, (Q4, ()), 7, "f16"),
        (Q4, (), True, (Q4, ()), 3, "f16"),
        pytest.param(Q4, ALL_PASSES, False, (Q4, ()), 20, "f16", marks=pytest.mark.slow),
        pytest.param(Q8, ALL_PASSES, True, (Q4, ALL_PASSES), 6, "f16", marks=pytest.mark.slow),
        (Q4, (), False, (Q4, ()), 1, "q8"),
        pytest.param(Q4, ALL_PASSES, False, (Q4, ALL_PASSES), 2, "q8", marks=pytest.mark.slow),
    ],
    ids=["q4", "q8", "q4-drawn", "q4-unfused", "q8-unfused-drawn", "q8-cache", "q8-cache-unfused"],
)
def test_kernels_of_a_step_are_sound(
    path: Path,
    disable: tuple[str, ...],
    sampling: bool,
    beside: tuple[Path, tuple[str, ...]] | None,
    fewest: int,
    kv_type: str,
) -> None:
    step = step_of(path, disable, sampling, texts_of(*beside) if beside else frozenset(), kv_type)
    assert set(step.calls) == set(step.names)
    assert len(step.names) >= fewest
    # What makes the checks sharp: kernels wait for another, whose results they read.
    assert sum(call.programmatic for call in step.calls.values()) >= len(step.names) - 1
    assert sum(bool(call.produced) for call in step.calls.values()) >= len(step.names) - 3
    found = {name: problems_of(step.calls[name], step.after[name]) for name in step.names}
    assert not any(found.values()), "\n".join(f"{name}: {what}" for name, what in found.items() if what)


@pytest.mark.parametrize("dtype", WEIGHT_TYPES)
def test_kernels_that_lay_weights_out_are_sound(dtype: str) -> None:
    call, wanted = layout_launches(40, 768)[dtype]  # the last tile and the last pair of superblocks are ragged
    assert problems_of(call, {2: wanted}) == ""


def test_the_kernel_that_measures_bandwidth_is_sound() -> None:
    assert problems_of(bandwidth_launch(), {}) == ""


# (kernel, its text or its header's, what stands there instead, the build that sees it, what it says)
CALL = "product<Shape>("
EARLY_READ = f"float early = fresh((const float*)x); {WAIT} if (early == 1e9f) partial[0] = 0.0f;"
LAST_BARRIER = "__syncthreads();\n\n    // 4. Epilogue"
CHANGES = [
    ("scaled_matvec_2", WAIT, "", "address", "missing wait"),
    ("rope_attention", WAIT, "", "watch", "early read"),
    ("scaled_matvec_2", WAIT, EARLY_READ, "watch", "early read"),
    ("scaled_matvec_2", CALL, f"if (threadIdx.x == 0) y0[blockIdx.x] = 0.0f; {CALL}", "watch", "early write"),
    ("rope_attention", WAIT, f"{WAIT} if (threadIdx.x == 0 && operands.q[0] == 1e9f) y[0] = 0;", "watch", "stale read"),
    ("scaled_matvec_2", "__syncthreads();", "", "watch", "race"),
    ("scaled_matvec_2", LAST_BARRIER, f"if (warp != 0) {LAST_BARRIER}", "address", "divergent barrier"),
    ("scaled_matvec_2", "{{y0, ", "{{y0 + 8, ", "address", "out of bounds"),
    ("scaled_matvec_2", WAIT, f"{WAIT} ((float*)x)[0] = 1.0f;", "watch", "write to input"),
]


@pytest.fixture(scope="module")
def step() -> Step:
    return step_of(Q4)


@pytest.mark.parametrize("number", range(len(CHANGES)), ids=lambda number: f"{number}-{CHANGES[number][4]}")
def test_one_changed_line_is_reported(number: int, step: Step) -> None:
    *change, build, kind = CHANGES[number]
    with pytest.raises(HostCheckError) as caught:
        run_build(step.changed(*change), build)
    assert caught.value.kind == kind, caught.value.message
