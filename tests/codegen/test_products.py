"""Every product op x weight type x shape class that the compiler lists, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from bars import SUM_UNITS, UNIT, assert_close
from catalogue import EVERY_FORM, MIXED, MIXED_SHAPES, PRODUCTS, SHAPE_CLASSES, ShapeClass, product_cases
from product_graphs import overridden, product_graph, random_matrices, target_of, terms
from run_node import ActivationBlock, Arrays, Step, same_bits

from psigraph.ir.graph import Graph, Node
from psigraph.ir.op import EvalContext
from psigraph.ir.ops import OPS
from psigraph.ir.types import quantize_i8x2
from psigraph.ir.verify import product_weights

CONTEXT = EvalContext(np.float64)
ROUND = SUM_UNITS * UNIT
STILL: Arrays = {
    "tokens": np.zeros(1, np.int32),
    "positions": np.zeros(1, np.int32),
    "sequences": np.zeros(1, np.int32),
    "stop": np.zeros(1, np.int32),
    "log": np.zeros((1, 32), np.int32),
    "end_tokens": np.full(8, -1, np.int32),
}


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
    """Every node's results against its reference in float64, from the operands that the device had.

    rough: hold sums against the terms that kernels add up (see `terms`), not against abs(w x).
    """
    known = dict(values)
    for name, array in states.items():
        known[name] = array.astype(np.float64) if array.dtype == np.float32 else array
    returned = {value.name: name for name, value in graph.results}
    for node in graph.nodes:
        label = f"{what}: {node.op} {node.out.name if len(node.outs) == 1 else node.outs[0].name}"
        wanted = OPS[node.op].reference(CONTEXT, [known[value.name] for value in node.ins], node.attributes)
        known |= {value.name: array for value, array in zip(node.outs, wanted, strict=True)}
        if node.op == "quantize":
            digits = got[returned[node.out.name]]
            assert_close(digits, wanted[0], 0.0, label)
            known[node.out.name] = digits.values[None]
            continue
        bounds = allowed(node, known, rough)
        for value, array, bound in zip(node.outs, wanted, bounds, strict=True):
            if value.name not in returned:
                continue
            found = got[returned[value.name]]
            if value.type.dtype == "i32":
                assert found.tolist() == array.tolist(), f"{label}: {value.name}"
            elif value.type.shape == (1, 1):  # an RMS factor
                np.testing.assert_allclose(found, array, rtol=16 * UNIT, err_msg=label)
            else:
                assert_close(found, array, bound, f"{label}: {value}")


def allowed(node: Node, known: dict[str, np.ndarray], rough: bool) -> list[np.ndarray | float]:
    """How far each result of a node may be off (see `bars`)."""
    ins = [known[value.name] for value in node.ins]
    weights = product_weights(node)
    matrices = [known[value.name] for value in weights]
    x = np.abs(ins[0])
    scale = ins[1] if node.op.startswith("scaled_") else 1.0
    sizes = [terms(known[w.name], w.type.dtype) if rough else np.abs(known[w.name]) for w in weights]
    sums = [scale * (x @ size.T) for size in sizes]
    if node.op in ("matvec", "scaled_matvec"):
        return [ROUND * total for total in sums]
    if node.op.endswith("swiglu"):
        gate, up = (scale * (ins[0] @ matrix.T) for matrix in matrices)
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
                **STILL,
                "x": inputs(kind, shape.columns)[None],
                "residual": inputs("normal", shape.rows, 5)[None],
                "positions": np.array([7], np.int32),
                "log": np.full((1, 32), -5, np.int32),
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
    assert {node.op for node in graph.nodes} - {"quantize", "rms_factor"} == set(PRODUCTS)


def test_a_wrong_row_is_caught():
    """The bars see one wrong element: a scale that is off by a thousandth in one row."""
    graph = product_graph(("q8_0",), 16, 256)
    raw, values = random_matrices(graph)
    values["w0"][5] *= 1.001
    shape = SHAPE_CLASSES[0]
    states = {**STILL, "x": inputs("normal", 256)[None], "residual": inputs("normal", 16)[None]}
    with Step(graph, target_of(shape), raw) as step, pytest.raises(AssertionError, match="1 of 16 elements beyond"):
        check(graph, values, states, step.run(states), "planted")


def test_digits_are_those_of_the_interpreter():
    """A vector's digits, but for the few that a fused multiply-add rounds the other way."""
    graph = product_graph(("q8_0",), 16, 2048)
    raw, _ = random_matrices(graph)
    x = inputs("normal", 2048)
    with Step(graph, target_of(SHAPE_CLASSES[0]), raw) as step:
        got = step.run({"x": x})["rxq"]
    assert isinstance(got, ActivationBlock)
    high, low, scale = quantize_i8x2(x)
    assert (got.scale == scale).all()
    whole = 254.0 * high + low
    assert np.abs(got.whole - whole).max() <= 1
    assert (got.whole == whole).mean() > 0.99
