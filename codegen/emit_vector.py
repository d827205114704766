"""Small kernels: embedding, norms, elementwise ops, RoPE and cache append on their own, token choice.

In the default pipeline only the embedding stays; the others are what a fusion replaces,
and what runs when a pass is disabled. All of them wait before they read.
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir.graph import Node, Value
from .cache_types import CACHE_TYPES
from .digits import store_digits
from .emission import Context, KernelSpec
from .small_kernel import SmallKernel
from .weight_types import WEIGHT_TYPES, superblocks
from .writer import c_float

THREADS = 256
ONE_BLOCK = 1024


class _Kernel(SmallKernel):
    """The kernel of one node."""

    def __init__(self, node: Node, ctx: Context, threads: int = THREADS) -> None:
        super().__init__(node.op, threads)
        self.ctx = ctx

    def vector(self, name: str, out: Value) -> bool:
        """A result that may be i8x2; True if it is."""
        quantized = out.type.dtype == "i8x2"
        self.take(f"u8* {name}" if quantized else f"float* {name}", self.ctx.write(out))
        return quantized

    def store(self, name: str, value: str, size: int, quantized: bool) -> None:
        if quantized:
            self.writer.line(store_digits(name, value, size, f"at < {-(-size // 16) * 16}"))
        else:
            self.writer.line(f"if (at < {size}) {name}[at] = {value};")

    def start(self) -> None:
        self.writer.line("let_next_kernel_start();")
        self.writer.line("wait_for_previous_kernel(stamps);")


def _block_sum(kernel: _Kernel, value: str, result: str) -> None:
    """`result`: the sum of `value` over the block's threads, known to all of them."""
    warps = kernel.threads // 32
    kernel.writer.lines(f"""
        __shared__ float warp_sums[{warps}];
        {value} = lanes_sum({value}, 32);
        if ((threadIdx.x & 31) == 0) warp_sums[threadIdx.x >> 5] = {value};
        __syncthreads();
        float {result} = 0.0f;
        for (int w = 0; w < {warps}; w++) {result} += warp_sums[w];
    """)


def emit_embed(node: Node, ctx: Context) -> KernelSpec:
    """embed, embed_norm: one thread a column; each block leaves a partial sum of squares."""
    table = node.ins[0]
    row = WEIGHT_TYPES[table.type.dtype]
    columns = table.type.shape[1]
    blocks = -(-columns // THREADS)
    kernel = _Kernel(node, ctx)
    norm = node.op == "embed_norm"
    kernel.take("const u8* table", ctx.read(table))
    kernel.take("const int* token", ctx.read(node.ins[1]))
    kernel.take("float* x", ctx.write(node.outs[0]))
    quantized = False
    if norm:
        kernel.take("const float* norm_weight", ctx.read(node.ins[2]))
        quantized = kernel.vector("scaled", node.outs[1])
        eps = float(node.attr("eps"))  # type: ignore[arg-type]
        kernel.take("float* squares", ctx.write_factor(node.outs[2], blocks, columns, eps))
    kernel.start()
    kernel.writer.lines(f"""
        int row = fresh(token), at = blockIdx.x * {THREADS} + threadIdx.x;
        float value = 0.0f;
        if (at < {columns}) {{
            const u8* superblock = table + ((u64)(row >> 4) * {superblocks(columns)} + (at >> 8)) * {row.struct}::BYTES;
            value = {row.struct}::element(superblock, row & 15, at & 255);
            x[at] = value;
        }}
    """)
    if norm:
        kernel.writer.line(f"float weighted = at < {columns} ? value * norm_weight[at] : 0.0f;")
        kernel.store("scaled", "weighted", columns, quantized)
        kernel.writer.line("float square = value * value;")
        _block_sum(kernel, "square", "squares_of_block")
        kernel.writer.line("if (threadIdx.x == 0) squares[blockIdx.x] = squares_of_block;")
    return kernel.done(blocks, bytes_read=columns // row.block_columns * row.block_bytes)


def emit_rms_norm(node: Node, ctx: Context) -> KernelSpec:
    """rms_norm over the last axis: one block a row."""
    x, out = node.ins[0].type, node.outs[0]
    width = x.shape[-1]
    rows = x.size // width
    kernel = _Kernel(node, ctx)
    kernel.take("const float* x", ctx.read(node.ins[0]))
    kernel.take("const float* weight", ctx.read(node.ins[1]))
    quantized = kernel.vector("y", out)
    eps = float(node.attr("eps"))  # type: ignore[arg-type]
    kernel.start()
    kernel.writer.lines(f"""
        const float* row = x + blockIdx.x * {width};
        float square = 0.0f;
        for (int i = threadIdx.x; i < {width}; i += {THREADS}) {{
            float value = fresh(row + i);
            square += value * value;
        }}
    """)
    _block_sum(kernel, "square", "squares")
    with kernel.writer.block(f"for (int base = 0; base < {width}; base += {THREADS})"):
        kernel.writer.lines(f"""
            int i = base + threadIdx.x, at = blockIdx.x * {width} + i;
            float factor = rsqrtf(squares * {c_float(1.0 / width)} + {c_float(eps)});
            float value = i < {width} ? fresh(row + i) * factor * weight[i] : 0.0f;
        """)
        if quantized:
            kernel.store("y", "value", width, True)
        else:
            kernel.writer.line(f"if (i < {width}) y[at] = value;")
    return kernel.done(rows)


def emit_rms_factor(node: Node, ctx: Context) -> KernelSpec:
    """rms_factor: the sum of squares by one block; each reader finishes the factor."""
    size = node.ins[0].type.size
    kernel = _Kernel(node, ctx, ONE_BLOCK)
    kernel.take("const float* x", ctx.read(node.ins[0]))
    eps = float(node.attr("eps"))  # type: ignore[arg-type]
    kernel.take("float* squares", ctx.write_factor(node.out, 1, size, eps))
    kernel.start()
    kernel.writer.lines(f"""
        float square = 0.0f;
        for (int i = threadIdx.x; i < {size}; i += {ONE_BLOCK}) {{
            float value = fresh(x + i);
            square += value * value;
        }}
    """)
    _block_sum(kernel, "square", "sum")
    kernel.writer.line("if (threadIdx.x == 0) squares[0] = sum;")
    return kernel.done(1)


_ELEMENTWISE = {
    "add": "fresh(a + at) + fresh(b + at)",
    "mul": "fresh(a + at) * fresh(b + at)",
    "swiglu": "silu(fresh(a + at)) * fresh(b + at)",
    "quantize": "fresh(a + at)",
    "merge_heads": "fresh(a + at)",
}


def emit_elementwise(node: Node, ctx: Context) -> KernelSpec:
    """add, mul, swiglu, quantize, merge_heads into i8x2: one thread a value."""
    size = node.out.type.size
    blocks = -(-size // THREADS)
    kernel = _Kernel(node, ctx)
    for name, value in zip("ab", node.ins, strict=False):
        kernel.take(f"const float* {name}", ctx.read(value))
    quantized = kernel.vector("y", node.out)
    kernel.start()
    kernel.writer.line(f"int at = blockIdx.x * {THREADS} + threadIdx.x;")
    kernel.writer.line(f"float value = at < {size} ? {_ELEMENTWISE[node.op]} : 0.0f;")
    kernel.store("y", "value", size, quantized)
    return kernel.done(blocks)


def emit_rope(node: Node, ctx: Context) -> KernelSpec:
    """rope: one thread a pair."""
    heads, head_dim = node.out.type.shape
    pairs = heads * head_dim // 2
    kernel = _Kernel(node, ctx)
    kernel.take("const float* x", ctx.read(node.ins[0]))
    kernel.take("const int* position", ctx.read(node.ins[1]))
    kernel.take("const float2* rope", ctx.table("rope", ctx.ctx * head_dim * 4, head_dim=head_dim, **dict(node.attrs)))
    kernel.take("float* y", ctx.write(node.out))
    kernel.start()
    kernel.writer.lines(f"""
        int pair = blockIdx.x * {THREADS} + threadIdx.x;
        if (pair < {pairs}) {{
            int i = pair % {head_dim // 2}, at = pair / {head_dim // 2} * {head_dim} + i;
            float2 turn = rope[(u64)from_earlier_step(position) * {head_dim // 2} + i];
            float a = fresh(x + at), b = fresh(x + at + {head_dim // 2});
            y[at] = a * turn.x - b * turn.y;
            y[at + {head_dim // 2}] = b * turn.x + a * turn.y;
        }}
    """)
    return kernel.done(-(-pairs // THREADS))


def emit_cache_append(node: Node, ctx: Context) -> KernelSpec:
    """cache_append: the cache is changed in place."""
    kv_heads, _, head_dim = node.out.type.shape
    held = CACHE_TYPES[node.out.type.dtype]
    kernel = _Kernel(node, ctx)
    kernel.take("u8* cache", ctx.in_place(node.out, node.ins[0]))
    kernel.take("const float* row", ctx.read(node.ins[1]))
    kernel.take("const int* position", ctx.read(node.ins[2]))
    kernel.take("int context", ctx.ctx)
    kernel.start()
    kernel.writer.lines(f"""
        {held.typedef(head_dim)}
        __shared__ Cache::Row rows[{THREADS} / 32];
        const int lane = threadIdx.x & 31, head = (blockIdx.x * {THREADS} + threadIdx.x) / 32;  // a warp a head
        if (head < {kv_heads}) {{
            Cache::Row& mine = rows[threadIdx.x / 32];
            for (int i = lane; i < {head_dim}; i += 32) Cache::put(mine, i, fresh(row + head * {head_dim} + i));
            Cache::finish(mine, lane);
            Cache::store(cache + head * Cache::head_bytes(context), from_earlier_step(position), mine, lane);
        }}
    """)
    return kernel.done(-(-kv_heads * 32 // THREADS))


def emit_argmax(node: Node, ctx: Context) -> KernelSpec:
    """argmax and choose: one block over the logits; choose also moves the state on."""
    size = node.ins[0].type.size
    kernel = _Kernel(node, ctx, ONE_BLOCK)
    kernel.take("const float* logits", ctx.read(node.ins[0]))
    if node.op == "choose":
        _, log, end_tokens, stop, position = node.ins
        kernel.take("const int* end_tokens", ctx.read(end_tokens))
        for declaration, result, state in zip(
            ("int* log", "int* stop", "int* position"), node.outs[1:], (log, stop, position), strict=True
        ):
            kernel.take(declaration, ctx.in_place(result, state))
    kernel.take("int* token", ctx.write(node.outs[0]))
    kernel.start()
    kernel.writer.lines(f"""
        u64 key = 0;
        for (int i = threadIdx.x; i < {size}; i += {ONE_BLOCK}) {{
            u64 candidate = choice_key(fresh(logits + i), i);
            key = candidate > key ? candidate : key;
        }}
        for (int d = 16; d; d >>= 1) {{
            u64 other = __shfl_xor_sync(FULL_WARP, key, d);
            key = other > key ? other : key;
        }}
        __shared__ u64 warp_best[{ONE_BLOCK // 32}];
        if ((threadIdx.x & 31) == 0) warp_best[threadIdx.x >> 5] = key;
        __syncthreads();
        if (threadIdx.x == 0) {{
            for (int w = 1; w < {ONE_BLOCK // 32}; w++) key = warp_best[w] > key ? warp_best[w] : key;
    """)
    kernel.writer.line(
        "    move_on(choice_index(key), token, log, end_tokens, stop, position);"
        if node.op == "choose"
        else "    *token = choice_index(key);"
    )
    kernel.writer.line("}")
    return kernel.done(1)


def _emit_state(node: Node, ctx: Context, declarations: tuple[str, ...], state: int, statement: str) -> KernelSpec:
    """A kernel of one thread that changes one state in place. `state`: which operand it is."""
    kernel = _Kernel(node, ctx, 32)
    for index, (declaration, value) in enumerate(zip(declarations, node.ins, strict=True)):
        kernel.take(declaration, ctx.in_place(node.out, value) if index == state else ctx.read(value))
    kernel.start()
    kernel.writer.line(f"if (threadIdx.x == 0) {statement}")
    return kernel.done(1)


def emit_record(node: Node, ctx: Context) -> KernelSpec:
    """record: the token at its place in the log."""
    declarations = ("int* log", "const int* token", "const int* position")
    return _emit_state(node, ctx, declarations, 0, "log[fresh(position)] = fresh(token);")


def emit_stop_on(node: Node, ctx: Context) -> KernelSpec:
    """stop_on: set once an end token has come."""
    declarations = ("const int* token", "const int* end_tokens", "int* stop")
    statement = "for (int i = 0; i < 8; i++) if (end_tokens[i] == fresh(token)) *stop = 1;"
    return _emit_state(node, ctx, declarations, 2, statement)


def emit_advance(node: Node, ctx: Context) -> KernelSpec:
    """advance: the next position."""
    return _emit_state(node, ctx, ("int* position",), 0, "*position = fresh((const int*)position) + 1;")


VECTOR_EMITTERS: dict[str, Callable[[Node, Context], KernelSpec]] = {
    "embed": emit_embed,
    "embed_norm": emit_embed,
    "rms_norm": emit_rms_norm,
    "rms_factor": emit_rms_factor,
    "rope": emit_rope,
    "cache_append": emit_cache_append,
    "argmax": emit_argmax,
    "choose": emit_argmax,
    "record": emit_record,
    "stop_on": emit_stop_on,
    "advance": emit_advance,
    **dict.fromkeys(_ELEMENTWISE, emit_elementwise),
}
