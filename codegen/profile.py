"""A Program that tells when each of its kernels ran, for `psigraph bench --profile`.

With programmatic launch kernels overlap, so their durations do not add up to the step. What
adds up is the chain: a kernel is let through when the one before it has ended, and the next
one waits for its end. Each kernel therefore notes two times of the GPU's clock: when its
first block passed the wait, and when its last warp ended. From one end to the next release
is the hand-over; from the release to the end is the kernel's own share.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.program import Buffer, Program

TRACE = "profile.trace"
PLACES = 64  # of each stamp: STAMP_PLACES in device/base.cuh
STAMPS = "PSIGRAPH_STAMPS"


def profiled(program: Program) -> Program:
    """The same step with two time stamps a launch: buffer `profile.trace`, u64[launches, 2, PLACES]; the largest of the
    places counts, for the first stamp the largest complement."""
    launches = tuple(replace(launch, args=(*launch.args, TRACE, slot)) for slot, launch in enumerate(program.launches))
    count = len(program.launches)
    trace = Buffer(TRACE, "scratch", "u64", (count, 2, PLACES), "plain", count * 16 * PLACES, zeroed=True)
    return replace(program, launches=launches, buffers=(*program.buffers, trace), defines=(*program.defines, STAMPS))
