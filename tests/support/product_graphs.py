"""Graphs that hold every product op once (and in each form that its results may take) for one type and shape."""

from __future__ import annotations

import numpy as np
from catalogue import ShapeClass
from weights import dequantized, raw_weights

from psigraph.codegen.emit.product import product_class
from psigraph.codegen.target import Target, target_for
from psigraph.codegen.weight_types import WEIGHT_TYPES
from psigraph.ir.graph import Graph
from psigraph.ir.text import parse_graph
from psigraph.ir.types import INTEGER_WEIGHTS

EPS = 1e-6
STATES = (
    "state %tokens: i32[1], state %positions: i32[1], state %sequences: i32[1], state %stop: i32[1], "
    "state %log: i32[1,32], constant %end_tokens: i32[8]"
)


def product_graph(dtypes: tuple[str, ...], rows: int, columns: int, every_form: bool = True) -> Graph:
    """Every product op over matrices of these types, cyclically: w0 and w1 [rows, columns], w2 [fewer rows, columns].

    every_form: with one, two and three weights, f32 and i8x2 results, logits kept and not; otherwise each op once.
    Results: every value that a product makes.
    """
    types = [dtypes[index % len(dtypes)] for index in range(3)]
    few = max(8, rows // 2)
    integer = WEIGHT_TYPES[dtypes[0]].family == "integer"
    x = "%xq" if integer else "%x"
    lines = [f"%xq: i8x2[1,{columns}] = quantize(%x)"] if integer else []
    lines += [f"%f: f32[1,1] = rms_factor(%x) {{eps={EPS}}}"]
    results = ["%xq"] if integer else []
    made = 0

    def line(op: str, ins: str, outs: list[str], attrs: str = "") -> None:
        nonlocal made
        names = [f"%y{made + index}" for index in range(len(outs))]
        made += len(outs)
        left = ", ".join(f"{name}: {kind}" for name, kind in zip(names, outs, strict=True))
        lines.append(f"{left} = {op}({ins}) {attrs}")
        results.extend(names)

    full, fewer, vector = f"f32[1,{rows}]", f"f32[1,{few}]", f"f32[1,{rows}]"
    forms = [vector] + ([f"i8x2[1,{rows}]"] if rows % 16 == 0 else [])
    if not every_form:
        forms = forms[-1:]
    line("matvec", f"{x}, %w0, %w1, %w2", [full, full, fewer])
    line("scaled_matvec", f"{x}, %f, %w2, %w1, %w0", [fewer, full, full])
    if every_form:
        line("matvec", f"{x}, %w0", [full])
        line("matvec", f"{x}, %w0, %w2", [full, fewer])
        line("scaled_matvec", f"{x}, %f, %w0", [full])
        line("scaled_matvec", f"{x}, %f, %w1, %w2", [full, fewer])
    for form in forms:
        line("matvec_swiglu", f"{x}, %w0, %w1", [form])
        line("scaled_swiglu", f"{x}, %f, %w0, %w1", [form])
    line("matvec_add", f"{x}, %w0, %residual", [vector])
    for form in forms:
        line("matvec_add_norm", f"{x}, %w0, %residual, %norm", [vector, form, "f32[1,1]"], f"{{eps={EPS}}}")
    state = ("%log", "%stop", "%positions")
    for number, (op, ins, keep) in enumerate(
        [
            ("matvec_choose", f"{x}, %w0", True),
            ("matvec_choose", f"{x}, %w0", False),
            ("scaled_matvec_choose", f"{x}, %f, %w0", True),
            ("scaled_matvec_choose", f"{x}, %f, %w0", False),
        ]
    ):
        if not every_form and keep != op.startswith("scaled"):
            continue
        log, stop, positions = (f"%{name}.{number}" for name in ("log", "stop", "positions"))
        logits = f"%logits{number}: {vector}, " if keep else ""
        lines.append(
            f"{logits}%tokens.{number}: i32[1], {log}: i32[1,32], {stop}: i32[1], {positions}: i32[1] = "
            f"{op}({ins}, {state[0]}, %end_tokens, {state[1]}, {state[2]}, %sequences)"
            + (" {keep_logits=true}" if keep else "")
        )
        results += [f"%logits{number}"] * keep + [f"%tokens.{number}"]
        state = (log, stop, positions)
    returned = ", ".join([f"r{name[1:]}={name}" for name in results])
    text = f"""graph products(weight %w0: {types[0]}[{rows},{columns}], weight %w1: {types[1]}[{rows},{columns}],
        weight %w2: {types[2]}[{few},{columns}], weight %norm: f32[{rows}], {STATES},
        state %x: f32[1,{columns}], state %residual: f32[1,{rows}]) {{
    """
    text += "\n".join(lines)
    return parse_graph(f"{text}\nreturn {returned}, log={state[0]}, stop={state[1]}, positions={state[2]}\n}}")


def overridden(graph: Graph, shape: ShapeClass) -> dict[str, dict[str, int]] | None:
    """The shape class's launch shape for every product of a graph."""
    if not shape.overrides:
        return None
    return {product_class(node): dict(shape.overrides) for node in graph.nodes}


def target_of(shape: ShapeClass) -> Target:
    target = target_for("host", shape.sm_count)
    return target.plain() if shape.older else target


def random_matrices(graph: Graph, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(raw bytes, float64 values) of a graph's weights."""
    raw, values = {}, {}
    for index, param in enumerate(graph.params):
        if param.kind != "weight":
            continue
        shape, dtype = param.type.shape, param.type.dtype
        if len(shape) == 1:
            vector = (1 + np.random.default_rng(seed + index).standard_normal(shape) / 4).astype(np.float32)
            raw[param.name] = vector
            values[param.name] = vector.astype(np.float64)
        else:
            raw[param.name] = raw_weights(dtype, *shape, seed + index)
            values[param.name] = dequantized(raw[param.name], dtype, *shape).astype(np.float64)
    return raw, values


def terms(matrix: np.ndarray, dtype: str) -> np.ndarray:
    """The magnitude of what a product adds up for each weight, at most.

    A block's zero point (its minimum, or 32, or 128) is multiplied and subtracted apart, so where one activation is
    far larger than the others, terms as large as the block's range cancel: at most three times its largest weight.
    """
    if dtype not in INTEGER_WEIGHTS:
        return np.abs(matrix)
    blocks = np.abs(matrix).reshape(matrix.shape[0], -1, 16)
    return np.broadcast_to(3 * blocks.max(axis=2, keepdims=True), blocks.shape).reshape(matrix.shape)
