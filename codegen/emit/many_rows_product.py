"""Products over many rows: `matvec`, `matvec_add` and `matvec_swiglu`.

Two ways, chosen by the machine (`lower`'s library): one kernel that turns packed weights into halves in registers and
multiplies them on the tensor cores (`device/many_rows.cuh`), or a kernel that dequantizes a matrix to halves, a
library's product over it, and where needed a kernel for what comes after.
"""

from __future__ import annotations

from ...ir.errors import UnsupportedModelError
from ...ir.graph import Node, Value
from ...ir.program import LibraryProduct
from ...ir.regime import Regime
from ...ir.verify import product_weights
from ..emission import Context, Emitters, KernelSpec, RowView
from ..weight_types import WEIGHT_TYPES, padded_columns, superblocks, tiles
from .functions import function_of
from .rows import SWIGLU_UP, RowKernel

THREADS = 256  # PRODUCT_THREADS of the header, as are the next two
BLOCK_TOKENS = 128
BLOCK_TILES = 4
SHARED_BYTES = 2 * BLOCK_TOKENS * (128 + 16) * 2  # two stages
PRODUCTS = ("matvec", "matvec_add", "matvec_swiglu")


def emit_product(node: Node, ctx: Context) -> list[KernelSpec | LibraryProduct]:
    """The launches of a product over many rows."""
    x = node.ins[0]
    if x.type.dtype != "f16":
        raise UnsupportedModelError(f"%{x.name} has other readers than products: no kernel multiplies {ctx.regime}")
    if node.op != "matvec_swiglu" and any(out.type.dtype != "f32" for out in node.outs):
        raise UnsupportedModelError(f"op {node.op}: its kernel for {ctx.regime} makes float32, not {node.outs[0].type}")
    return _by_library(node, ctx, ctx.view(x)) if ctx.library else [_by_kernel(node, ctx, ctx.view(x))]


def _weights(kernel: RowKernel, node: Node) -> list[str]:
    """The weights as C++ makes them, one parameter each."""
    made = []
    for index, weight in enumerate(product_weights(node)):
        name = kernel.param(f"const u8* weight{index}", kernel.ctx.read(weight))
        struct = WEIGHT_TYPES[weight.type.dtype].struct
        made.append(f"Weight<{struct}, {weight.type.shape[0]}>{{{name}}}")
    return made


def _types(weights: tuple[Value, ...]) -> str:
    """The C++ types of the weights, each once."""
    return ", ".join(dict.fromkeys(WEIGHT_TYPES[weight.type.dtype].struct for weight in weights))


def _file_bytes(weights: tuple[Value, ...]) -> int:
    return sum(WEIGHT_TYPES[weight.type.dtype].file_bytes(*weight.type.shape) for weight in weights)


def _by_kernel(node: Node, ctx: Context, x: RowView) -> KernelSpec:
    weights = product_weights(node)
    swiglu = node.op == "matvec_swiglu"
    rows = [weight.type.shape[0] for weight in weights]
    # A block's units: pairs of tiles, of a gate and the same tile of up, or two neighbours.
    each = BLOCK_TILES // 2 if swiglu else BLOCK_TILES
    blocks = sum(-(-tiles(count) // each) for count in (rows[:1] if swiglu else rows))
    token_blocks = -(-ctx.rows // BLOCK_TOKENS)
    kernel = RowKernel(node, ctx, THREADS)
    made = _weights(kernel, node)
    kernel.param("const u16* x", x.buffer)
    kernel.param("const int* count", ctx.count)
    types = _types(weights)
    if swiglu:
        y = kernel.result("y", node.out, SWIGLU_UP)
        function = function_of(node, "swiglu")
        call = f"product_swiglu<Shape>(x, count, {function}, {y}, stamps, {', '.join(made)})"
    else:
        applied = f", {function_of(node)}, {kernel.operand('residual', node.ins[2])}" if node.op == "matvec_add" else ""
        view = ctx.write_rows(*node.outs)
        y = f"results(FloatRows<{view.stride}>{{{kernel.param('float* y', view.buffer)}}}{applied})"
        call = f"product_rows<Shape, Types<{types}>>(x, count, {y}, stamps, {', '.join(made)})"
    shape = f"SUPERBLOCKS = {superblocks(weights[0].type.shape[1])}, TOKEN_BLOCKS = {token_blocks}, UP = {x.up}"
    return kernel.spec(
        stem=node.op,
        include="many_rows.cuh",
        threads=THREADS,
        body=f"struct Shape {{ enum {{ {shape} }}; }};\n{call};\n",
        grid=blocks * token_blocks,
        shared_bytes=SHARED_BYTES,
        bytes_read=_file_bytes(weights),
        describe=f"64 rows and {BLOCK_TOKENS} tokens a block, {token_blocks} blocks of tokens",
    )


def _by_library(node: Node, ctx: Context, x: RowView) -> list[KernelSpec | LibraryProduct]:
    weights = product_weights(node)
    columns = padded_columns(weights[0].type.shape[1])
    rows = sum(weight.type.shape[0] for weight in weights)
    halves = ctx.scratch("halves", rows * columns * 2, zeroed=True)
    launches: list[KernelSpec | LibraryProduct] = [_dequantize(node, ctx, halves, columns)]

    def product(c: str, y: str, add: bool) -> LibraryProduct:
        return LibraryProduct((), halves, x.buffer, c, y, rows, ctx.rows, columns, add, x.up)

    if node.op == "matvec" or (node.op == "matvec_add" and not node.attributes):
        y = ctx.write_rows(*node.outs).buffer
        add = node.op == "matvec_add"
        return [*launches, product(ctx.read(node.ins[2]) if add else y, y, add)]
    both = ctx.scratch("products", ctx.rows * rows * 4, zeroed=True)
    return [*launches, product(both, both, False), _after(node, ctx, both, rows)]


def _dequantize(node: Node, ctx: Context, halves: str, columns: int) -> KernelSpec:
    """The weights as halves, one matrix below the other: a warp a superblock of a tile."""
    weights = product_weights(node)
    kernel = RowKernel(node, ctx, THREADS)
    made = _weights(kernel, node)
    types = _types(weights)
    kernel.param("u16* halves", halves)
    warps = sum(tiles(weight.type.shape[0]) for weight in weights) * columns // 256
    body = (
        f"struct Shape {{ enum {{ THREADS = {THREADS}, SUPERBLOCKS = {columns // 256} }}; }};\n"
        f"wait_for_previous_kernel(stamps);\ndequantize_weights<Shape, Types<{types}>>(halves, {', '.join(made)});\n"
    )
    return kernel.spec(
        stem="dequantize",
        include="many_rows.cuh",
        threads=THREADS,
        body=body,
        grid=-(-warps // (THREADS // 32)),
        bytes_read=_file_bytes(weights),
        describe="a warp a superblock of a tile",
    )


def _after(node: Node, ctx: Context, products: str, rows: int) -> KernelSpec:
    """What comes behind a library's products: the op's function of them, and of the residual."""
    swiglu = node.op == "matvec_swiglu"
    kernel = RowKernel(node, ctx, THREADS)
    name = kernel.param("const float* products", products)
    if swiglu:
        operands = [f"Operand<{rows}, {offset}>{{{name}}}" for offset in (0, rows // 2)]
    else:
        operands = [kernel.operand("residual", node.ins[2]), f"Operand<{rows}, 0>{{{name}}}"]
    y = kernel.result("y", node.out, SWIGLU_UP if swiglu else 0)
    columns = node.out.type.size // ctx.rows
    blocks = -(-columns // THREADS)
    function = function_of(node, "swiglu" if swiglu else "")
    sizes = {"BLOCKS": blocks, "COLUMNS": columns, "WHOLE_GROUPS": columns}
    call = f"elementwise<Shape>({function}, {y}, {kernel.rows()}, stamps, {', '.join(operands)})"
    return kernel.done(ctx.rows * blocks, sizes, call, stem=f"{node.op}_end")


EMITTERS: Emitters = {(op, Regime.MANY): emit_product for op in PRODUCTS}
