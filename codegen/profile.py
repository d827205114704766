"""A Program that tells when each of its kernels ran, for `psigraph bench --profile`.

With programmatic launch kernels overlap, so their durations do not add up to the step. What
adds up is the chain: a kernel is let through when the one before it has ended, and the next
one waits for its end. Each kernel therefore notes two times of the GPU's clock: when its
first block passed the wait, and when its last warp ended. From one end to the next release
is the hand-over; from the release to the end is the kernel's own share.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.program import Buffer, Kernel, Launch, Program

TRACE = "profile.trace"
PLACES = 64  # of each stamp: STAMP_PLACES in the device header
_WAIT = "wait_for_previous_kernel();\n"


def profiled(program: Program) -> Program:
    """The same step with two time stamps a launch: buffer `profile.trace`, u64[launches, 2, PLACES]; the largest of the
    places counts, for the first stamp the largest complement."""
    used = {launch.kernel for launch in program.launches}
    kernels = tuple(_with_stamps(kernel) if kernel.name in used else kernel for kernel in program.kernels)
    launches = tuple(_with_slot(launch, slot) for slot, launch in enumerate(program.launches))
    count = len(program.launches)
    trace = Buffer(TRACE, "scratch", "u64", (count, 2, PLACES), "plain", count * 16 * PLACES, zeroed=True)
    return replace(program, kernels=kernels, launches=launches, buffers=(*program.buffers, trace))


def _with_slot(launch: Launch, slot: int) -> Launch:
    return replace(launch, args=(*launch.args, TRACE, slot))


def _with_stamps(kernel: Kernel) -> Kernel:
    """Two more parameters, and an object that lives from the wait to the kernel's end."""
    head, signature, body = _parts(kernel.text)
    if body.count(_WAIT) != 1:
        raise ValueError(f"kernel {kernel.name} waits {body.count(_WAIT)} times, not once")
    body = body.replace(_WAIT, _WAIT + "    const Traced traced(trace, slot);\n")
    return replace(kernel, text=f"{head}{signature}, u64* trace, int slot) {{\n{body}")


def _parts(text: str) -> tuple[str, str, str]:
    """Everything before the entry, its signature up to the closing parenthesis, its body."""
    start = text.index('extern "C" __global__')
    end = text.index(") {\n", start)
    return text[:start], text[start:end], text[end + len(") {\n") :]
