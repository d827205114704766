"""Derived from the op table: every kernel that there is for an op computes the op's reference on its example.

The bars are coarse; what rounding may do to each result is held by the tests of the kinds of kernels beside this one.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from op_forms import ROWS, THERE, Form, forms, inputs, refusal, together
from run_node import ActivationBlock, Step, same_bits

from psigraph.codegen.emitters import EMITTERS
from psigraph.codegen.lower import VIEWS, lower
from psigraph.codegen.target import target_for
from psigraph.ir.errors import UnsupportedModelError
from psigraph.ir.graph import Graph, TensorType, Value
from psigraph.ir.op import EvalContext
from psigraph.ir.ops import OPS
from psigraph.ir.regime import Regime
from psigraph.ir.verify import verify

HOST = target_for("host")
CONTEXT = EvalContext(np.float64)
# Of the largest value of a result: float32 sums of some hundred terms, 1 / 32258 of a group's largest, half of 2^-10.
BARS = {"f32": 2e-5, "i8x2": 1e-4, "f16": 2e-3}
KERNELS = [(name, regime) for regime in Regime for name in OPS if (name, regime) in EMITTERS or name in VIEWS]


@functools.cache
def forms_of(name: str, regime: Regime) -> tuple[Form, ...]:
    """The forms that kernels take; AssertionError says what to add where there is none."""
    refused = {form.label: refusal(form, HOST) for form in forms(OPS[name], regime)}
    found = tuple(form for form in forms(OPS[name], regime) if not refused[form.label])
    reasons = "; ".join(f"{label}: {why}" for label, why in refused.items())
    assert found, f"op {name}: its kernel for {regime} takes no form of the example of its row in ir/ops: {reasons}"
    return found


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_a_kernel(name: str) -> None:
    known = name in VIEWS or any((name, regime) in EMITTERS for regime in Regime)
    assert known, (
        f"op {name} has no kernel for any number of rows: add an emitter to EMITTERS of a file of codegen/emit"
    )


@pytest.mark.parametrize(("name", "regime"), KERNELS, ids=str)
def test_an_example_can_be_lowered(name: str, regime: Regime) -> None:
    assert forms_of(name, regime)


@pytest.fixture(scope="module")
def ran() -> dict[Regime, dict[str, object]]:
    """Results by regime, of all forms in one image."""
    return {}


def results(ran: dict[Regime, dict[str, object]], regime: Regime) -> tuple[list[Form], dict[str, object]]:
    """All forms of a regime, and their results by `number.result.value`."""
    found = [form for name, other in KERNELS if other is regime for form in forms_of(name, regime)]
    if regime not in ran:
        graph = together(f"examples of {regime}", found)
        verify(graph)
        given = {f"{i}.{name}": array for i, form in enumerate(found) for name, array in inputs(form)[0].items()}
        there = {"count": np.array([THERE[regime]])}
        with Step(graph, HOST, given, regime=regime) as step:
            ran[regime] = step.run({**given, **there})
            again = step.run({**given, **there}, "shuffle")
        assert all(same_bits(ran[regime][name], again[name]) for name in again), "the order of threads shows"
    return found, ran[regime]


@pytest.mark.parametrize(("name", "regime"), KERNELS, ids=str)
def test_a_kernel_computes_the_reference(name: str, regime: Regime, ran: dict[Regime, dict[str, object]]) -> None:
    found, got = results(ran, regime)
    for number, form in enumerate(found):
        if form.op.name == name:
            mine = {key.removeprefix(f"{number}.result."): value for key, value in got.items()}
            check(form, mine)


def check(form: Form, got: dict[str, object]) -> None:
    """The node's results, from the operands that the device had."""
    known = inputs(form)[1]
    for node in form.graph.nodes[:-1]:
        known[node.out.name] = plain(got[node.out.name], node.out)
    node = form.node
    wanted = form.op.reference(CONTEXT, [known[value.name] for value in node.ins], node.attributes)
    names = form.op.result_names(len(node.ins), node.attributes)
    for name, value, want in zip(names, node.outs, wanted, strict=True):
        what = f"{form.label}: {name}"
        rows = slice(None) if name in form.op.consumes else slice(THERE[form.regime])
        have, want = plain(got[value.name], value)[rows], np.asarray(want)[rows]
        if value.type.dtype == "i32":
            assert have.tolist() == want.tolist(), what
        else:
            bar = BARS[value.type.dtype] * np.abs(want).max()
            np.testing.assert_allclose(have, want, rtol=0, atol=bar, err_msg=what)


def plain(found: object, value: Value) -> np.ndarray:
    """A result as an array of its type's shape, in float64 but for integers."""
    array = found.values if isinstance(found, ActivationBlock) else np.asarray(found)
    return array.reshape(value.type.shape).astype(np.int32 if value.type.dtype == "i32" else np.float64)


@pytest.mark.parametrize(("name", "regime"), [pair for pair in KERNELS if pair[0] not in VIEWS], ids=str)
def test_an_attribute_that_no_emitter_reads_is_refused(name: str, regime: Regime) -> None:
    form = forms_of(name, regime)[0]
    node = form.node
    odd = type(node)(node.outs, node.op, node.ins, (*node.attrs, ("nobody_reads_this", 2.0)))
    graph = Graph(name, form.graph.params, (*form.graph.nodes[:-1], odd), form.graph.results)
    with pytest.raises(UnsupportedModelError) as caught:
        lower(graph, HOST, regime=regime)
    assert str(caught.value) == f"op {name}: its kernel for {regime} does not know the attribute nobody_reads_this"


MISSING = [(name, regime) for name in OPS for regime in Regime if (name, regime) not in KERNELS]


@pytest.mark.parametrize(("name", "regime"), MISSING, ids=str)
def test_what_a_regime_lacks_is_refused_by_name(name: str, regime: Regime) -> None:
    form = next(forms(OPS[name], regime))
    graph = Graph(name, form.graph.params, form.graph.nodes[-1:], ())
    positions = [param for param in graph.params if param.name == "positions"]
    assert positions[0].type == TensorType("i32", (ROWS[regime],))
    with pytest.raises(UnsupportedModelError, match=f"^op {name} has no kernel for {regime}$"):
        lower(graph, HOST, regime=regime)
