"""Attention of a chunk over the cache (`attend_block` of device/many_rows.cuh)."""

from __future__ import annotations

import math

from ...ir.errors import UnsupportedModelError
from ...ir.graph import Node
from ...ir.regime import Regime
from ..cache_types import CACHE_TYPES
from ..emission import Context, Emitters, KernelSpec
from ..writer import c_float
from .rows import RowKernel

THREADS, BLOCK_ROWS = 128, 64  # as in the header


def emit_attention(node: Node, ctx: Context) -> KernelSpec:
    """attention: a block a key/value head and 64 pairs of token and query head; those with most keys first."""
    q, (_, kv_heads, _, head_dim) = node.ins[0], node.ins[1].type.shape
    heads = q.type.shape[1]
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        raise UnsupportedModelError(f"head_dim {head_dim}: kernels over many rows support powers of two from 16 to 256")
    if q.type.dtype != "f16" or node.out.type.dtype != "f16":
        raise UnsupportedModelError("attention over many rows: kernels read halves and make halves for a product")
    group = heads // kv_heads
    held = CACHE_TYPES[node.ins[1].type.dtype]
    blocks = -(-ctx.rows * group // BLOCK_ROWS)
    kernel = RowKernel(node, ctx, THREADS)
    source = ctx.view(q)
    kernel.param("const u16* q", source.buffer)
    kernel.param("const u8* k_cache", ctx.read(node.ins[1]))
    kernel.param("const u8* v_cache", ctx.read(node.ins[2]))
    kernel.param("const int* positions", ctx.read(node.ins[3]))
    kernel.param("const int* count", ctx.count)
    y = ctx.write_rows(node.out)
    kernel.param("u16* y", y.buffer)
    kernel.param("int context", ctx.ctx)
    scale = c_float(float(node.attr("scale")) * math.log2(math.e))  # type: ignore[arg-type]
    body = f"""\
struct Shape {{ enum {{ HEAD_DIM = {head_dim}, GROUP = {group}, KV_HEADS = {kv_heads}, BLOCKS = {blocks},
    Q_STRIDE = {source.stride}, Y_STRIDE = {y.stride} }}; }};
attend_block<Shape, {held.chunk_tiles}>(q, k_cache, v_cache, y, positions, count, context, {scale}, stamps);
"""
    return kernel.spec(
        stem=node.op,
        include="many_rows.cuh",
        threads=THREADS,
        body=body,
        grid=kv_heads * blocks,
        cache_bytes_per_position=2 * kv_heads * held.position_bytes(head_dim),
        shared_bytes=held.chunk_bytes(head_dim, 32 if head_dim > 128 else 64),
        describe=f"{kv_heads} key/value heads x {blocks} blocks of {BLOCK_ROWS} rows, {group} query heads a token",
    )


EMITTERS: Emitters = {("attention", Regime.MANY): emit_attention}
