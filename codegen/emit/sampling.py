"""Choice by chance: `adjust` (biases, penalties), then `draw`, which may also move the state on."""

from __future__ import annotations

from ...ir.graph import Node
from ...ir.regime import Regime
from ...ir.sampling import PEAK_SPAN
from ..emission import Context, Emitters, KernelSpec
from .rows import RowKernel, state_parameters

_TALLY_BYTES = 8 + 3 * PEAK_SPAN * 8  # `struct Tally` of device/sampling.cuh


def _done(kernel: RowKernel, grid: int, statements: str, written: int) -> KernelSpec:
    """Blocks of PEAK_SPAN threads; written: bytes."""
    return kernel.spec(
        stem=kernel.node.op,
        include="sampling.cuh",
        threads=PEAK_SPAN,
        body=f"let_next_kernel_start();\n{statements}\n",
        grid=grid,
        bytes_written=written,
    )


def _spans(size: int) -> int:
    return -(-size // PEAK_SPAN)


def emit_adjust(node: Node, ctx: Context) -> KernelSpec:
    """adjust: one thread a logit."""
    logits, tokens, history, sampler, positions, _ = node.ins
    size = logits.type.size
    kernel = RowKernel(node, ctx)
    kernel.param("const float* logits", ctx.read(logits))
    kernel.param("const int* token", ctx.read(tokens))
    kernel.param("const int* sampler", ctx.read(sampler))
    kernel.param("const int* position", ctx.read(positions))
    kernel.param("float* adjusted", ctx.write(node.outs[0]))
    kernel.param("float* peaks", ctx.write(node.outs[1]))
    kernel.param("int* history", ctx.in_place(node.outs[2], history))
    call = f"adjust_span(logits, token, sampler, position, adjusted, peaks, history, {size}, stamps);"
    return _done(kernel, _spans(size), call, written=4 * size)


def emit_draw(node: Node, ctx: Context) -> KernelSpec:
    """draw, draw_choose: the last block to finish chooses."""
    size = node.ins[0].type.size
    kernel = RowKernel(node, ctx)
    for name, value in zip(("const float* logits", "const float* peaks", "const int* sampler"), node.ins, strict=False):
        kernel.param(name, ctx.read(value))
    moved = "*token = chosen;"
    if node.op == "draw_choose":
        state_parameters(kernel, node)
        moved = "move_on(chosen, token, log, end_tokens, stop, position);"
    else:
        kernel.param("const int* position", ctx.read(node.ins[3]))
    kernel.param("int* token", ctx.write(node.outs[0]))
    kernel.param("Tally* tally", ctx.scratch("tally", _TALLY_BYTES, zeroed=True))
    kernel.param("u64* list", ctx.scratch("candidates", 8 * size))
    statements = (
        "int chosen;\n"
        f"if (draw_token<{size}>(logits, peaks, sampler, (const int*)position, tally, list, chosen, stamps)) {moved}"
    )
    # As many blocks as run at once, with as many spans each.
    turns = -(-_spans(size) // ctx.target.sm_count)
    return _done(kernel, -(-_spans(size) // turns), statements, written=0)


EMITTERS: Emitters = {
    ("adjust", Regime.STEP): emit_adjust,
    ("draw", Regime.STEP): emit_draw,
    ("draw_choose", Regime.STEP): emit_draw,
}
