"""The kernel that measures what a GPU can read, so that a report's share has its own base."""

from __future__ import annotations

from ..ir.program import Kernel
from .writer import kernel_text

PROBE_NAME = "read_bandwidth"
PROBE_THREADS = 512

_BODY = f"""\
u32 sum = 0;
const u64 stride = (u64)gridDim.x * {PROBE_THREADS};
#pragma unroll 1
for (int pass = 0; pass < passes; pass++) {{
    u64 i = (u64)blockIdx.x * {PROBE_THREADS} + threadIdx.x;
    #pragma unroll 1
    for (; i + 3 * stride < count; i += 4 * stride) {{
        uint4 v[4];
        #pragma unroll
        for (int k = 0; k < 4; k++) v[k] = from_earlier_step(data + i + k * stride);
        #pragma unroll
        for (int k = 0; k < 4; k++) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }}
    for (; i < count; i += stride) sum += from_earlier_step(data + i).x;
}}
if (sum == 0x12345678u) *out = sum;
"""


def probe_kernel() -> Kernel:
    """read_bandwidth(data, count, passes, out): reads `count` 16-byte words `passes` times, 4 in flight a thread.

    Several passes in one launch, so that its start and end do not count.
    """
    comment = (
        f"{PROBE_NAME}: plain 16-byte loads, 4 in flight a thread; the sum is written so that no load can be dropped."
    )
    parameters = ("const uint4* data", "u64 count", "int passes", "u32* out")
    return Kernel(
        PROBE_NAME,
        kernel_text(PROBE_NAME, PROBE_THREADS, parameters, _BODY, includes=("base.cuh",), comment=(comment,)),
    )
