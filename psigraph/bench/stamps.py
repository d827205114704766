"""A Program that tells when each of its kernels ran, for `psigraph bench --profile`.

With programmatic launch kernels overlap, so their durations do not add up to the step. What
adds up is the chain: a kernel is let through when the one before it has ended, and the next
one waits for its end. Each kernel therefore notes two times of the GPU's clock: when its
first block passed the wait, and when its last warp ended. From one end to the next release
is the hand-over; from the release to the end is the kernel's own share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..ir.program import Buffer, Launch, LibraryProduct, Program

TRACE = "profile.trace"
PLACES = 64  # of each stamp: STAMP_PLACES in device/base.cuh
STAMPS = "PSIGRAPH_STAMPS"


def profiled(program: Program) -> Program:
    """The same steps with two time stamps a kernel: buffer `profile.trace`, u64[kernels of a step, 2, PLACES]; the
    largest of the places counts, for the first stamp the largest complement."""
    count = max(len(step.kernels) for step in program.steps)
    for step in program.steps:
        slots = iter(range(count))
        launches = tuple(_stamped(launch, slots) for launch in step.launches)
        program = program.with_step(replace(step, launches=launches))
    trace = Buffer(TRACE, "scratch", "u64", (count, 2, PLACES), "plain", count * 16 * PLACES, zeroed=True)
    return replace(program, buffers=(*program.buffers, trace), defines=(*program.defines, STAMPS))


def _stamped(launch: Launch | LibraryProduct, slots: Iterator[int]) -> Launch | LibraryProduct:
    if isinstance(launch, LibraryProduct):
        return launch
    return replace(launch, args=(*launch.args, TRACE, next(slots)))
