"""Attention of a step over the KV cache: instances of `device/attention.cuh`."""

from __future__ import annotations

import math

from ...ir.errors import UnsupportedModelError
from ...ir.graph import Node
from ...ir.regime import Regime
from ..activation_block import COPIES, copy_bytes
from ..emission import Context, Emitters, KernelSpec
from ..target import RESERVED_BYTES
from ..writer import c_float
from .attention_shape import THREADS, WARPS, AttentionShape, attention_shape
from .rows import rope_table


def emit_attention(node: Node, ctx: Context) -> KernelSpec:
    """rope_attention and attention: the blocks of a key/value head share its tiles."""
    rotates = node.op == "rope_attention"
    shape, stages = attention_shape(node, ctx.target), ctx.attention_stages
    if shape.block_bytes(stages) - RESERVED_BYTES > ctx.target.shared_bytes:
        what = f"head_dim {shape.head_dim} with {shape.group} query heads a key/value head"
        raise UnsupportedModelError(f"{what} needs more shared memory than {ctx.target.arch} has")
    result = node.outs[0].type
    quantized = result.dtype == "i8x2"
    parameters: dict[str, str | int] = {"const float* q": ctx.read(node.ins[0])}
    scale = c_float(float(node.attr("scale")) * math.log2(math.e))  # type: ignore[arg-type]
    if rotates:
        assert (node.attr("heads"), node.attr("kv_heads")) == (shape.heads, shape.kv_heads)
        parameters |= _rope_parameters(node, ctx)
        eps = c_float(float(node.attr("eps")))  # type: ignore[arg-type]
        queries = f"RotatedQueries{{q, k, v, q_norm, k_norm, k_cache, v_cache, rope, {eps}, {scale}}}"
    else:
        parameters["const u8* k_cache"] = ctx.read(node.ins[1])
        parameters["const u8* v_cache"] = ctx.read(node.ins[2])
        queries = f"ReadyQueries{{q, k_cache, v_cache, {scale}}}"
    parameters["const int* position"] = ctx.read(node.ins[-2])
    parameters["u8* y" if quantized else "float* y"] = ctx.write(node.outs[0])
    combine = "CombineInCluster{}"
    if not shape.clusters:
        blocks = shape.kv_heads * shape.splits
        parameters["float* parts"] = ctx.scratch("parts", blocks * shape.group * shape.head_dim * 4)
        parameters["float2* part_tops"] = ctx.scratch("part_tops", blocks * shape.group * 8)
        parameters["u32* arrived"] = ctx.scratch("arrived", shape.kv_heads * 4, zeroed=True)
        combine = "CombineInMemory{parts, part_tops, arrived}"
    parameters["int context"] = ctx.ctx
    prefetch = "NoPrefetch{}"
    if rotates and ctx.target.programmatic:  # requests for L2 need bulk copies
        after = ctx.attention_after(node)
        parameters["const u8* next_k"] = ctx.read(after.ins[5])
        parameters["const u8* next_v"] = ctx.read(after.ins[6])
        prefetch = "PrefetchNextLayer{next_k, next_v}"
    body = f"""\
{_struct(shape, stages, result.size if quantized else 0)}
ATTENTION_SHARED(Shape);
attention_kernel<Shape>(
    shared, {queries},
    {combine}, {prefetch}, position, y, context, stamps);
"""
    return KernelSpec(
        stem=node.op,
        includes=("attention.cuh",),
        threads=THREADS,
        registers=ctx.target.attention_registers,
        parameters=tuple(parameters),
        args=tuple(parameters.values()),
        body=body,
        grid=shape.kv_heads * shape.splits,
        shared_bytes=shape.dynamic_bytes(stages),
        cluster=shape.splits if shape.clusters else 1,
        cache_bytes_per_position=2 * shape.kv_heads * shape.held.position_bytes(shape.head_dim),
        describe=f"{shape.kv_heads} key/value heads x {shape.splits} blocks, {shape.group} query heads share each read",
    )


def _rope_parameters(node: Node, ctx: Context) -> dict[str, str | int]:
    """What is read beside q to rotate q and k, and the caches that are appended to: declaration -> argument."""
    head_dim, operands = node.ins[5].type.shape[-1], ("k", "v", "q_norm", "k_norm")
    return {
        **{f"const float* {name}": ctx.read(value) for name, value in zip(operands, node.ins[1:5], strict=True)},
        "u8* k_cache": ctx.in_place(node.outs[1], node.ins[5]),
        "u8* v_cache": ctx.in_place(node.outs[2], node.ins[6]),
        "const float2* rope": rope_table(node, ctx, head_dim),
    }


def _struct(shape: AttentionShape, stages: int, digits: int) -> str:
    """The instance's sizes, and what the template's branches depend on. digits: values of an i8x2 result, or 0."""
    sizes = {
        "HEAD_DIM": shape.head_dim,
        "GROUP": shape.group,
        "SPLITS": shape.splits,
        "WARPS": WARPS,
        "STAGES": stages,
        "WARP_BYTES": shape.warp_bytes(stages),
        "BLOCK_VALUES": shape.block_values,
        "BLOCK_HEADS": shape.block_heads,
    }
    if digits:
        sizes |= {"COPIES": COPIES, "COPY_BYTES": copy_bytes(digits)}
    facts = {
        "QUANTIZED": digits > 0,
        "SEVERAL_SETS": shape.group > 4,
        "LACKS_HEADS": shape.group % 4 != 0,
        "RAGGED_HEADS": shape.head_dim % 64 != 0,
        "ODD_STAGES": stages % 2 == 1,
        "MORE_VALUES_THAN_THREADS": shape.block_values > THREADS,
    }
    return f"""\
struct Shape {{
    {shape.held.typedef(shape.head_dim)}
    enum {{ {", ".join(f"{name} = {size}" for name, size in sizes.items())} }};
    enum : bool {{ {", ".join(f"{name} = {str(fact).lower()}" for name, fact in facts.items())} }};
}};"""


EMITTERS: Emitters = {(op, Regime.STEP): emit_attention for op in ("rope_attention", "attention")}
