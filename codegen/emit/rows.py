"""Small kernels over any number of rows (`device/rows.cuh`): embedding, norms, elementwise ops, rotation, cache append,
token choice.

In the default pipelines of a step only the embedding stays, in those of a prompt norms and rotation too; the others are
what a fusion replaces, and what runs when a pass is disabled.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.errors import UnsupportedModelError
from ...ir.graph import Node, Value
from ...ir.ops import OPS, ROPE_SCALING
from ...ir.regime import Regime
from ..activation_block import COPIES, copy_bytes
from ..cache_types import CACHE_TYPES
from ..emission import Context, Emitters, KernelSpec, Parameters
from ..weight_types import WEIGHT_TYPES, superblocks
from ..writer import c_float
from .functions import function_of

THREADS = 256
ONE_BLOCK = 1024
SWIGLU_UP = 4
"""What SwiGLU makes is stored times 2^-4 as halves: a model's largest activations are found there, and halves end at
65,504."""


class RowKernel(Parameters):
    """The kernel of one node under construction: parameters with their arguments, in order."""

    def __init__(self, node: Node, ctx: Context, threads: int = THREADS) -> None:
        super().__init__()
        self.node, self.ctx, self.threads = node, ctx, threads

    def operand(self, name: str, value: Value) -> str:
        """A float32 operand, as C++ makes one; UnsupportedModelError for one that lies in memory as halves."""
        if value.type.dtype != "f32":
            raise UnsupportedModelError(f"op {self.node.op}: its kernel reads float32, %{value.name} is {value.type}")
        view = self.ctx.view(value)
        stride = 0 if len(value.type.shape) == 1 else view.stride
        return f"Operand<{stride}, {view.offset}>{{{self.param(f'const float* {name}', view.buffer)}}}"

    def result(self, name: str, out: Value, up: int = 0, watched: bool = False) -> str:
        """Where a result goes, as C++ says it; UnsupportedModelError for activation blocks of several rows.

        up, and the largest of some is told; watched: halves that are infinite or none are told (`Context.beyond`).
        """
        width = out.type.size // self.ctx.rows
        if out.type.dtype == "i8x2":
            if self.ctx.rows > 1:
                raise UnsupportedModelError(f"op {self.node.op}: %{out.name} is {out.type}; i8x2 lies in one row")
            return f"ActivationRow<{COPIES}, {copy_bytes(width)}>{{{self.param(f'u8* {name}', self.ctx.write(out))}}}"
        if out.type.dtype == "f16":
            view = self.ctx.write_rows(out, up=up)
            to = self.param(f"u16* {name}", view.buffer)
            if watched:
                return f"WatchedHalfRows<{view.stride}>{{{to}, {self.param('u32* beyond', self.ctx.beyond)}}}"
            if up:
                largest = self.param("u32* largest", self.ctx.beyond)
                sampled = self.param("int sampled_slot", self.ctx.sampled_slot(self.node))
                return f"SampledHalfRows<{view.stride}, {up}>{{{to}, {largest}, {sampled}}}"
            return f"HalfRows<{view.stride}, {up}>{{{to}}}"
        return f"FloatRows<{width}>{{{self.param(f'float* {name}', self.ctx.write(out))}}}"

    def rows(self) -> str:
        """Which rows there are, as C++ says it."""
        if self.ctx.rows == 1:
            return "OneRow{}"
        return f"ManyRows{{{self.param('const int* count', self.ctx.count)}}}"

    def done(
        self, grid: int, sizes: dict[str, int], call: str, bytes_read: int = 0, before: str = "", stem: str = ""
    ) -> KernelSpec:
        """The kernel. sizes: of its shape; call: of the template; before: lines in front of it;
        stem: another name than the op's."""
        shape = ", ".join(f"{name} = {size}" for name, size in {"THREADS": self.threads, **sizes}.items())
        return self.spec(
            stem=stem or self.node.op,
            include="rows.cuh",
            threads=self.threads,
            body=f"struct Shape {{ enum {{ {shape} }}; }};\n{before}{call};\n",
            grid=grid,
            bytes_read=bytes_read,
        )


def _whole_groups(out: Value, width: int) -> int:
    """Values that a warp stores: to the end of the last group where they are quantized."""
    return -(-width // 16) * 16 if out.type.dtype == "i8x2" else width


def rope_table(node: Node, ctx: Context, head_dim: int) -> str:
    """The buffer of cosines and sines that a node's attributes describe."""
    given = {key: node.attr(key) for key in ("theta", *ROPE_SCALING) if key in node.attributes}
    return ctx.table("rope", ctx.ctx * head_dim * 4, head_dim=head_dim, **given)


def emit_embed(node: Node, ctx: Context) -> KernelSpec:
    """embed, embed_norm; each block of a deferred norm leaves a partial sum of squares."""
    table = node.ins[0]
    row, columns = WEIGHT_TYPES[table.type.dtype], table.type.shape[1]
    blocks = -(-columns // THREADS)
    if node.outs[0].type.dtype != "f32":
        raise UnsupportedModelError(f"op {node.op}: its kernel makes float32, not {node.outs[0].type}")
    kernel = RowKernel(node, ctx)
    kernel.param("const u8* table", ctx.read(table))
    kernel.param("const int* tokens", ctx.read(node.ins[1]))
    kernel.param("float* x", ctx.write(node.outs[0]))
    sizes = {"ROWS": ctx.rows, "BLOCKS": blocks, "COLUMNS": columns, "SUPERBLOCKS": superblocks(columns)}
    norm, before = "NoNorm{}", ""
    if node.op == "embed_norm":
        weight = kernel.param("const float* norm_weight", ctx.read(node.ins[2]))
        scaled = kernel.result("scaled", node.outs[1])
        factor = ctx.write_factor(node.outs[2], blocks, columns, float(node.attr("eps")))  # type: ignore[arg-type]
        squares = kernel.param("float* squares", factor)
        norm = f"DeferredNorm<decltype(out)>{{{weight}, out, {squares}}}"
        before = f"const auto out = {scaled};\n"
        sizes["WHOLE_GROUPS"] = _whole_groups(node.outs[1], columns)
    call = f"embed_kernel<Shape, {row.struct}>(table, tokens, x, {kernel.rows()}, {norm}, stamps)"
    read = ctx.rows * (columns // row.block_columns) * row.block_bytes
    return kernel.done(ctx.rows * blocks, sizes, call, read, before)


def emit_rms_norm(node: Node, ctx: Context) -> KernelSpec:
    """rms_norm over the last axis: a block a row, or a row and head."""
    shape, out = node.ins[0].type.shape, node.out
    heads = shape[1] if len(shape) == 3 else 1
    kernel = RowKernel(node, ctx)
    x = kernel.operand("x", node.ins[0])
    kernel.param("const float* weight", ctx.read(node.ins[1]))
    # Whatever goes wrong before a norm, in halves of SwiGLU say, is infinite or none here: no other kernel need look.
    y = kernel.result("y", out, watched=True)
    eps = c_float(float(node.attr("eps")))  # type: ignore[arg-type]
    sizes = {"WIDTH": shape[-1], "HEADS": heads, "WHOLE_GROUPS": _whole_groups(out, shape[-1])}
    return kernel.done(
        ctx.rows * heads, sizes, f"rms_norm_kernel<Shape>({x}, weight, {y}, {eps}, {kernel.rows()}, stamps)"
    )


def emit_rms_factor(node: Node, ctx: Context) -> KernelSpec:
    """rms_factor: one block."""
    size = node.ins[0].type.size
    kernel = RowKernel(node, ctx, ONE_BLOCK)
    kernel.param("const float* x", ctx.read(node.ins[0]))
    eps = float(node.attr("eps"))  # type: ignore[arg-type]
    kernel.param("float* squares", ctx.write_factor(node.out, 1, size, eps))
    return kernel.done(1, {"COLUMNS": size}, "rms_factor_kernel<Shape>(x, squares, stamps)")


def emit_elementwise(node: Node, ctx: Context) -> KernelSpec:
    """Whatever takes one value of each operand: the struct of the op's name, its attributes in the row's order."""
    op = OPS[node.op]
    function = function_of(node) if op.elementwise else "Quantize{}"  # merge_heads into i8x2 only stores
    columns = node.out.type.size // ctx.rows
    blocks = -(-columns // THREADS)
    kernel = RowKernel(node, ctx)
    operands = [kernel.operand(name, value) for name, value in zip(op.operands, node.ins, strict=True)]
    y = kernel.result("y", node.out, SWIGLU_UP if node.op == "swiglu" else 0)
    sizes = {"BLOCKS": blocks, "COLUMNS": columns, "WHOLE_GROUPS": _whole_groups(node.out, columns)}
    call = f"elementwise<Shape>({function}, {y}, {kernel.rows()}, stamps, {', '.join(operands)})"
    return kernel.done(ctx.rows * blocks, sizes, call)


def emit_rope(node: Node, ctx: Context) -> KernelSpec:
    """rope: one thread a pair."""
    _, heads, head_dim = node.out.type.shape
    kernel = RowKernel(node, ctx)
    x = kernel.operand("x", node.ins[0])
    kernel.param("const int* positions", ctx.read(node.ins[1]))
    kernel.param("const float2* rope_table", rope_table(node, ctx, head_dim))
    y = kernel.result("y", node.out)
    call = f"rope_kernel<Shape>({x}, positions, rope_table, {y}, {kernel.rows()}, stamps)"
    grid = -(-ctx.rows * heads * head_dim // 2 // THREADS)
    return kernel.done(grid, {"ROWS": ctx.rows, "HEADS": heads, "HEAD_DIM": head_dim}, call)


def emit_cache_append(node: Node, ctx: Context) -> KernelSpec:
    """cache_append: the cache is changed in place."""
    _, kv_heads, _, head_dim = node.out.type.shape
    kernel = RowKernel(node, ctx)
    kernel.param("u8* cache", ctx.in_place(node.out, node.ins[0]))
    x = kernel.operand("row", node.ins[1])
    kernel.param("const int* positions", ctx.read(node.ins[2]))
    kernel.param("int context", ctx.ctx)
    held = CACHE_TYPES[node.out.type.dtype].struct
    call = f"cache_append_kernel<Shape, {held}<{head_dim}>>(cache, {x}, positions, context, {kernel.rows()}, stamps)"
    grid = -(-ctx.rows * kv_heads // (THREADS // 32))
    return kernel.done(grid, {"ROWS": ctx.rows, "HEADS": kv_heads, "HEAD_DIM": head_dim}, call)


def emit_rope_append(node: Node, ctx: Context) -> KernelSpec:
    """rope_append: a warp a row and head."""
    _, kv_heads, _, head_dim = node.ins[5].type.shape
    heads, held = int(node.attr("heads")), CACHE_TYPES[node.ins[5].type.dtype].struct  # type: ignore[arg-type]
    assert node.attr("kv_heads") == kv_heads
    kernel = RowKernel(node, ctx)
    q, k, v = (kernel.operand(name, value) for name, value in zip("qkv", node.ins[:3], strict=True))
    for name, value in zip(("q_norm", "k_norm"), node.ins[3:5], strict=True):
        kernel.param(f"const float* {name}", ctx.read(value))
    kernel.param("u8* k_cache", ctx.in_place(node.outs[1], node.ins[5]))
    kernel.param("u8* v_cache", ctx.in_place(node.outs[2], node.ins[6]))
    kernel.param("const float2* rope_table", rope_table(node, ctx, head_dim))
    kernel.param("const int* positions", ctx.read(node.ins[7]))
    rotated = kernel.result("rotated", node.outs[0])
    kernel.param("int context", ctx.ctx)
    eps = c_float(float(node.attr("eps")))  # type: ignore[arg-type]
    call = (
        f"rope_append_kernel<Shape, {held}<{head_dim}>>({q}, {k}, {v}, q_norm, k_norm, k_cache, v_cache, rope_table,\n"
        f"    positions, {rotated}, context, {eps}, {kernel.rows()}, stamps)"
    )
    sizes = {"ROWS": ctx.rows, "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim}
    return kernel.done(-(-ctx.rows * (heads + 2 * kv_heads) // (THREADS // 32)), sizes, call)


def emit_argmax(node: Node, ctx: Context) -> KernelSpec:
    """argmax and choose: one block over the logits; choose also moves the state on."""
    kernel = RowKernel(node, ctx, ONE_BLOCK)
    kernel.param("const float* logits", ctx.read(node.ins[0]))
    moved = "*token = chosen;"
    if node.op == "choose":
        state_parameters(kernel, node)
        moved = "move_on(chosen, token, log, end_tokens, stop, position);"
    kernel.param("int* token", ctx.write(node.outs[0]))
    call = f"argmax_kernel<Shape>(logits, [&](int chosen) {{ {moved} }}, stamps)"
    return kernel.done(1, {"COLUMNS": node.ins[0].type.size}, call)


def state_parameters(kernel: RowKernel, node: Node) -> None:
    """What `move_on` changes and reads beside the token: the last operands of every op that chooses and moves on."""
    log, end_tokens, stop, positions, _ = node.ins[-5:]
    kernel.param("const int* end_tokens", kernel.ctx.read(end_tokens))
    names = ("int* log", "int* stop", "int* position")
    for declaration, result, state in zip(names, node.outs[-3:], (log, stop, positions), strict=True):
        kernel.param(declaration, kernel.ctx.in_place(result, state))


def emit_record(node: Node, ctx: Context) -> KernelSpec:
    """record: a thread a row."""
    kernel = RowKernel(node, ctx)
    kernel.param("int* log", ctx.in_place(node.out, node.ins[0]))
    kernel.param("const int* tokens", ctx.read(node.ins[1]))
    kernel.param("const int* positions", ctx.read(node.ins[2]))
    call = f"record_kernel<Shape>(log, tokens, positions, {kernel.rows()}, stamps)"
    return kernel.done(-(-ctx.rows // THREADS), {"ROWS": ctx.rows}, call)


def _one_thread(node: Node, ctx: Context, declarations: Sequence[str], state: int, statement: str) -> KernelSpec:
    """A kernel of one thread that changes one state in place. `state`: which operand it is."""
    kernel = RowKernel(node, ctx, 32)
    for index, (declaration, value) in enumerate(zip(declarations, node.ins, strict=False)):
        kernel.param(declaration, ctx.in_place(node.out, value) if index == state else ctx.read(value))
    lines = ("let_next_kernel_start();", "wait_for_previous_kernel(stamps);", f"if (threadIdx.x == 0) {statement}")
    return kernel.spec(node.op, "rows.cuh", 32, "\n".join(lines) + "\n", 1)


def emit_stop_on(node: Node, ctx: Context) -> KernelSpec:
    """stop_on: set once an end token has come."""
    declarations = ("const int* token", "const int* end_tokens", "int* stop")
    statement = "for (int i = 0; i < 8; i++) if (end_tokens[i] == fresh(token)) *stop = 1;"
    return _one_thread(node, ctx, declarations, 2, statement)


def emit_advance(node: Node, ctx: Context) -> KernelSpec:
    """advance: the next position."""
    return _one_thread(node, ctx, ("int* position",), 0, "*position = fresh((const int*)position) + 1;")


_ANY = {
    "embed": emit_embed,
    "rms_norm": emit_rms_norm,
    "rope": emit_rope,
    "cache_append": emit_cache_append,
    "rope_append": emit_rope_append,
    "record": emit_record,
    "merge_heads": emit_elementwise,
    **{name: emit_elementwise for name, op in OPS.items() if op.elementwise and name != "quantize"},
}
_ONE = {
    "embed_norm": emit_embed,
    "rms_factor": emit_rms_factor,
    "quantize": emit_elementwise,
    "argmax": emit_argmax,
    "choose": emit_argmax,
    "stop_on": emit_stop_on,
    "advance": emit_advance,
}
EMITTERS: Emitters = {
    **{(name, regime): emitter for name, emitter in _ANY.items() for regime in Regime},
    **{(name, Regime.STEP): emitter for name, emitter in _ONE.items()},
}
