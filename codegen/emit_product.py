"""Matrix-vector products: one emitter for every op whose result is `w @ x` and something after.

A kernel has four parts, the same for all:
  1. the ring: each warp asks for its first weights, which depend on no other kernel;
  2. the wait for the kernel before, then the warp's slice of the activations into registers;
  3. the tiles: each warp multiplies its slice of each tile, sums go to shared memory;
  4. the epilogue: one thread a row adds the slices up and does what the op does after.
What differs is the epilogue, one function each below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..ir.graph import Node, Value
from .emission import Context, Emitted, Factor
from .shapes import ProductShape, product_shape
from .weight_types import WEIGHT_TYPES, WeightType, padded_columns, superblocks, tiles
from .writer import Writer

PRODUCTS = (
    "matvec",
    "scaled_matvec",
    "matvec_swiglu",
    "scaled_swiglu",
    "matvec_add",
    "matvec_add_norm",
    "matvec_choose",
    "scaled_matvec_choose",
)


def _nothing(writer: Writer) -> None:
    """Most epilogues have nothing to fetch early."""


@dataclass(frozen=True)
class _Epilogue:
    """What a product does after its sums, and what it can fetch for that ahead of time.

    write: one thread a row, `row_sum(row)` gives the product. before_wait: reads of memory
    that no kernel writes. after_wait: reads of what earlier kernels wrote, in flight
    together with the activations, so that they cost no latency of their own.
    """

    write: Callable[[Writer], None]
    before_wait: Callable[[Writer], None] = field(default=_nothing)
    after_wait: Callable[[Writer], None] = field(default=_nothing)


@dataclass
class _Product:
    """The facts of one product, and the argument list that grows while it is emitted."""

    node: Node
    ctx: Context
    weights: tuple[Value, ...]
    types: tuple[WeightType, ...]
    factor: Factor | None
    columns: int
    units: int
    tiles_per_unit: int
    shape: ProductShape
    parameters: list[str]
    args: list[str | int]

    def take(self, declaration: str, arg: str | int) -> None:
        self.parameters.append(declaration)
        self.args.append(arg)

    @property
    def integer(self) -> bool:
        return self.types[0].family == "integer"

    @property
    def superblocks(self) -> int:
        return superblocks(self.columns)

    @property
    def slice(self) -> int:
        return -(-self.superblocks // self.shape.column_warps)

    @property
    def tiles_per_block(self) -> int:
        return self.shape.units_per_block * self.tiles_per_unit


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
    product = _Product(
        node, ctx, weights, types, ctx.factor(node.ins[1]) if scaled else None, columns, units,
        2 if swiglu else 1, shape, [], [],
    )
    for index, weight in enumerate(weights):
        product.take(f"const u8* weight{index}", ctx.read(weight))
    product.take("const u8* x" if product.integer else "const float* x", ctx.read(x))
    if product.factor:
        product.take("const float* square_sums", product.factor.buffer)
    epilogue = _EPILOGUES[node.op](product)
    text = _text(product, epilogue, widest)
    bytes_read = sum(row.file_bytes(*weight.type.shape) for row, weight in zip(types, weights, strict=True))
    return Emitted(
        stem=node.op,
        body=text,
        grid=shape.grid,
        block=shape.threads,
        args=tuple(product.args),
        shared_bytes=_shared_bytes(product, widest)[-1],
        bytes_read=bytes_read,
        describe=f"{shape.column_warps} warps share the columns, {shape.tile_warps} take turns with the tiles, "
        f"ring of {shape.depth}",
    )


def _shared_bytes(product: _Product, widest: int) -> tuple[int, int, int, int]:
    """Offsets of barriers, partial sums and float activations, and the total, in bytes."""
    shape = product.shape
    ring = shape.warps * shape.depth * product.slice * widest
    barriers = -(-ring // 128) * 128
    partial = barriers + -(-shape.warps * shape.depth * 8 // 16) * 16
    floats = partial + shape.column_warps * product.tiles_per_block * 16 * 4
    total = floats + (0 if product.integer else padded_columns(product.columns) * 4)
    return barriers, partial, floats, total


def _text(product: _Product, epilogue: _Epilogue, widest: int) -> str:
    shape, writer = product.shape, Writer()
    barriers, partial, floats, _ = _shared_bytes(product, widest)
    item = product.slice * widest
    depth = shape.depth
    writer.line(f'extern "C" __global__ void __launch_bounds__({shape.threads}) KERNEL({", ".join(product.parameters)}) {{')
    writer._depth += 1
    writer.lines(f"""
        constexpr int COLUMN_WARPS = {shape.column_warps}, TILE_WARPS = {shape.tile_warps}, DEPTH = {depth};
        constexpr int SUPERBLOCKS = {product.superblocks}, SLICE = {product.slice}, ITEM = {item};  // of a row; of a warp; bytes
        constexpr int UNITS = {product.units}, TILES_PER_UNIT = {product.tiles_per_unit}, ROWS = {product.tiles_per_block * 16};  // of the matrix; -; of a block
        extern __shared__ __align__(128) u8 shared_memory[];
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        const int column_warp = warp % COLUMN_WARPS, tile_warp = warp / COLUMN_WARPS;
        const int first = column_warp * SLICE, count = SUPERBLOCKS - first < SLICE ? SUPERBLOCKS - first : SLICE;
        u8* ring = shared_memory + warp * (DEPTH * ITEM);
        u64* barriers = (u64*)(shared_memory + {barriers}) + warp * DEPTH;
        float* partial = (float*)(shared_memory + {partial});  // [column warp][row of the block]
    """)
    if not product.integer:
        writer.line(f"float* values = (float*)(shared_memory + {floats});  // the activations")
    if product.factor:
        writer.line("__shared__ float shared_factor;")
    writer.lines("""
        // Tile number i of this block; the units of a block are `gridDim.x` apart.
        const int block_tiles = ((UNITS - 1 - (int)blockIdx.x) / (int)gridDim.x + 1) * TILES_PER_UNIT;
        const int items = block_tiles > tile_warp ? (block_tiles - 1 - tile_warp) / TILE_WARPS + 1 : 0;
    """)
    with writer.block("auto fetch = [&](int i)", "};"):
        writer.line("int bytes = 0;")
        writer.line("const u8* source = weight0;")
        with writer.block("if (i < items)"):
            writer.line("int tile = i * TILE_WARPS + tile_warp;")
            _tile_source(product, writer, "source = {pointer} + ((u64){tile} * SUPERBLOCKS + first) * {struct}::BYTES; bytes = count * {struct}::BYTES;")
        writer.line("Ring<DEPTH>::issue(barriers, i % DEPTH, ring + (i % DEPTH) * ITEM, source, bytes, lane);")
    writer.lines("""

        // 1. Weights depend on no other kernel.
        Ring<DEPTH>::open(barriers, lane);
        for (int i = 0; i < DEPTH; i++) fetch(i);
        let_next_kernel_start();
    """)
    epilogue.before_wait(writer)
    writer.lines("""

        // 2. The activations do.
        wait_for_previous_kernel();
    """)
    epilogue.after_wait(writer)
    if product.integer:
        writer.line("Digits<SLICE> slice;")
        writer.line(f"slice.load(x, (const float2*)(x + {2 * padded_columns(product.columns)}), first, count, lane);")
    else:
        with writer.block(f"for (int i = threadIdx.x; i < SUPERBLOCKS * 256; i += {shape.threads})"):
            writer.line(f"values[i] = i < {product.columns} ? fresh(x + i) : 0.0f;")
        writer.line("__syncthreads();")
        writer.line("Floats slice;")
        writer.line("slice.values = values + first * 256;")
    if product.factor:
        f = product.factor
        with writer.block(f"if (warp == {shape.warps - 1})"):
            writer.line(f"float factor = factor_from_parts(square_sums, {f.parts}, {_c_float(1.0 / f.size)}, {_c_float(f.eps)}, lane);")
            writer.line("if (lane == 0) shared_factor = factor;")
    writer.line()
    writer.line("// 3. Tiles: rows g and g + 8 of each, this warp's columns.")
    with writer.block("for (int i = 0; i < items; i++)"):
        writer.lines("""
            int tile = i * TILE_WARPS + tile_warp;
            const u8* item = ring + (i % DEPTH) * ITEM;
            float low = 0.0f, high = 0.0f;
            Ring<DEPTH>::wait(barriers, i % DEPTH, i / DEPTH, lane);
        """)
        _tile_product(product, writer)
        if depth * shape.tile_warps < product.tiles_per_block or not product.ctx.target.programmatic:
            writer.line("Ring<DEPTH>::release();")
            writer.line("fetch(i + DEPTH);")
        writer.lines("""
            low = lanes_sum(low, 4);
            high = lanes_sum(high, 4);
            if ((lane & 3) == 0) {
                partial[column_warp * ROWS + tile * 16 + (lane >> 2)] = low;
                partial[column_warp * ROWS + tile * 16 + 8 + (lane >> 2)] = high;
            }
        """)
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
    writer._depth -= 1
    writer.line("}")
    return writer.text()


def _c_float(value: float) -> str:
    text = f"{value:.9g}"
    return text + ("f" if "." in text or "e" in text else ".0f")


def _tile_source(product: _Product, writer: Writer, template: str) -> None:
    """`template` for the weight that the block's tile number `tile` belongs to."""
    if product.tiles_per_unit == 2:
        writer.line("int unit = blockIdx.x + (tile >> 1) * gridDim.x;")
        for index, row in enumerate(product.types):
            body = template.format(pointer=f"weight{index}", tile="unit", struct=row.struct)
            writer.line(f"{'if ((tile & 1) == 0)' if index == 0 else 'else'} {{ {body} }}")
        return
    writer.line("int unit = blockIdx.x + tile * gridDim.x;")
    start = 0
    for index, (weight, row) in enumerate(zip(product.weights, product.types, strict=True)):
        end = start + tiles(weight.type.shape[0])
        body = template.format(pointer=f"weight{index}", tile=f"(unit - {start})" if start else "unit", struct=row.struct)
        last = index == len(product.weights) - 1
        head = "" if len(product.weights) == 1 else ("else " if last else f"{'else ' if index else ''}if (unit < {end}) ")
        writer.line(f"{head}{{ {body} }}" if head else body)
        start = end


def _tile_product(product: _Product, writer: Writer) -> None:
    """`low` and `high` of an item, by its weight's type: equal types share one loop."""
    def loop(struct: str) -> None:
        writer.line("#pragma unroll")
        with writer.block("for (int s = 0; s < SLICE; s++)"):
            guard = "" if product.superblocks % product.slice == 0 else "if (s < count) "
            writer.line(f"{guard}{struct}::dot(item + s * {struct}::BYTES, slice, s, lane, low, high);")

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
    writer.line("int unit = blockIdx.x + tile * gridDim.x;")
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


# --- Epilogues -------------------------------------------------------------------------------------------


def _store(product: _Product) -> _Epilogue:
    """Results as they are: one float32 vector a weight."""
    for index, out in enumerate(product.node.outs):
        product.take(f"float* y{index}", product.ctx.write(out))

    def write(writer: Writer) -> None:
        with writer.block(f"for (int row = threadIdx.x; row < block_tiles * 16; row += {product.shape.threads})"):
            writer.line("int at = (blockIdx.x + (row >> 4) * gridDim.x) * 16 + (row & 15);")
            writer.line("float y = row_sum(row);")
            start = 0
            for index, weight in enumerate(product.weights):
                rows = weight.type.shape[0]
                padded = tiles(rows) * 16
                target = f"y{index}[at - {start}] = y;" if start else f"y{index}[at] = y;"
                conditions = [] if index == 0 else [f"at >= {start}"]
                conditions.append(f"at < {start + rows}")
                writer.line(f"if ({' && '.join(conditions)}) {target}")
                start += padded

    return _Epilogue(write)


def _swiglu(product: _Product) -> _Epilogue:
    """silu(gate) * up, tile by tile: a unit's gate rows come first, then its up rows."""
    quantized = _take_vector(product, product.node.out, "y")
    rows = product.weights[0].type.shape[0]

    def write(writer: Writer) -> None:
        with writer.block(f"for (int base = 0; base < block_tiles * 8; base += {product.shape.threads})"):
            writer.lines(f"""
                int row = base + threadIdx.x, unit = row >> 4;
                bool inside = row < block_tiles * 8;
                int at = (blockIdx.x + unit * gridDim.x) * 16 + (row & 15);
                float value = 0.0f;
                if (inside && at < {rows}) {{
                    float gate = row_sum(unit * 32 + (row & 15)), up = row_sum(unit * 32 + 16 + (row & 15));
                    value = silu(gate) * up;
                }}
            """)
            _store_vector(writer, "y", "value", rows, quantized)

    return _Epilogue(write)


def _take_vector(product: _Product, out: Value, name: str) -> bool:
    """The parameters of a vector that may be quantized; True if it is."""
    quantized = out.type.dtype == "i8x2"
    product.take(f"u8* {name}" if quantized else f"float* {name}", product.ctx.write(out))
    return quantized


def _store_vector(writer: Writer, name: str, value: str, size: int, quantized: bool) -> None:
    if quantized:
        writer.line(f"store_digits({name}, (float2*)({name} + {2 * padded_columns(size)}), at, {value}, inside);")
    else:
        writer.line(f"if (inside && at < {size}) {name}[at] = {value};")


def _residual(product: _Product) -> _Epilogue:
    """residual + product; with a norm after it, also that norm's two halves."""
    node, ctx = product.node, product.ctx
    norm = node.op == "matvec_add_norm"
    residual = node.ins[2]
    rows = product.weights[0].type.shape[0]
    product.take("const float* residual", ctx.read(residual))
    if norm:
        product.take("const float* norm_weight", ctx.read(node.ins[3]))
    product.take("float* sum", ctx.write(node.outs[0]))
    quantized = False
    if norm:
        quantized = _take_vector(product, node.outs[1], "scaled")
        eps = float(node.attr("eps"))  # type: ignore[arg-type]
        product.take("float* squares", ctx.write_factor(node.outs[2], product.units, rows, eps))

    threads = product.shape.threads
    place = "int at = (blockIdx.x + (row >> 4) * gridDim.x) * 16 + (row & 15);"

    def before_wait(writer: Writer) -> None:
        writer.line("__shared__ float early_residual[ROWS];")
        if norm:
            writer.line("__shared__ float early_weight[ROWS];")
            with writer.block(f"for (int row = threadIdx.x; row < block_tiles * 16; row += {threads})"):
                writer.line(place)
                writer.line(f"early_weight[row] = at < {rows} ? norm_weight[at] : 0.0f;")

    def after_wait(writer: Writer) -> None:
        with writer.block(f"for (int row = threadIdx.x; row < block_tiles * 16; row += {threads})"):
            writer.line(place)
            writer.line(f"early_residual[row] = at < {rows} ? fresh(residual + at) : 0.0f;")

    def write(writer: Writer) -> None:
        with writer.block(f"for (int base = 0; base < block_tiles * 16; base += {threads})"):
            writer.lines(f"""
                int row = base + threadIdx.x, unit = blockIdx.x + (row >> 4) * gridDim.x;
                bool inside = row < block_tiles * 16;
                int at = unit * 16 + (row & 15);
                float value = 0.0f;
                if (inside && at < {rows}) {{
                    value = early_residual[row] + row_sum(row);
                    sum[at] = value;
                }}
            """)
            if norm:
                writer.line("float weighted = inside ? value * early_weight[row] : 0.0f;")
                _store_vector(writer, "scaled", "weighted", rows, quantized)
                writer.line("float square_sum = lanes_sum(value * value, 16);")
                writer.line("if (inside && (row & 15) == 0) squares[unit] = square_sum;")

    return _Epilogue(write, before_wait, after_wait)


def _choose(product: _Product) -> _Epilogue:
    """The largest logit of the block, then of all blocks; the last block to finish moves the state on."""
    node, ctx = product.node, product.ctx
    log, end_tokens, stop, position = node.ins[-4:]
    keep = bool(node.attributes.get("keep_logits", False))
    outs = node.outs[1:] if keep else node.outs
    rows = product.weights[0].type.shape[0]
    if keep:
        product.take("float* logits", ctx.write(node.outs[0]))
    product.take("u64* best", ctx.scratch("best", 16, zeroed=True))
    product.take("const int* end_tokens", ctx.read(end_tokens))
    for declaration, result, state in (
        ("int* log", outs[1], log),
        ("int* stop", outs[2], stop),
        ("int* position", outs[3], position),
    ):
        product.take(declaration, ctx.in_place(result, state))
    product.take("int* token", ctx.write(outs[0]))

    def write(writer: Writer) -> None:
        writer.lines(f"""
            u64 key = 0;
            for (int row = threadIdx.x; row < block_tiles * 16; row += {product.shape.threads}) {{
                int at = (blockIdx.x + (row >> 4) * gridDim.x) * 16 + (row & 15);
                if (at < {rows}) {{
                    float logit = row_sum(row);
        """)
        if keep:
            writer.line("        logits[at] = logit;")
        writer.lines(f"""
                    u64 candidate = choice_key(logit, at);
                    key = candidate > key ? candidate : key;
                }}
            }}
            __shared__ u64 warp_best[{product.shape.warps}];
            for (int d = 16; d; d >>= 1) {{
                u64 other = __shfl_xor_sync(FULL_WARP, key, d);
                key = other > key ? other : key;
            }}
            if (lane == 0) warp_best[warp] = key;
            __syncthreads();
            if (threadIdx.x == 0) {{
                for (int w = 1; w < {product.shape.warps}; w++) key = warp_best[w] > key ? warp_best[w] : key;
                atomicMax(best, key);
                __threadfence();
                u32 finished = atomicAdd((u32*)(best + 1), 1u);
                if (finished == gridDim.x - 1) {{  // all blocks have put in their best
                    __threadfence();
                    int chosen = choice_index(atomicExch(best, 0ull));
                    *(u32*)(best + 1) = 0u;
                    move_on(chosen, token, log, end_tokens, stop, position);
                }}
            }}
        """)

    return _Epilogue(write)


_EPILOGUES: dict[str, Callable[[_Product], _Epilogue]] = {
    "matvec": _store,
    "scaled_matvec": _store,
    "matvec_swiglu": _swiglu,
    "scaled_swiglu": _swiglu,
    "matvec_add": _residual,
    "matvec_add_norm": _residual,
    "matvec_choose": _choose,
    "scaled_matvec_choose": _choose,
}
