"""Matrix-vector products: one emitter for every op whose result is `w @ x` and something after.

A kernel has four parts, the same for all:
  1. the ring: weights, which depend on no other kernel, are asked for as soon as the kernel is resident;
  2. the wait for the kernel before, then the warp's slice of the activations into registers,
     while one more warp runs errands (the norm's factor, the residual), and another one fills the ring;
  3. the tiles: each warp multiplies its superblocks of each tile, sums go to shared memory;
  4. the epilogue: one thread a row adds the slices up and does what the op does after
     (`product_epilogues`).
"""

from __future__ import annotations

from ..ir.graph import Node
from .digits import block_copy
from .emission import Context, KernelSpec
from .product import Product
from .product_epilogues import EARLY_NUMBERS, EPILOGUES, Epilogue
from .shapes import product_shape
from .weight_types import WEIGHT_TYPES, padded_columns, superblocks, tiles
from .writer import Writer, c_float

PRODUCTS = tuple(EPILOGUES)

_SOURCE = "source = {pointer} + ((u64){tile} * SUPERBLOCKS + from) * {struct}::BYTES; bytes = many * {struct}::BYTES;"


def emit_product(node: Node, ctx: Context, overrides: dict[str, int] | None = None) -> KernelSpec:
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
    integer = types[0].family == "integer"
    reserve = 0 if integer else padded_columns(columns) * 4
    early = EARLY_NUMBERS.get(node.op, 0)
    place = ctx.place_bytes(node)
    shape = product_shape(
        units,
        2 if swiglu else 1,
        superblocks(columns),
        widest,
        ctx.target,
        reserve=reserve,
        early=early,
        place=place,
        most_warps=ctx.target.most_warps,
        **(overrides or {}),
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
        early,
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
    return KernelSpec(
        stem=node.op,
        includes=("quant.cuh", "ring.cuh"),
        threads=product.threads,
        registers=product.registers,
        parameters=tuple(product.parameters),
        args=tuple(product.args),
        body=text,
        grid=product.launched,
        shared_bytes=max(product.shared.total, place),
        bytes_read=bytes_read,
        describe=f"{shape.column_warps} warps share the columns, {shape.tile_warps} take turns with the tiles, "
        f"ring of {shape.depth}",
    )


def _text(product: Product, epilogue: Epilogue) -> str:
    shape, writer = product.shape, Writer()
    shared = product.shared
    even = product.units == shape.grid * shape.units_per_block
    even_items = even and product.tiles_per_block % shape.tile_warps == 0
    block_tiles = (
        "constexpr int block_tiles = ROWS / 16;"
        if even
        else "const int block_tiles = ((UNITS - 1 - (int)blockIdx.x) / GRID + 1) * TILES_PER_UNIT;"
    )
    items = (
        "ROWS / 16 / TILE_WARPS"
        if even_items
        else "block_tiles > tile_warp ? (block_tiles - 1 - tile_warp) / TILE_WARPS + 1 : 0"
    )
    idle = product.launched > shape.grid  # blocks that only hold their place
    if product.registers:
        writer.line(f"hold_registers<{product.registers - 6}>();")
    writer.lines(f"""
        constexpr int COLUMN_WARPS = {shape.column_warps}, TILE_WARPS = {shape.tile_warps}, WARPS = {shape.warps};
        constexpr int DEPTH = {shape.depth};
        constexpr int SUPERBLOCKS = {product.superblocks}, STEPS = {product.slice};  // of a row; stages of a tile
        constexpr int STAGE = COLUMN_WARPS * {product.widest};  // bytes: a superblock for each warp of a team
        constexpr int GRID = {shape.grid}, UNITS = {product.units}, TILES_PER_UNIT = {product.tiles_per_unit};
        constexpr int ROWS = {product.tiles_per_block * 16};  // of a block
        DYNAMIC_SHARED(shared_memory);
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;  // WARPS runs errands, the next one fills rings
        const int column_warp = warp % COLUMN_WARPS, tile_warp = warp / COLUMN_WARPS;
        u64* const barriers = (u64*)(shared_memory + {shared.barriers});  // of the ring of each team
        float* partial = (float*)(shared_memory + {shared.partial});  // [column warp][row of the block]
    """)
    if not product.integer:
        writer.line(f"float* values = (float*)(shared_memory + {shared.activations});  // the activations")
    if product.factor:
        writer.line("__shared__ float shared_factor;")
    writer.lines(f"""
        // Tile number i of this block; the units of a block are GRID apart.
        {block_tiles}
        auto items_of = [&](int tile_warp) {{ return {items}; }};
    """)
    writer.line()
    writer.line("// 1. Weights depend on no other kernel.")
    writer.line("let_next_kernel_start();")
    writer.line("typedef Ring<DEPTH, COLUMN_WARPS> TeamRing;")
    refill = ""
    if product.loads_ahead:
        refill = _load_ahead(product, writer, idle)
    else:
        _fetch(product, writer)
    epilogue.before_wait(writer)
    if product.integer:
        writer.line(f"const u8* const my_x = {block_copy('x', product.columns)};")
        writer.line("const uint4* my_digits = ready(first_words(my_x, column_warp, lane));")
        writer.line("const float4* my_factors = ready(first_factors(my_x, column_warp, lane));")
    writer.lines("""
        // 2. The activations depend on the kernel before.
        wait_for_previous_kernel(stamps);
    """)
    if idle:
        writer.line("if (blockIdx.x >= GRID) return;")
    if not product.integer:
        readers = product.shape.threads + 32  # not the warp that fills the ring: it may wait for the others
        with writer.block(f"for (int i = threadIdx.x; i < SUPERBLOCKS * 256; i += {readers})"):
            writer.line(f"if (warp <= WARPS) values[i] = i < {product.columns} ? fresh(x + i) : 0.0f;")
        writer.line(f"if (warp <= WARPS) first_threads_barrier({readers});")
    with writer.block("if (warp == WARPS)"):
        if product.factor:
            f = product.factor
            arguments = f"{f.parts}, {c_float(1.0 / f.size)}, {c_float(f.eps)}, lane"
            writer.line(f"float factor = factor_from_parts<{-(-f.parts // 32)}>(square_sums, {arguments});")
            writer.line("if (lane == 0) shared_factor = factor;")
        epilogue.after_wait(writer)
    with writer.block("else if (warp < WARPS)" if product.loads_ahead else "else"):
        _tiles(product, writer)
    if refill:
        with writer.block("else"):
            writer.lines(refill)
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


def _load_ahead(product: Product, writer: Writer, idle: bool) -> str:
    """One thread of the last warp fills a team's ring, the first stages ahead of the kernel's turn; what it does after
    the wait, for stages that come back, is returned."""
    writer.lines("""
        if (warp < WARPS && lane == 0)
            for (int stage = column_warp; stage < DEPTH; stage += COLUMN_WARPS)
                TeamRing::open(barriers + tile_warp * 2 * DEPTH, stage);
        __syncthreads();
    """)
    refilled = product.stages > product.shape.depth
    with writer.block("auto fill = [&](int n, int place, int turn)", "};"):
        writer.lines("""
            const int tile = n / STEPS * TILE_WARPS + lane, from = n % STEPS * COLUMN_WARPS;
            const int many = SUPERBLOCKS - from < COLUMN_WARPS ? SUPERBLOCKS - from : COLUMN_WARPS;
            u64* const my_barriers = barriers + lane * 2 * DEPTH;
            u8* target = shared_memory + (lane * DEPTH + place) * STAGE;
            const u8* source;
            int bytes;
        """)
        _tile_source(product, writer)
        if refilled:
            writer.line("if (n >= DEPTH) TeamRing::wait_until_read(my_barriers, place, turn, target, STAGE);")
        writer.line("TeamRing::fill(my_barriers, place, target, source, bytes, many);")
    busy = " && blockIdx.x < GRID" if idle else ""
    writer.lines(f"""
        const bool fills = warp == WARPS + 1 && lane < TILE_WARPS{busy};
        const int stages = fills ? items_of(lane) * STEPS : 0;
        constexpr int AHEAD = {product.ahead};  // stages that may be under way before the kernel's turn
        #pragma unroll 1
        for (int n = 0; n < DEPTH && n < stages; n++) {{
            if (n >= AHEAD) TeamRing::pace(barriers + lane * 2 * DEPTH, n - AHEAD);
            fill(n, n, 0);
        }}
        __syncthreads();  // a warp that waits for the kernel before would hold up the one that paces
    """)
    return (
        """
        #pragma unroll 1
        for (int n = DEPTH, place = 0, turn = 0; n < stages; n++) {
            fill(n, place, turn);
            if (++place == DEPTH) place = 0, turn ^= 1;
        }
        """
        if refilled
        else ""
    )


def _fetch(product: Product, writer: Writer) -> None:
    """Without bulk copies each warp fetches what it will multiply."""
    with writer.block("auto fetch = [&](int n)", "};"):
        writer.lines("""
            u8* target = shared_memory + (tile_warp * DEPTH + n % DEPTH) * STAGE;
            const u8* source = weight0;
            int bytes = 0;
            const int tile = n / STEPS * TILE_WARPS + tile_warp, from = n % STEPS * COLUMN_WARPS + column_warp;
        """)
        with writer.block("if (n < items_of(tile_warp) * STEPS && from < SUPERBLOCKS)"):
            writer.line("constexpr int many = 1;")
            _tile_source(product, writer)
        writer.line("TeamRing::fetch(target + column_warp * bytes, source, bytes, lane);")
    with writer.block("if (warp < WARPS)"):
        writer.line("#pragma unroll 1")
        writer.line("for (int n = 0; n < DEPTH; n++) fetch(n);")


def _tiles(product: Product, writer: Writer) -> None:
    """Part 3: the warp's slice of the activations, then its tiles one after the other.

    Of a slice up to two superblocks stay in registers; of a longer one two are there, the next one on its way.
    """
    minimum = product.integer and any(row.name in ("q4_k", "q5_k") for row in product.types)
    even = product.superblocks % product.shape.column_warps == 0
    refilled = product.stages > product.shape.depth
    if product.integer:
        held = min(product.slice, 2)
        writer.line(f"Digits slice[{held}];")
        writer.line("slice[0].load(my_digits, my_factors);")
        if held == 2:
            second = "COLUMN_WARPS" if even else "COLUMN_WARPS + column_warp < SUPERBLOCKS ? COLUMN_WARPS : 0"
            writer.line(f"const int second = ({second}) * DIGITS_STRIDE;")
            writer.line("slice[1].load(my_digits + second, my_factors + second);")
        if minimum and product.slice <= 2:
            writer.line(f"for_each<{held}>([&](auto s) {{ slice[s.index].find_minimum_bias(lane); }});")
    writer.line()
    writer.line("// 3. Tiles: rows g and g + 8 of each, this warp's columns.")
    writer.line("const int items = items_of(tile_warp);")
    if product.loads_ahead:
        writer.line("u64* const my_barriers = barriers + tile_warp * 2 * DEPTH;")
    if product.integer and product.slice > 2:
        steps = "STEPS" if even else "(SUPERBLOCKS - 1 - column_warp) / COLUMN_WARPS + 1"
        writer.line(f"const int steps = {steps};")
        writer.line("int coming = steps > 1 ? 1 : 0;  // the superblock that slice[1] holds")
    writer.line("int n = 0, place = 0, turn = 0;  // stages so far, and where the next one lies in the ring")
    writer.line("#pragma unroll 1")
    with writer.block("for (int i = 0; i < items; i++)"):
        writer.line("const int tile = i * TILE_WARPS + tile_warp;")
        writer.line("float low = 0.0f, high = 0.0f;")
        writer.line("#pragma unroll 1")
        with writer.block("for (int s = 0; s < STEPS; s++, n++)"):
            writer.line("const u8* stage = shared_memory + (tile_warp * DEPTH + place) * STAGE;")
            if product.loads_ahead:
                writer.line("TeamRing::wait(my_barriers, place, turn);")
            else:
                writer.line("TeamRing::wait_for_copies();")
            if even:
                _superblock(product, writer, minimum)
            else:
                with writer.block("if (s * COLUMN_WARPS + column_warp < SUPERBLOCKS)"):
                    _superblock(product, writer, minimum)
            if not product.loads_ahead:
                writer.line("__syncwarp();")
                writer.line("fetch(n + DEPTH);")
            elif refilled:
                writer.line("TeamRing::give_back(my_barriers, place, lane);")
            writer.line("if (++place == DEPTH) place = 0, turn ^= 1;")
        writer.lines("""
            low = lanes_sum(low, 4);
            high = lanes_sum(high, 4);
            if ((lane & 3) == 0) {
                partial[column_warp * ROWS + tile * 16 + (lane >> 2)] = low;
                partial[column_warp * ROWS + tile * 16 + 8 + (lane >> 2)] = high;
            }
        """)


def _superblock(product: Product, writer: Writer, minimum: bool) -> None:
    """One superblock of a tile, and the activations of the warp's next one."""
    if not product.integer:
        writer.line("const Floats slice[1] = {{values + (s * COLUMN_WARPS + column_warp) * 256}};")
    elif minimum and product.slice > 2:
        writer.line("slice[0].find_minimum_bias(lane);")
    _tile_product(product, writer)
    if product.integer and product.slice == 2:
        writer.lines("""
            const Digits used = slice[0];
            slice[0] = slice[1];
            slice[1] = used;
        """)
    if product.integer and product.slice > 2:
        writer.lines("""
            slice[0] = slice[1];
            coming = coming + 1 < steps ? coming + 1 : 0;
            const int from = coming * COLUMN_WARPS * DIGITS_STRIDE;
            // What nobody will use would hold up the warp's end.
            if (n + 2 < items * STEPS) slice[1].load(my_digits + from, my_factors + from);
        """)


def _tile_source(product: Product, writer: Writer) -> None:
    """`_SOURCE` for the weight that the block's tile number `tile` belongs to."""
    if product.tiles_per_unit == 2:
        writer.line("int unit = blockIdx.x + (tile >> 1) * GRID;")
        for index, row in enumerate(product.types):
            body = _SOURCE.format(pointer=f"weight{index}", tile="unit", struct=row.struct)
            writer.line(f"{'if ((tile & 1) == 0)' if index == 0 else 'else'} {{ {body} }}")
        return
    writer.line("int unit = blockIdx.x + tile * GRID;")
    start = 0
    for index, (weight, row) in enumerate(zip(product.weights, product.types, strict=True)):
        end = start + tiles(weight.type.shape[0])
        body = _SOURCE.format(
            pointer=f"weight{index}", tile=f"(unit - {start})" if start else "unit", struct=row.struct
        )
        last = index == len(product.weights) - 1
        head = (
            "" if len(product.weights) == 1 else ("else " if last else f"{'else ' if index else ''}if (unit < {end}) ")
        )
        writer.line(f"{head}{{ {body} }}" if head else body)
        start = end


def _tile_product(product: Product, writer: Writer) -> None:
    """`low` and `high` of a superblock, by its weight's type: equal types share one call."""

    def dot(struct: str) -> str:
        return f"{struct}::dot(stage + column_warp * {struct}::BYTES, slice[0], lane, low, high);"

    structs = [row.struct for row in product.types]
    if len(set(structs)) == 1:
        writer.line(dot(structs[0]))
        return
    if product.tiles_per_unit == 2:
        writer.line(f"if ((tile & 1) == 0) {dot(structs[0])}")
        writer.line(f"else {dot(structs[1])}")
        return
    writer.line("const int unit = blockIdx.x + tile * GRID;")
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
        writer.line(f"{head} {dot(struct)}")
