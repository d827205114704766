"""Small graphs over the rows of a prompt, and what a library does in one of them."""

from __future__ import annotations

import ctypes

import numpy as np

from psigraph.ir.graph import Graph
from psigraph.ir.text import parse_graph

EPS, THETA = 1e-6, 1e6
CHUNK, CONTEXT = 96, 190


def row_states(rows: int) -> str:
    """The parameters that say which rows there are."""
    return f"state %positions: i32[{rows}], state %sequences: i32[{rows}]"


def multiply_in_numpy(w: int, x: int, c: int, y: int, rows: int, tokens: int, columns: int, add: int, up: int) -> None:
    """What `runtime.library.Library.product` does, on the host target, whose device memory is this process's."""

    def view(address: int, dtype: type[np.generic], *shape: int) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)

    product = (
        view(x, np.float16, tokens, columns).astype(np.float32)
        @ view(w, np.float16, rows, columns).astype(np.float32).T
    )
    result = product * np.float32(2.0**up)
    view(y, np.float32, tokens, rows)[:] = result + view(c, np.float32, tokens, rows) if add else result


def prefill_product_graph(dtypes: tuple[str, ...], rows: int, columns: int, tokens: int) -> Graph:
    """Every product over many rows: w0, w1 [rows, columns], w2 [fewer rows, columns]; and down [24, rows], which reads
    what SwiGLU made, where its type has blocks of that many columns."""
    types = [dtypes[index % len(dtypes)] for index in range(3)]
    few = max(8, rows // 2)
    x, y, fewer = f"f32[{tokens},{columns}]", f"f32[{tokens},{rows}]", f"f32[{tokens},{few}]"
    down = rows % 256 == 0
    return parse_graph(f"""graph products(
            weight %w0: {types[0]}[{rows},{columns}], weight %w1: {types[1]}[{rows},{columns}],
            weight %w2: {types[2]}[{few},{columns}], {f"weight %down: {types[0]}[24,{rows}]," if down else ""}
            weight %norm: f32[{columns}], state %x: {x}, state %residual: {y}, state %less: f32[{tokens},24],
            {row_states(tokens)}) {{
        %h: f16[{tokens},{columns}] = rms_norm(%x, %norm) {{eps={EPS}}}
        %q: {y}, %k: {y}, %v: {fewer} = matvec(%h, %w0, %w1, %w2)
        %more: {y} = matvec_add(%h, %w0, %residual)
        %act: f16[{tokens},{rows}] = matvec_swiglu(%h, %w0, %w1)
        {f"%x2: f32[{tokens},24] = matvec_add(%act, %down, %less)" if down else ""}
        return h=%h, q=%q, k=%k, v=%v, more=%more, act=%act {", x2=%x2" if down else ""}
    }}""")


def heads_graph(head_dim: int, group: int, kv_heads: int, kind: str = "f16") -> Graph:
    """Norms, rotation, caches and attention of a chunk of CHUNK tokens. kind: of the caches."""
    heads = group * kv_heads
    cache = f"{kind}[1,{kv_heads},{CONTEXT},{head_dim}]"
    query, key = f"f32[{CHUNK},{heads * head_dim}]", f"f32[{CHUNK},{kv_heads * head_dim}]"
    return parse_graph(f"""graph heads(weight %q_norm: f32[{head_dim}], weight %k_norm: f32[{head_dim}],
            state %q: {query}, state %k: {key}, state %v: {key}, state %k_cache: {cache}, state %v_cache: {cache},
            {row_states(CHUNK)}) {{
        %turned: f16[{CHUNK},{heads},{head_dim}], %k1: {cache}, %v1: {cache} =
            rope_append(%q, %k, %v, %q_norm, %k_norm, %k_cache, %v_cache, %positions, %sequences)
                {{eps={EPS}, theta={THETA}, heads={heads}, kv_heads={kv_heads}}}
        %y: f16[{CHUNK},{heads},{head_dim}] = attention(%turned, %k1, %v1, %positions, %sequences)
            {{scale={head_dim**-0.5}}}
        %a: f16[{CHUNK},{heads * head_dim}] = merge_heads(%y)
        return turned=%turned, a=%a, k_cache=%k1, v_cache=%v1
    }}""")
