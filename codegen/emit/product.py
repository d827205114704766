"""Matrix-vector products: one emitter for every op whose result is `w @ x` and something after.

The kernel is the template of device/product.cuh with an epilogue of device/epilogues.cuh; here its shape is chosen, and
its instance written: parameters, numbers, and the facts on which the template branches.
"""

from __future__ import annotations

from collections.abc import Callable

from ...ir.graph import Node, Value
from ...ir.regime import Regime
from ...ir.verify import product_weights
from ..emission import Context, Emitters, KernelSpec, Parameters
from ..target import LEAST_WARPS
from ..tiling import ProductShape, product_shape
from ..weight_types import TILE_ROWS, WEIGHT_TYPES, padded_columns, superblocks, tiles
from ..writer import c_float
from .functions import function_of

WITH_MINIMA = ("q4_k", "q5_k")
"""Weight types whose blocks have a minimum (MINIMA of their structs)."""

EARLY_NUMBERS = {"matvec_add": 1, "matvec_add_norm": 2}
"""EARLY of the epilogue: numbers a row that it keeps in shared memory while the tiles are multiplied."""

HELD_BACK = 6  # registers of a thread that `hold_registers` takes beside those that it holds


def product_class(node: Node) -> str:
    """The key of tuned launch shapes: op, weight types and matrix shapes."""
    return node.op + "".join(f" {weight.type}" for weight in product_weights(node))


def emit_product(node: Node, ctx: Context) -> KernelSpec:
    """The kernel of a product node."""
    product, target, slot = _Product(node, ctx), ctx.target, ctx.slot_bytes(node)
    shape = product_shape(
        product.units,
        product.tiles_per_unit,
        superblocks(product.columns),
        max(row.superblock_bytes for row in product.types),
        target,
        reserve=0 if product.integer else padded_columns(product.columns) * 4,
        early=EARLY_NUMBERS.get(node.op, 0),
        slot=slot,
        most_warps=target.most_warps,
        **ctx.shapes.get(product_class(node), {}),
    )
    # Each kernel of the step has a block on every multiprocessor, in the same slot (`Target.slot_bytes`), and ten
    # warps: with fewer it would leave registers for a second block of the next kernel (`Target.slot_registers`).
    blocks = max(shape.grid, target.sm_count if target.slots else 0)
    threads = shape.threads + (64 if target.programmatic else 32)  # an auxiliary warp, and a producer of bulk copies
    if target.slots:
        threads = max(threads, 32 * LEAST_WARPS)
    registers = target.slot_registers(ctx.slot(node))
    return product.spec(
        stem=node.op,
        include="product.cuh",
        threads=threads,
        registers=registers,
        body=product.instance(shape, blocks, threads, registers),
        grid=blocks,
        shared_bytes=max(shape.shared_bytes, slot),
        bytes_read=sum(
            row.file_bytes(*weight.type.shape) for row, weight in zip(product.types, product.weights, strict=True)
        ),
        describe=f"{shape.column_warps} warps share the columns, {shape.tile_warps} take turns with the tiles, "
        f"ring of {shape.depth}",
    )


class _Product(Parameters):
    """A product under construction: its facts, and its parameters with their arguments."""

    def __init__(self, node: Node, ctx: Context) -> None:
        super().__init__()
        self.node, self.ctx = node, ctx
        self.weights = product_weights(node)
        self.types = [WEIGHT_TYPES[weight.type.dtype] for weight in self.weights]
        self.integer = self.types[0].family == "integer"
        self.rows = [weight.type.shape[0] for weight in self.weights]
        self.columns = self.weights[0].type.shape[1]
        self.paired = node.op.endswith("swiglu")
        self.units = tiles(self.rows[0]) if self.paired else sum(map(tiles, self.rows))
        self.tiles_per_unit = 2 if self.paired else 1

    def out_param(self, name: str, value: Value) -> tuple[str, str]:
        """The parameter of a result, float32 or an activation block: its element's type, and its name."""
        element = "u8" if value.type.dtype == "i8x2" else "float"
        return element, self.param(f"{element}* {name}", self.ctx.write(value))

    def instance(self, shape: ProductShape, blocks: int, threads: int, registers: int) -> str:
        """The kernel's body. A fact stands beside those with which the template asks for it: tests hold whole lines,
        without their numbers, against those of kernels that they have run."""
        count = superblocks(self.columns)
        steps = -(-count // shape.column_warps)
        block_tiles = shape.units_per_block * self.tiles_per_unit
        ahead = self.ctx.target.programmatic
        even = self.units == shape.grid * shape.units_per_block
        sizes = [
            _enum(COLUMNS=self.columns, **{f"ROWS{i}": rows for i, rows in enumerate(self.rows)}),
            _enum(BLOCKS=blocks, BUSY_BLOCKS=shape.grid, UNITS_PER_BLOCK=shape.units_per_block),
            _enum(COLUMN_WARPS=shape.column_warps, TILE_WARPS=shape.tile_warps, DEPTH=shape.depth),
            _enum(THREADS=threads, SHARED_BYTES=shape.shared_bytes),
            _enum(
                LOADS_AHEAD=ahead,
                IDLE=blocks > shape.grid,
                REFILLED=ahead and -(-block_tiles // shape.tile_warps) * steps > shape.depth,
            ),
            _enum(EVEN=even, EVEN_TEAMS=even and block_tiles % shape.tile_warps == 0),
            _enum(ONE_PASS=-(-shape.units_per_block * TILE_ROWS // 32) * 32 <= threads),
            _enum(
                EVEN_SLICES=count % shape.column_warps == 0,
                MINIMA=any(row.name in WITH_MINIMA for row in self.types),
                TWO_HELD=self.integer and steps == 2,
                MORE_THAN_HELD=self.integer and steps > 2,
            ),
        ]
        weights = [
            f"Matrix<{row.struct}, Shape::ROWS{index}>"
            f"{{{self.param(f'const u8* weight{index}', self.ctx.read(weight))}}}"
            for index, (row, weight) in enumerate(zip(self.types, self.weights, strict=True))
        ]
        x = self.param("const u8* x" if self.integer else "const float* x", self.ctx.read(self.node.ins[0]))
        factor, before = "NoFactor()", ""
        if self.node.op.startswith("scaled_"):
            norm = self.ctx.factor(self.node.ins[1])
            before = (
                f"{_enum(FACTOR_PARTS=norm.parts, FACTOR_SIZE=norm.size)}\nconst float eps = {c_float(norm.eps)};\n"
            )
            sums = self.param("const float* square_sums", norm.buffer)
            factor = f"NormFactor<FACTOR_PARTS, FACTOR_SIZE>{{{sums}, eps}}"
        epilogue = EPILOGUES[self.node.op](self)
        held = f"hold_registers<{registers - HELD_BACK}>();\n" if registers else ""
        struct = "".join(f"    {line}\n" for line in sizes)
        matrices = ",\n        ".join(weights)
        return (
            f"{held}struct Shape {{\n{struct}}};\n{before}product<Shape>(\n"
            f"    {'paired' if self.paired else 'stacked'}(\n        {matrices}),\n"
            f"    {x}, {factor}, {epilogue}, stamps);\n"
        )


def _enum(**constants: int | bool) -> str:
    """Named constants; a fact is `true` or `false`."""
    written = (f"{name} = {str(value).lower()}" for name, value in constants.items())
    return f"enum {{ {', '.join(written)} }};"


def _store(product: _Product) -> str:
    y = [product.param(f"float* y{i}", product.ctx.write(out)) for i, out in enumerate(product.node.outs)]
    return f"Store<{len(y)}>{{{{{', '.join(y)}}}}}"


def _swiglu(product: _Product) -> str:
    element, y = product.out_param("y", product.node.out)
    return f"GateAndUp<{element}>{{{function_of(product.node, 'swiglu')}, {y}}}"


def _add(product: _Product) -> str:
    product.param("const float* residual", product.ctx.read(product.node.ins[2]))
    product.param("float* sum", product.ctx.write(product.node.outs[0]))
    return f"AddResidual{{{function_of(product.node)}, residual, sum}}"


def _add_norm(product: _Product) -> str:
    node, ctx = product.node, product.ctx
    product.param("const float* residual", ctx.read(node.ins[2]))
    product.param("const float* norm_weight", ctx.read(node.ins[3]))
    product.param("float* sum", ctx.write(node.outs[0]))
    element, scaled = product.out_param("scaled", node.outs[1])
    eps = float(node.attr("eps"))  # type: ignore[arg-type]
    product.param("float* squares", ctx.write_factor(node.outs[2], product.units, product.rows[0], eps))
    function = function_of(node, "matvec_add", elsewhere=("eps",))
    return f"AddNorm<{element}>{{{{{function}, residual, sum}}, norm_weight, {scaled}, squares}}"


def _choose(product: _Product) -> str:
    node, ctx = product.node, product.ctx
    log, end_tokens, stop, position, _ = node.ins[-5:]
    token, *states = node.outs[-4:]
    logits, kept = "NoLogits", ""
    if node.attr("keep_logits", False):
        logits, kept = "Logits", product.param("float* logits", ctx.write(node.outs[0]))
    product.param("u64* best", ctx.scratch("best", 16, zeroed=True))
    product.param("const int* end_tokens", ctx.read(end_tokens))
    for name, result, state in zip(("log", "stop", "position"), states, (log, stop, position), strict=True):
        product.param(f"int* {name}", ctx.in_place(result, state))
    product.param("int* token", ctx.write(token))
    return f"Choose<{logits}>{{{{{kept}}}, best, end_tokens, log, stop, position, token}}"


EPILOGUES: dict[str, Callable[[_Product], str]] = {
    "matvec": _store,
    "scaled_matvec": _store,
    "matvec_swiglu": _swiglu,
    "scaled_swiglu": _swiglu,
    "matvec_add": _add,
    "matvec_add_norm": _add_norm,
    "matvec_choose": _choose,
    "scaled_matvec_choose": _choose,
}

EMITTERS: Emitters = {(op, Regime.STEP): emit_product for op in EPILOGUES}
