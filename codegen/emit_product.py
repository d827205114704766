"""Matrix-vector products: one emitter for every op whose result is `w @ x` and something after.

A kernel has four parts, the same for all:
  1. the ring: each warp asks for its first weights, which depend on no other kernel;
  2. the wait for the kernel before, then the warp's slice of the activations into registers,
     while one more warp runs errands (the norm's factor, the residual);
  3. the tiles: each warp multiplies its slice of each tile, sums go to shared memory;
  4. the epilogue: one thread a row adds the slices up and does what the op does after
     (`product_epilogues`).
"""

from __future__ import annotations

from ..ir.graph import Node
from .emission import Context, Emitted
from .product import Product
from .product_epilogues import EPILOGUES, Epilogue
from .shapes import product_shape
from .weight_types import WEIGHT_TYPES, padded_columns, superblocks, tiles
from .writer import Writer, c_float, signature

PRODUCTS = tuple(EPILOGUES)

_SOURCE = "source = {pointer} + ((u64){tile} * SUPERBLOCKS + from) * {struct}::BYTES; bytes = many * {struct}::BYTES;"


def emit_product(node: Node, ctx: Context, overrides: dict[str, int] | None = None) -> Emitted:
    """The kernel of a product node (see `PRODUCTS`)."""
    scaled = node.op.startswith("scaled_")
    swiglu = node.op.endswith("swiglu")
    first = 2 if scaled else 1
    x = node.ins[0]
    weights = tuple(value for value in node.ins[first:] if len(value.type.shape) == 2)
    types = tuple(WEIGHT_TYPES[weight.type.dtype] for weight in weights)
    columns = weights[0].type.shape[1]
    counts = [tiles(weight.type.shape[0]) for weight in weights]
    units = counts[0] if swiglu else sum(counts)
    widest = max(row.superblock_bytes for row in types)
    reserve = padded_columns(columns) * 4 if types[0].family == "float" else 0
    shape = product_shape(
        units, 2 if swiglu else 1, superblocks(columns), widest, ctx.target, reserve=reserve, **(overrides or {})
    )
    product = Product(
        node,
        ctx,
        weights,
        types,
        ctx.factor(node.ins[1]) if scaled else None,
        columns,
        units,
        2 if swiglu else 1,
        shape,
        [],
        [],
    )
    for index, weight in enumerate(weights):
        product.take(f"const u8* weight{index}", ctx.read(weight))
    product.take("const u8* x" if product.integer else "const float* x", ctx.read(x))
    if product.factor:
        product.take("const float* square_sums", product.factor.buffer)
    epilogue = EPILOGUES[node.op](product)
    text = _text(product, epilogue)
    bytes_read = sum(row.file_bytes(*weight.type.shape) for row, weight in zip(types, weights, strict=True))
    return Emitted(
        stem=node.op,
        body=text,
        grid=shape.grid,
        block=product.threads,
        args=tuple(product.args),
        shared_bytes=product.shared.total,
        bytes_read=bytes_read,
        describe=f"{shape.column_warps} warps share the columns, {shape.tile_warps} take turns with the tiles, "
        f"ring of {shape.depth}" + (f", a slice in {shape.pieces} pieces" if shape.pieces > 1 else ""),
    )


def _text(product: Product, epilogue: Epilogue) -> str:
    shape, writer = product.shape, Writer()
    shared = product.shared
    programmatic = product.ctx.target.programmatic
    even = product.units == shape.grid * shape.units_per_block
    even_items = even and product.tiles_per_block % shape.tile_warps == 0
    refills = shape.depth * shape.tile_warps < product.tiles_per_block * shape.pieces
    block_tiles = (
        "constexpr int block_tiles = ROWS / 16;"
        if even
        else "const int block_tiles = ((UNITS - 1 - (int)blockIdx.x) / GRID + 1) * TILES_PER_UNIT;"
    )
    items = (
        "constexpr int items = ROWS / 16 / TILE_WARPS;"
        if even_items
        else "const int items = block_tiles > tile_warp ? (block_tiles - 1 - tile_warp) / TILE_WARPS + 1 : 0;"
    )
    even_slices = product.superblocks % product.slice == 0
    count = "SLICE" if even_slices else "SUPERBLOCKS - first < SLICE ? SUPERBLOCKS - first : SLICE"
    with writer.block(signature(product.threads, product.parameters)):
        writer.lines(f"""
            constexpr int COLUMN_WARPS = {shape.column_warps}, TILE_WARPS = {shape.tile_warps}, WARPS = {shape.warps};
            constexpr int DEPTH = {shape.depth};
            constexpr int SUPERBLOCKS = {product.superblocks}, SLICE = {product.slice};  // of a row; of a warp
            constexpr int PIECES = {shape.pieces}, PIECE = {product.piece};  // stages of a slice; superblocks of one
            constexpr int STAGE = {product.piece * product.widest};  // bytes
            constexpr int GRID = {shape.grid}, UNITS = {product.units}, TILES_PER_UNIT = {product.tiles_per_unit};
            constexpr int ROWS = {product.tiles_per_block * 16};  // of a block
            extern __shared__ __align__(128) u8 shared_memory[];
            const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
            const int column_warp = warp % COLUMN_WARPS, tile_warp = warp / COLUMN_WARPS;  // warp WARPS runs errands
            const int first = column_warp * SLICE, count = {count};
            u8* ring = shared_memory + warp * (DEPTH * STAGE);
            u64* barriers = (u64*)(shared_memory + {shared.barriers}) + warp * DEPTH;
            float* partial = (float*)(shared_memory + {shared.partial});  // [column warp][row of the block]
        """)
        if not product.integer:
            writer.line(f"float* values = (float*)(shared_memory + {shared.floats});  // the activations")
        if product.factor:
            writer.line("__shared__ float shared_factor;")
        writer.lines(f"""
            // Tile number i of this block; the units of a block are GRID apart.
            {block_tiles}
            {items}
        """)
        writer.line("// Ring stage number n of this warp: a piece of its slice of a tile.")
        with writer.block("auto fetch = [&](int n)", "};"):
            writer.line("int bytes = 0;")
            writer.line("const u8* source = weight0;")
            with writer.block("if (n < items * PIECES)"):
                writer.line("int tile = n / PIECES * TILE_WARPS + tile_warp;")
                writer.line("int from = first + n % PIECES * PIECE, many = PIECES > 1 ? PIECE : count;")
                _tile_source(product, writer, _SOURCE)
            writer.line("Ring<DEPTH>::issue(barriers, n % DEPTH, ring + (n % DEPTH) * STAGE, source, bytes, lane);")
        writer.lines("""

            // 1. Weights depend on no other kernel.
            let_next_kernel_start();
            if (warp < WARPS) {
                Ring<DEPTH>::open(barriers, lane);
                #pragma unroll 1
                for (int n = 0; n < DEPTH; n++) fetch(n);
            }
        """)
        epilogue.before_wait(writer)
        if product.integer:
            columns = padded_columns(product.columns)
            writer.line("const u32* my_digits = ready(first_word(x, first, lane));")
            writer.line(f"const float2* my_factors = ready(first_factor(x, {columns}, first, lane));")
        writer.lines("""
            // 2. The activations depend on the kernel before.
            wait_for_previous_kernel();
        """)
        if not product.integer:
            with writer.block(f"for (int i = threadIdx.x; i < SUPERBLOCKS * 256; i += {product.threads})"):
                writer.line(f"values[i] = i < {product.columns} ? fresh(x + i) : 0.0f;")
            writer.line("__syncthreads();")
        with writer.block("if (warp == WARPS)"):
            if product.factor:
                f = product.factor
                arguments = f"{f.parts}, {c_float(1.0 / f.size)}, {c_float(f.eps)}, lane"
                writer.line(f"float factor = factor_from_parts<{-(-f.parts // 32)}>(square_sums, {arguments});")
                writer.line("if (lane == 0) shared_factor = factor;")
            epilogue.after_wait(writer)
        with writer.block("else"):
            _tiles(product, writer, refills or not programmatic)
        writer.line("__syncthreads();")
        writer.line()
        writer.line("// 4. One thread a row.")
        if product.factor:
            writer.line("const float factor = shared_factor;")
        with writer.block("auto row_sum = [&](int row)", "};"):
            writer.line("float sum = 0.0f;")
            writer.line("#pragma unroll")
            writer.line("for (int w = 0; w < COLUMN_WARPS; w++) sum += partial[w * ROWS + row];")
            writer.line("return sum * factor;" if product.factor else "return sum;")
        epilogue.write(writer)
    return writer.text()


def _tiles(product: Product, writer: Writer, refills: bool) -> None:
    """Part 3: the warp's slice of the activations, then its items one after the other."""
    if product.integer:
        writer.line("Digits<SLICE> slice;")
        writer.line("slice.load(my_digits, my_factors, count);")
        if any(row.name in ("q4_k", "q5_k") for row in product.types):
            writer.line("slice.find_minimum_bias(lane);")
    else:
        writer.line("Floats slice;")
        writer.line("slice.values = values + first * 256;")
    writer.line()
    writer.line("// 3. Tiles: rows g and g + 8 of each, this warp's columns.")
    writer.line("#pragma unroll 1")
    with writer.block("for (int i = 0; i < items; i++)"):
        writer.line("const int tile = i * TILE_WARPS + tile_warp;")
        writer.line("float low = 0.0f, high = 0.0f;")
        with writer.block("for_each<PIECES>([&](auto piece)", "});"):
            writer.lines("""
                const int n = i * PIECES + piece.index;
                const u8* stage = ring + (n % DEPTH) * STAGE;
                Ring<DEPTH>::wait(barriers, n % DEPTH, n / DEPTH, lane);
            """)
            _tile_product(product, writer)
            if refills:
                writer.line("Ring<DEPTH>::release();")
                writer.line("fetch(n + DEPTH);")
        writer.lines("""
            low = lanes_sum(low, 4);
            high = lanes_sum(high, 4);
            if ((lane & 3) == 0) {
                partial[column_warp * ROWS + tile * 16 + (lane >> 2)] = low;
                partial[column_warp * ROWS + tile * 16 + 8 + (lane >> 2)] = high;
            }
        """)


def _tile_source(product: Product, writer: Writer, template: str) -> None:
    """`template` for the weight that the block's tile number `tile` belongs to."""
    if product.tiles_per_unit == 2:
        writer.line("int unit = blockIdx.x + (tile >> 1) * GRID;")
        for index, row in enumerate(product.types):
            body = template.format(pointer=f"weight{index}", tile="unit", struct=row.struct)
            writer.line(f"{'if ((tile & 1) == 0)' if index == 0 else 'else'} {{ {body} }}")
        return
    writer.line("int unit = blockIdx.x + tile * GRID;")
    start = 0
    for index, (weight, row) in enumerate(zip(product.weights, product.types, strict=True)):
        end = start + tiles(weight.type.shape[0])
        body = template.format(
            pointer=f"weight{index}", tile=f"(unit - {start})" if start else "unit", struct=row.struct
        )
        last = index == len(product.weights) - 1
        head = (
            "" if len(product.weights) == 1 else ("else " if last else f"{'else ' if index else ''}if (unit < {end}) ")
        )
        writer.line(f"{head}{{ {body} }}" if head else body)
        start = end


def _tile_product(product: Product, writer: Writer) -> None:
    """`low` and `high` of an item, by its weight's type: equal types share one loop."""

    def loop(struct: str) -> None:
        writer.line("#pragma unroll")
        with writer.block("for (int s = 0; s < PIECE; s++)"):
            guard = "" if product.superblocks % product.slice == 0 else "if (s < count) "
            dot = f"{struct}::dot(stage + s * {struct}::BYTES, slice, piece.index * PIECE + s, lane, low, high);"
            writer.line(guard + dot)

    structs = [row.struct for row in product.types]
    if len(set(structs)) == 1:
        loop(structs[0])
        return
    if product.tiles_per_unit == 2:
        with writer.block("if ((tile & 1) == 0)"):
            loop(structs[0])
        with writer.block("else"):
            loop(structs[1])
        return
    writer.line("int unit = blockIdx.x + tile * GRID;")
    runs: list[tuple[str, int]] = []
    end = 0
    for weight, struct in zip(product.weights, structs, strict=True):
        end += tiles(weight.type.shape[0])
        if runs and runs[-1][0] == struct:
            runs[-1] = (struct, end)
        else:
            runs.append((struct, end))
    for index, (struct, stop) in enumerate(runs):
        head = f"if (unit < {stop})" if index == 0 else "else" if index == len(runs) - 1 else f"else if (unit < {stop})"
        with writer.block(head):
            loop(struct)
