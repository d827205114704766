"""What a product does after its sums: one function an op, found in `EPILOGUES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..ir.graph import Value
from .digits import store_digits
from .product import Product
from .weight_types import tiles
from .writer import Writer


def _nothing(writer: Writer) -> None:
    """Most epilogues have nothing to fetch early."""


@dataclass(frozen=True)
class Epilogue:
    """What a product does after its sums, and what it can fetch for that ahead of time.

    write: one thread a row, `row_sum(row)` gives the product. before_wait: reads of memory
    that no kernel writes. after_wait: reads of what earlier kernels wrote, by the errand
    warp (`lane`), while the others multiply.
    """

    write: Callable[[Writer], None]
    before_wait: Callable[[Writer], None] = field(default=_nothing)
    after_wait: Callable[[Writer], None] = field(default=_nothing)


@contextmanager
def each_row(product: Product, writer: Writer, most: int) -> Iterator[None]:
    """Every `row` below `most` and a few above, by whole warps, so that lanes may exchange values."""
    padded = -(-most // 32) * 32
    if padded <= product.threads:
        with writer.block(f"if (threadIdx.x < {padded})"):
            writer.line("const int row = threadIdx.x;")
            yield
    else:
        writer.line("#pragma unroll 1")
        step = product.threads
        with writer.block(f"for (int row = threadIdx.x; row < {-(-most // step) * step}; row += {step})"):
            yield


def _store(product: Product) -> Epilogue:
    """Results as they are: one float32 vector a weight."""
    for index, out in enumerate(product.node.outs):
        product.take(f"float* y{index}", product.ctx.write(out))

    def write(writer: Writer) -> None:
        with each_row(product, writer, product.tiles_per_block * 16):
            writer.line("int at = (blockIdx.x + (row >> 4) * GRID) * 16 + (row & 15);")
            writer.line("bool inside = row < block_tiles * 16;")
            writer.line("float y = inside ? row_sum(row) : 0.0f;")
            start = 0
            for index, weight in enumerate(product.weights):
                rows = weight.type.shape[0]
                target = f"y{index}[at - {start}] = y;" if start else f"y{index}[at] = y;"
                conditions = ["inside"] if index == 0 else ["inside", f"at >= {start}"]
                conditions.append(f"at < {start + rows}")
                writer.line(f"if ({' && '.join(conditions)}) {target}")
                start += tiles(rows) * 16

    return Epilogue(write)


def _swiglu(product: Product) -> Epilogue:
    """silu(gate) * up, tile by tile: a unit's gate rows come first, then its up rows."""
    quantized = _take_vector(product, product.node.out, "y")
    rows = product.weights[0].type.shape[0]

    def write(writer: Writer) -> None:
        with each_row(product, writer, product.tiles_per_block * 8):
            writer.lines(f"""
                int unit = row >> 4, at = (blockIdx.x + unit * GRID) * 16 + (row & 15);
                bool inside = row < block_tiles * 8;
                float value = 0.0f;
                if (inside && at < {rows}) {{
                    float gate = row_sum(unit * 32 + (row & 15)), up = row_sum(unit * 32 + 16 + (row & 15));
                    value = silu(gate) * up;
                }}
            """)
            _store_vector(writer, "y", "value", rows, quantized)

    return Epilogue(write)


def _take_vector(product: Product, out: Value, name: str) -> bool:
    """The parameters of a vector that may be quantized; True if it is."""
    quantized = out.type.dtype == "i8x2"
    product.take(f"u8* {name}" if quantized else f"float* {name}", product.ctx.write(out))
    return quantized


def _store_vector(writer: Writer, name: str, value: str, size: int, quantized: bool) -> None:
    if quantized:
        writer.line(store_digits(name, value, size, "inside"))
    else:
        writer.line(f"if (inside && at < {size}) {name}[at] = {value};")


def _residual(product: Product) -> Epilogue:
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

    place = "int at = (blockIdx.x + (row >> 4) * GRID) * 16 + (row & 15);"

    def before_wait(writer: Writer) -> None:
        writer.line(f"float* const early_residual = (float*)(shared_memory + {product.shared.early});")
        if norm:
            writer.line("float* const early_weight = early_residual + ROWS;")
            with (
                writer.block("if (warp == WARPS)"),
                writer.block("for (int row = lane; row < block_tiles * 16; row += 32)"),
            ):
                writer.line(place)
                writer.line(f"early_weight[row] = at < {rows} ? norm_weight[at] : 0.0f;")

    def after_wait(writer: Writer) -> None:
        writer.line("#pragma unroll 1")
        with writer.block("for (int row = lane; row < block_tiles * 16; row += 32)"):
            writer.line(place)
            writer.line(f"early_residual[row] = at < {rows} ? fresh(residual + at) : 0.0f;")

    def write(writer: Writer) -> None:
        with each_row(product, writer, product.tiles_per_block * 16):
            writer.lines(f"""
                int unit = blockIdx.x + (row >> 4) * GRID, at = unit * 16 + (row & 15);
                bool inside = row < block_tiles * 16;
                float value = 0.0f;
                if (inside && at < {rows}) value = early_residual[row] + row_sum(row);
                if (inside && at < {rows}) sum[at] = value;
            """)
            if norm:
                writer.line("float weighted = inside ? value * early_weight[row] : 0.0f;")
                writer.line("float square_sum = lanes_sum(value * value, 16);")
                writer.line("if (inside && (row & 15) == 0) squares[unit] = square_sum;")
                _store_vector(writer, "scaled", "weighted", rows, quantized)

    return Epilogue(write, before_wait, after_wait)


def _choose(product: Product) -> Epilogue:
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
            #pragma unroll 1
            for (int row = threadIdx.x; row < block_tiles * 16; row += {product.threads}) {{
                int at = (blockIdx.x + (row >> 4) * GRID) * 16 + (row & 15);
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
            __shared__ u64 warp_best[{product.threads // 32}];
            for (int d = 16; d; d >>= 1) {{
                u64 other = __shfl_xor_sync(FULL_WARP, key, d);
                key = other > key ? other : key;
            }}
            if (lane == 0) warp_best[warp] = key;
            __syncthreads();
            if (threadIdx.x == 0) {{
                for (int w = 1; w < {product.threads // 32}; w++) key = warp_best[w] > key ? warp_best[w] : key;
                atomicMax(best, key);
                __threadfence();
                u32 finished = atomicAdd((u32*)(best + 1), 1u);
                if (finished == GRID - 1) {{  // all blocks have put in their best
                    __threadfence();
                    int chosen = choice_index(atomicExch(best, 0ull));
                    *(u32*)(best + 1) = 0u;
                    move_on(chosen, token, log, end_tokens, stop, position);
                }}
            }}
        """)

    return Epilogue(write)


EARLY_NUMBERS = {"matvec_add": 1, "matvec_add_norm": 2}
"""Numbers a row that an epilogue keeps in dynamic shared memory while the tiles are multiplied."""

EPILOGUES: dict[str, Callable[[Product], Epilogue]] = {
    "matvec": _store,
    "scaled_matvec": _store,
    "matvec_swiglu": _swiglu,
    "scaled_swiglu": _swiglu,
    "matvec_add": _residual,
    "matvec_add_norm": _residual,
    "matvec_choose": _choose,
    "scaled_matvec_choose": _choose,
}
