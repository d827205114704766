"""Which weights a prompt's chunk makes halves of, and the kernels that count what halves do not hold of them.

Halves keep 11 bits from 2^-14 to 65,504. Quantized weights are whole multiples of a half's smallest step, so that they
only can be too large, and F16 is what it is; BF16 and F32 reach further both ways.
"""

from __future__ import annotations

from ..ir.graph import Graph
from ..ir.program import Buffer, Kernel
from ..ir.verify import product_weights
from .writer import kernel_text

THREADS = 512
COUNTS = 3
"""For each weight: values that would be infinite, values that lose bits or vanish, and values that keep theirs."""

_VALUES = {"bf16": ("word << 16", "word & 0xffff0000u"), "f32": ("word",)}
_BODY = """\
int beyond = 0, small = 0, kept = 0;
for (u64 i = (u64)blockIdx.x * {threads} + threadIdx.x; i < count; i += (u64)gridDim.x * {threads}) {{
    const u32 word = from_earlier_step(words + i), values[] = {{{values}}};
    for (u32 value : values) {{
        const float size = bits_to_float(value & 0x7fffffffu);
        if (!(size < 65520.0f)) beyond++;
        else if (size >= 0x1p-14f) kept++;
        else if (size > 0.0f) small++;
    }}
}}
beyond = lanes_sum(beyond, 32), small = lanes_sum(small, 32), kept = lanes_sum(kept, 32);
if ((threadIdx.x & 31) == 0) {{
    atomicAdd(found, (u32)beyond);
    atomicAdd(found + 1, (u32)small);
    atomicAdd(found + 2, (u32)kept);
}}
"""


def halved_weights(graph: Graph) -> tuple[str, ...]:
    """The BF16 and F32 weights that are turned into halves, or scale what is stored as halves, each once."""
    found = []
    for node in graph.nodes:
        weights = product_weights(node) if node.op.startswith("matvec") else ()
        if node.op == "rms_norm" and node.out.type.dtype == "f16":
            weights = (node.ins[1],)
        found += [weight.name for weight in weights if weight.type.dtype in _VALUES]
    return tuple(dict.fromkeys(found))


def half_range_kernel(dtype: str) -> Kernel:
    """half_range_<dtype>(words, count, found): adds to `found`, u32[COUNTS], what `count` words of values hold."""
    name = f"half_range_{dtype}"
    body = _BODY.format(threads=THREADS, values=", ".join(_VALUES[dtype]))
    comment = f"{name}: how many values halves do not hold; zeros and padding count as none of them."
    parameters = ("const u32* words", "u64 count", "u32* found")
    return Kernel(name, kernel_text(name, THREADS, parameters, body, includes=("base.cuh",), comment=(comment,)))


def half_range_buffer(step: str, weights: int) -> Buffer:
    """Where the counts of so many weights go."""
    count = COUNTS * weights
    return Buffer(f"{step}.half_range", "input", "i32", (count,), "plain", 4 * count, True)
