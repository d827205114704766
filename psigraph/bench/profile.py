"""Where the time of a decode step, or of a prompt's chunk, goes, kernel by kernel (`psigraph bench --profile`).

The rows are consecutive stretches of the GPU's own clock, so they add up to the step: for
each launch the hand-over (from the end of the kernel before to its first block's release)
and its own time (from there to its last warp's end), and one row for what lies between
two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.errors import UsageError
from ..ir.program import DECODE, PREFILL, LibraryProduct, Step
from ..runtime.cuda.compiler import compile_program
from ..runtime.cuda.kernel_cache import KernelCache, default_cache_dir
from ..runtime.engine import Engine
from .stamps import PLACES, TRACE, profiled

STEPS = 40
WARM_UP = 10
POSITIONS = WARM_UP + STEPS  # that a profile fills after its ids
BETWEEN = "between steps"


@dataclass(frozen=True)
class Row:
    """One kernel of the step, all its launches together.

    own_us and handover_us are medians over steps, summed over launches; nbytes are weights,
    and the cache at the position measured; share is nbytes over own + hand-over time, as a
    part of the read bandwidth.
    """

    kernel: str
    launches: int
    own_us: float
    handover_us: float
    nbytes: int
    share: float | None

    @property
    def us(self) -> float:
        return self.own_us + self.handover_us


@dataclass(frozen=True)
class Profile:
    """The rows of a step of that name, what they add up to, and the step as events measured it without stamps,
    microseconds."""

    step: str
    rows: tuple[Row, ...]
    step_us: float
    plain_step_us: float
    position: int

    def kernels(self) -> list[dict[str, Any]]:
        """For a report's `kernels` key."""
        return [
            {
                "step": self.step,
                "name": row.kernel,
                "launches": row.launches,
                "us": row.us,
                "own_us": row.own_us,
                "handover_us": row.handover_us,
                "bytes": row.nbytes,
                "share_of_read_bandwidth": row.share,
            }
            for row in self.rows
        ]

    def summary(self) -> dict[str, float]:
        """For a report's timings: what the rows add up to, and the step without stamps."""
        return {"position": self.position, "rows_us": self.step_us, "step_us": self.plain_step_us}


def measure_profile(
    engine: Engine, arch: str, ids: Sequence[int], bandwidth: float | None, steps: int = STEPS, chunk: int = 0
) -> Profile:
    """Profile an engine's step after feeding it `ids`; the engine runs its own program again afterwards.

    bandwidth: measured read bandwidth in bytes per second, or None. chunk: profile the step that takes so many of the
    ids in at once instead, which must be ready (`Engine.prepare_prefill`). UsageError if the context cannot hold ids
    and steps.
    """
    needed = len(ids) + (0 if chunk else WARM_UP + steps)
    if needed > engine.context:
        raise UsageError(
            f"a profile needs {needed} positions and the context has {engine.context}; give a larger --ctx"
        )
    plain = engine.program
    kernels = engine.compiled
    name = PREFILL if chunk else DECODE

    def warm_up() -> None:
        engine.reset()
        engine.feed(ids)
        if not chunk:
            engine.step_times(WARM_UP)

    def times_of(count: int) -> np.ndarray:
        return engine.chunk_times(ids[:chunk], count) if chunk else engine.step_times(count)

    warm_up()
    plain_step = float(np.median(times_of(steps)))
    stamped = profiled(plain)
    compiled = compile_program(stamped, arch, KernelCache(default_cache_dir()))
    engine.adopt(stamped, compiled)
    try:
        warm_up()
        position = 0 if chunk else engine.position + steps // 2
        count = len(plain.step(name).kernels)
        times = []
        for _ in range(steps):
            engine.clear(TRACE)
            times_of(1)
            stamps = engine.read(TRACE).view(np.uint64).reshape(-1, 2, PLACES).max(axis=2)[:count]
            times.append(np.stack([~stamps[:, 0], stamps[:, 1]], axis=1).astype(np.int64))
    finally:
        engine.adopt(plain, kernels)
    return _profile(plain.step(name), np.stack(times), plain_step, position, bandwidth)


def _profile(step: Step, times: np.ndarray, plain_step: float, position: int, bandwidth: float | None) -> Profile:
    """times: int64[steps, kernels, 2], nanoseconds of release and end of each kernel."""
    releases, ends = times[..., 0], times[..., 1]
    own = np.median(ends - releases, axis=0) / 1e3
    handover = np.zeros_like(own)
    handover[1:] = np.median(releases[:, 1:] - ends[:, :-1], axis=0) / 1e3
    inside = float(np.median(ends[:, -1] - releases[:, 0])) / 1e3
    # What a library multiplies before a kernel is seen from outside only: it is that kernel's hand-over.
    library = np.zeros_like(own)
    behind = 0
    products = 0
    for launch in step.launches:
        if isinstance(launch, LibraryProduct):
            products += 1
            if behind < len(own):
                library[behind], handover[behind] = handover[behind], 0.0
        else:
            behind += 1
    rows = []
    for name in dict.fromkeys(launch.kernel for launch in step.kernels):
        slots = [slot for slot, launch in enumerate(step.kernels) if launch.kernel == name]
        nbytes = sum(
            launch.bytes_read + launch.cache_bytes_per_position * position
            for launch in (step.kernels[slot] for slot in slots)
        )
        own_us, handover_us = float(own[slots].sum()), float(handover[slots].sum())
        seconds = (own_us + handover_us) * 1e-6
        share = nbytes / seconds / bandwidth if bandwidth and seconds > 0 else None
        rows.append(Row(name, len(slots), own_us, handover_us, nbytes, share))
    if products:
        rows.append(Row("library product", products, float(library.sum()), 0.0, 0, None))
    rows.append(Row(BETWEEN, 1, max(0.0, plain_step - inside), 0.0, 0, None))
    return Profile(step.name, tuple(rows), sum(row.us for row in rows), plain_step, position)
