"""Every product op x weight type x shape class that the compiler lists, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from bars import SUM_UNITS, UNIT, assert_close
from product_graphs import overridden, product_graph, random_matrices, target_of
from run_node import Arrays, Digits, Step, same_bits

from psigraph.codegen.catalogue import SHAPE_CLASSES, ShapeClass, product_cases, product_ops
from psigraph.ir.graph import Graph, Node
from psigraph.ir.op import Machine
from psigraph.ir.ops import OPS
from psigraph.ir.types import INTEGER_WEIGHTS, quantize_i8x2

MACHINE = Machine(np.float64)
ROUND = SUM_UNITS * UNIT
MIXED = (("q4_k", "q6_k"), ("q4_k", "q4_k", "q6_k"), ("q5_k", "q6_k"), ("q6_k", "q8_0"), ("q8_0", "q5_k", "q4_k"),
         ("f16", "bf16", "f32"))  # fmt: skip
MIXED_SHAPES = (SHAPE_CLASSES[1], SHAPE_CLASSES[5])
EVERY_FORM = ("one tile",)  # elsewhere each op once: what follows the sums does not know the shape


def inputs(kind: str, size: int, seed: int = 3) -> np.ndarray:
    """float32[size]: `normal`; `outliers`: one in 50 is 10,000 times larger; `denormals` among and beside normal
    numbers; `zero`."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(size).astype(np.float32)
    if kind == "outliers":
        x[generator.random(size) < 0.02] *= 1e4
    elif kind == "denormals":
        x[::3] = np.float32(1e-41)
        x[: size // 2] = np.float32(1e-40)
    elif kind == "zero":
        x[:] = 0
    return x


def check(graph: Graph, values: Arrays, states: Arrays, got: dict, what: str, rough: bool = False) -> None:
    """Every node's results against its meaning in float64, from the operands that the device had.

    rough: hold sums against the terms that kernels add up (see `terms`), not against abs(w x).
    """
    known = dict(values)
    for name, array in states.items():
        known[name] = array.astype(np.float64) if array.dtype == np.float32 else array
    returned = {value.name: name for name, value in graph.results}
    for node in graph.nodes:
        label = f"{what}: {node.op} {node.out.name if len(node.outs) == 1 else node.outs[0].name}"
        wanted = OPS[node.op].meaning(MACHINE, [known[value.name] for value in node.ins], node.attributes)
        known |= {value.name: array for value, array in zip(node.outs, wanted, strict=True)}
        if node.op == "quantize":
            digits = got[returned[node.out.name]]
            assert_close(digits, wanted[0], 0.0, label)
            known[node.out.name] = digits.values
            continue
        bounds = allowed(node, known, rough)
        for value, array, bound in zip(node.outs, wanted, bounds, strict=True):
            if value.name not in returned:
                continue
            found = got[returned[value.name]]
            if value.type.dtype == "i32":
                assert found.tolist() == array.tolist(), f"{label}: {value.name}"
            elif value.name.startswith("y") and value.type.shape == (1,):
                parts = found.astype(np.float64).sum()
                factor = 1 / np.sqrt(parts / node.outs[0].type.size + node.attr("eps"))
                np.testing.assert_allclose(factor, array[0], rtol=16 * UNIT, err_msg=label)
            else:
                assert_close(found, array, bound, f"{label}: {value}")


def terms(matrix: np.ndarray, dtype: str) -> np.ndarray:
    """The magnitude of what a product adds up for each weight, at most.

    A block's zero point (its minimum, or 32, or 128) is multiplied and subtracted apart, so where one activation is
    far larger than the others, terms as large as the block's range cancel: at most three times its largest weight.
    """
    if dtype not in INTEGER_WEIGHTS:
        return np.abs(matrix)
    blocks = np.abs(matrix).reshape(matrix.shape[0], -1, 16)
    return np.broadcast_to(3 * blocks.max(axis=2, keepdims=True), blocks.shape).reshape(matrix.shape)


def allowed(node: Node, known: dict[str, np.ndarray], rough: bool) -> list[np.ndarray | float]:
    """How far each result of a node may be off (see `bars`)."""
    ins = [known[value.name] for value in node.ins]
    weights = [value for value in node.ins if len(value.type.shape) == 2]
    matrices = [known[value.name] for value in weights]
    x = np.abs(ins[0])
    scale = ins[1][0] if node.op.startswith("scaled_") else 1.0
    sizes = [terms(known[w.name], w.type.dtype) if rough else np.abs(known[w.name]) for w in weights]
    sums = [scale * (size @ x) for size in sizes]
    if node.op in ("matvec", "scaled_matvec"):
        return [ROUND * total for total in sums]
    if node.op.endswith("swiglu"):
        gate, up = (scale * (matrix @ ins[0]) for matrix in matrices)
        silu = gate / (1 + np.exp(-np.clip(gate, -700, 700)))
        slope = 1.1  # the steepest that silu gets
        return [ROUND * (slope * sums[0] * np.abs(up) + np.abs(silu) * sums[1]) + ROUND * np.abs(silu * up)]
    if node.op == "matvec_add":
        return [ROUND * (sums[0] + np.abs(ins[2]))]
    if node.op == "matvec_add_norm":
        bound = ROUND * (sums[0] + np.abs(ins[2]))
        return [bound, (bound + ROUND * np.abs(known[node.outs[0].name])) * np.abs(ins[3]), 0.0]
    if node.op.endswith("_choose"):
        return [ROUND * sums[0]] * (len(node.outs) - 4) + [0.0] * 4
    return [ROUND] * len(node.outs)


def run_case(dtypes: tuple[str, ...], shape: ShapeClass, kinds: tuple[str, ...]) -> None:
    graph = product_graph(dtypes, shape.rows, shape.columns, every_form=shape.name in EVERY_FORM)
    raw, values = random_matrices(graph)
    with Step(graph, target_of(shape), raw, overridden(graph, shape)) as step:
        for kind in kinds:
            states = {
                "x": inputs(kind, shape.columns),
                "residual": inputs("normal", shape.rows, 5),
                "position": np.array([7], np.int32),
                "stop": np.zeros(1, np.int32),
                "token": np.zeros(1, np.int32),
                "log": np.full(32, -5, np.int32),
                "end_tokens": np.array([3, 7, -1, -1, -1, -1, -1, -1], np.int32),
            }
            got = step.run(states)
            check(graph, values, states, got, f"{'+'.join(dtypes)} {shape.name} {kind}", kind != "normal")
            if kind == kinds[0]:
                for order in ("reverse", "shuffle"):
                    again = step.run(states, order)
                    assert all(same_bits(got[name], again[name]) for name in got), f"order {order} shows"


@pytest.mark.parametrize(("dtype", "shape"), product_cases(), ids=lambda case: getattr(case, "name", case))
def test_products(dtype, shape):
    run_case((dtype,), shape, ("normal", "outliers", "denormals", "zero"))


@pytest.mark.parametrize("dtypes", MIXED, ids="+".join)
@pytest.mark.parametrize("shape", MIXED_SHAPES, ids=lambda shape: shape.name)
def test_mixed_types(dtypes, shape):
    run_case(dtypes, shape, ("normal", "outliers"))


def test_every_product_op_is_in_the_graph():
    graph = product_graph(("q4_k",), 16, 256)
    assert {node.op for node in graph.nodes} - {"quantize", "rms_factor"} == set(product_ops())


def test_a_wrong_row_is_caught():
    """The bars see one wrong element: a scale that is off by a thousandth in one row."""
    graph = product_graph(("q8_0",), 16, 256)
    raw, values = random_matrices(graph)
    values["w0"][5] *= 1.001
    shape = SHAPE_CLASSES[0]
    states = {"x": inputs("normal", 256), "residual": inputs("normal", 16), "position": np.zeros(1, np.int32),
              "stop": np.zeros(1, np.int32), "token": np.zeros(1, np.int32), "log": np.zeros(32, np.int32),
              "end_tokens": np.full(8, -1, np.int32)}  # fmt: skip
    with Step(graph, target_of(shape), raw) as step, pytest.raises(AssertionError, match="1 of 16 elements beyond"):
        check(graph, values, states, step.run(states), "planted")


def test_digits_are_those_of_the_interpreter():
    """A vector's digits, but for the few that a fused multiply-add rounds the other way."""
    graph = product_graph(("q8_0",), 16, 2048)
    raw, _ = random_matrices(graph)
    x = inputs("normal", 2048)
    with Step(graph, target_of(SHAPE_CLASSES[0]), raw) as step:
        got = step.run({"x": x})["rxq"]
    assert isinstance(got, Digits)
    high, low, scale = quantize_i8x2(x)
    assert (got.scale == scale).all()
    whole = 254.0 * high + low
    assert np.abs(got.whole - whole).max() <= 1
    assert (got.whole == whole).mean() > 0.99
