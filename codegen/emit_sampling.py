"""Choice by chance: `adjust` (biases, penalties), then `draw`, which may also move the state on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..ir.graph import Node
from ..ir.sampling import PEAK_SPAN
from .emission import Context, KernelSpec

_TALLY_BYTES = 8 + 3 * PEAK_SPAN * 8  # `struct Tally` of psigraph_sampling.cuh


def _kernel(node: Node, grid: int, parameters: Mapping[str, str | int], statements: str, written: int) -> KernelSpec:
    """Blocks of PEAK_SPAN threads. parameters: declaration -> argument; written: bytes."""
    return KernelSpec(
        stem=node.op,
        includes=("sampling.cuh",),
        threads=PEAK_SPAN,
        parameters=tuple(parameters),
        args=tuple(parameters.values()),
        body=f"let_next_kernel_start();\n{statements}",
        grid=grid,
        bytes_written=written,
    )


def _spans(size: int) -> int:
    return -(-size // PEAK_SPAN)


def emit_adjust(node: Node, ctx: Context) -> KernelSpec:
    """adjust: one thread a logit."""
    logits, token, history, sampler, position = node.ins
    size = logits.type.size
    parameters = {
        "const float* logits": ctx.read(logits),
        "const int* token": ctx.read(token),
        "const int* sampler": ctx.read(sampler),
        "const int* position": ctx.read(position),
        "float* adjusted": ctx.write(node.outs[0]),
        "float* peaks": ctx.write(node.outs[1]),
        "int* history": ctx.in_place(node.outs[2], history),
    }
    call = f"adjust_span(logits, token, sampler, position, adjusted, peaks, history, {size}, stamps);\n"
    return _kernel(node, _spans(size), parameters, call, written=4 * size)


def emit_draw(node: Node, ctx: Context) -> KernelSpec:
    """draw, draw_choose: the last block to finish chooses."""
    logits, peaks, sampler = node.ins[:3]
    size = logits.type.size
    parameters: dict[str, str | int] = {
        "const float* logits": ctx.read(logits),
        "const float* peaks": ctx.read(peaks),
        "const int* sampler": ctx.read(sampler),
    }
    move = "*token = chosen;"
    if node.op == "draw_choose":
        log, end_tokens, stop, position = node.ins[3:]
        parameters["const int* end_tokens"] = ctx.read(end_tokens)
        states = zip(("int* log", "int* stop", "int* position"), node.outs[1:], (log, stop, position), strict=True)
        parameters |= {declaration: ctx.in_place(result, state) for declaration, result, state in states}
        move = "move_on(chosen, token, log, end_tokens, stop, position);"
    else:
        parameters["const int* position"] = ctx.read(node.ins[3])
    parameters |= {
        "int* token": ctx.write(node.outs[0]),
        "Tally* tally": ctx.scratch("tally", _TALLY_BYTES, zeroed=True),
        "u64* list": ctx.scratch("candidates", 8 * size),
    }
    statements = (
        "int chosen;\n"
        f"if (draw_token<{size}>(logits, peaks, sampler, (const int*)position, tally, list, chosen, stamps)) {move}\n"
    )
    # As many blocks as run at once, with as many spans each.
    turns = -(-_spans(size) // ctx.target.sm_count)
    return _kernel(node, -(-_spans(size) // turns), parameters, statements, written=0)


SAMPLING_EMITTERS: dict[str, Callable[[Node, Context], KernelSpec]] = {
    "adjust": emit_adjust,
    "draw": emit_draw,
    "draw_choose": emit_draw,
}
