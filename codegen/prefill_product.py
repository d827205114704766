"""Products over a chunk of tokens: `matvec`, `matvec_add` and `matvec_swiglu` with a sequence dimension.

Two ways, chosen by the machine (`lower_prefill`'s library): one kernel that turns packed weights into halves in
registers and multiplies them on the tensor cores (`multiply_block` of the prefill header), or a kernel that spreads a
matrix as halves, a library's product over it, and where needed a kernel for what comes after.
"""

from __future__ import annotations

from ..ir.errors import UnsupportedModelError
from ..ir.graph import Node, Value
from ..ir.program import LIBRARY_PRODUCT
from ..ir.verify import product_weights
from .emission import KernelSpec
from .prefill_emission import Place, PrefillContext, PrefillKernel
from .weight_types import WEIGHT_TYPES, padded_columns, superblocks, tiles

PREFILL_PRODUCTS = ("matvec", "matvec_add", "matvec_swiglu")

THREADS = 256  # PRODUCT_THREADS of the header, as are the next three
BLOCK_TOKENS = 128
BLOCK_TILES = 4
SHARED_BYTES = 2 * BLOCK_TOKENS * (128 + 16) * 2  # two stages
SWIGLU_UP = 4
"""What SwiGLU makes is stored times 2^-4: a model's largest activations are found there, and halves end at 65,504."""


def emit_prefill_product(node: Node, ctx: PrefillContext) -> list[KernelSpec]:
    """The launches of one of `PREFILL_PRODUCTS`."""
    x = node.ins[0]
    if x.type.dtype != "f16":
        raise UnsupportedModelError(
            f"%{x.name} has other readers than products: no kernel multiplies it over a sequence"
        )
    return (_by_library if ctx.library else _by_kernel)(node, ctx, ctx.place(x), product_weights(node))


def _by_kernel(node: Node, ctx: PrefillContext, x: Place, weights: tuple[Value, ...]) -> list[KernelSpec]:
    types = [WEIGHT_TYPES[weight.type.dtype] for weight in weights]
    columns = weights[0].type.shape[1]
    rows = [weight.type.shape[0] for weight in weights]
    swiglu = node.op == "matvec_swiglu"
    # A block's units: pairs of tiles, of a gate and the same tile of up, or two neighbours.
    each = BLOCK_TILES // 2 if swiglu else BLOCK_TILES
    blocks = [-(-tiles(count) // each) for count in (rows[:1] if swiglu else rows)]
    token_blocks = -(-ctx.tokens // BLOCK_TOKENS)
    kernel = PrefillKernel(f"prefill_{node.op}", THREADS)
    for index, weight in enumerate(weights):
        kernel.take(f"const u8* weight{index}", ctx.param(weight))
    kernel.take("const u16* x", x.buffer)
    kernel.take("const int* span", "span")
    if node.op == "matvec_add":
        kernel.take("const float* residual", ctx.place(node.ins[2]).buffer)
    y = ctx.write(*node.outs, up=SWIGLU_UP if swiglu else 0)
    kernel.take("u16* y" if swiglu else "float* y", y.buffer)
    writer = kernel.writer
    writer.lines(f"""
        constexpr int SUPERBLOCKS = {superblocks(columns)}, TOKEN_BLOCKS = {token_blocks};
        DYNAMIC_SHARED(shared_memory);
        const int count = span[1], first_token = blockIdx.x % TOKEN_BLOCKS * BLOCK_TOKENS;
        if (first_token >= count) return;
        int block = blockIdx.x / TOKEN_BLOCKS;
        const int pair = (threadIdx.x >> 6) & 1;  // of a block's two pairs of tiles, this warp's
        ProductSums sums;
    """)
    multiply = (
        "multiply_block<{a}, {b}, SUPERBLOCKS>(sums, {first}, {second}, x, first_token, count, (u16*)shared_memory);"
    )
    scale = f" * {float(2**x.up)}f" if x.up else ""
    if swiglu:
        a, b = (row.struct for row in types)
        last = tiles(rows[0]) - 1
        writer.lines(f"""
            const int tile = block * 2 + pair < {last} ? block * 2 + pair : {last};
            const u64 at = (u64)tile * SUPERBLOCKS;
        """)
        writer.line(multiply.format(a=a, b=b, first=f"weight0 + at * {a}::BYTES", second=f"weight1 + at * {b}::BYTES"))
        with writer.block("store_sums(sums, first_token, count, [&](int row, int token, float gate, float up)", "});"):
            writer.line("int to = (block * 2 + pair) * 16 + row;")
            value = f"silu(gate{scale}) * (up{scale})"
            writer.line(
                f"if (to < {rows[0]}) y[(u64)token * {y.stride} + to] = float_to_half({value} * {1.0 / 2**SWIGLU_UP}f);"
            )
    else:
        # Which weight the block belongs to, then one product for each type among them.
        writer.line("const u8* weight = weight0;")
        writer.line(f"int rows = {rows[0]}, offset = {y.offset}, type = 0;")
        structs = list(dict.fromkeys(row.struct for row in types))
        start, offset = 0, y.offset
        for index, count in enumerate(rows):
            if index:
                with writer.block(f"if (blockIdx.x / TOKEN_BLOCKS >= {start})"):
                    writer.line(f"weight = weight{index}, rows = {count}, offset = {offset};")
                    writer.line(
                        f"type = {structs.index(types[index].struct)}, block = blockIdx.x / TOKEN_BLOCKS - {start};"
                    )
            start, offset = start + blocks[index], offset + count
        writer.lines("""
            const int last = (rows + 15) / 16 - 1, tile = block * BLOCK_TILES + pair * 2;
            const u64 one = (u64)(tile < last ? tile : last) * SUPERBLOCKS;
            const u64 two = (u64)(tile + 1 < last ? tile + 1 : last) * SUPERBLOCKS;
        """)
        for index, struct in enumerate(structs):
            head = "" if len(structs) == 1 else f"if (type == {index}) "
            where = {"first": f"weight + one * {struct}::BYTES", "second": f"weight + two * {struct}::BYTES"}
            writer.line(head + multiply.format(a=struct, b=struct, **where))
        with writer.block("store_sums(sums, first_token, count, [&](int row, int token, float a, float b)", "});"):
            add = "residual[at] + " if node.op == "matvec_add" else ""
            add2 = "residual[at + 16] + " if node.op == "matvec_add" else ""
            writer.lines(f"""
                const int to = tile * 16 + row;
                const u64 at = (u64)token * {y.stride} + offset + to;
                if (to < rows) y[at] = {add}a{scale};
                if (to + 16 < rows) y[at + 16] = {add2}b{scale};
            """)
    read = sum(row.file_bytes(*weight.type.shape) for row, weight in zip(types, weights, strict=True))
    describe = f"64 rows and {BLOCK_TOKENS} tokens a block, {token_blocks} blocks of tokens"
    return [kernel.done(sum(blocks) * token_blocks, SHARED_BYTES, read, describe)]


def _by_library(node: Node, ctx: PrefillContext, x: Place, weights: tuple[Value, ...]) -> list[KernelSpec]:
    columns = padded_columns(weights[0].type.shape[1])
    rows = sum(weight.type.shape[0] for weight in weights)
    halves = ctx.scratch("halves", rows * columns * 2)
    spread = PrefillKernel("prefill_spread", 256)
    for index, weight in enumerate(weights):
        spread.take(f"const u8* weight{index}", ctx.param(weight))
    spread.take("u16* halves", halves)
    spread.writer.line("int which = blockIdx.x * 8 + (threadIdx.x >> 5);")
    warps = start = 0
    for index, weight in enumerate(weights):
        count, row = weight.type.shape[0], WEIGHT_TYPES[weight.type.dtype]
        own = tiles(count) * superblocks(weight.type.shape[1])
        where = f"which - {warps}" if warps else "which"
        spread.writer.line(
            f"{'else ' if index else ''}if (which < {warps + own}) spread_tile<{row.struct}>(weight{index}, "
            f"halves + (u64){start} * {columns}, {count}, {columns // 256}, {where});"
        )
        warps, start = warps + own, start + count
    read = sum(WEIGHT_TYPES[weight.type.dtype].file_bytes(*weight.type.shape) for weight in weights)
    launches = [spread.done(-(-warps // 8), bytes_read=read, describe="a warp a superblock of a tile")]
    if node.op == "matvec_swiglu":
        both = ctx.scratch("gate_and_up", ctx.tokens * rows * 4)
        launches.append(_library_call(halves, x, both, both, rows, ctx.tokens, columns, False))
        y = ctx.write(node.out, up=SWIGLU_UP)
        launches.append(_swiglu(both, y, rows // 2, ctx.tokens))
        return launches
    y = ctx.write(*node.outs)
    add = node.op == "matvec_add"
    old = ctx.place(node.ins[2]).buffer if add else y.buffer
    return [*launches, _library_call(halves, x, old, y.buffer, rows, ctx.tokens, columns, add)]


def _library_call(w: str, x: Place, c: str, y: str, rows: int, tokens: int, columns: int, add: bool) -> KernelSpec:
    return KernelSpec(LIBRARY_PRODUCT, (), 1, (), (w, x.buffer, c, y, rows, tokens, columns, int(add), x.up), "", 1)


def _swiglu(both: str, y: Place, rows: int, tokens: int) -> KernelSpec:
    kernel = PrefillKernel("prefill_swiglu", 256)
    kernel.take("const float* both", both)
    kernel.take("const int* span", "span")
    kernel.take("u16* y", y.buffer)
    across = -(-rows // 256)
    kernel.writer.lines(f"""
        const int token = blockIdx.x / {across}, at = blockIdx.x % {across} * 256 + threadIdx.x;
        if (token >= span[1] || at >= {rows}) return;
        const float* mine = both + (u64)token * {2 * rows} + at;
        y[(u64)token * {y.stride} + at] = float_to_half(silu(mine[0]) * mine[{rows}] * {1.0 / 2**SWIGLU_UP}f);
    """)
    return kernel.done(tokens * across)
