"""What a new attribute takes to reach its op's kernels: a member of the op's struct, and every kernel computes it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from prefill_graphs import EPS, row_states
from product_graphs import random_matrices
from run_node import Step

from psigraph.codegen.lower import lower
from psigraph.codegen.target import target_for
from psigraph.ir.graph import Graph
from psigraph.ir.ops import OPS
from psigraph.ir.program import DECODE, PREFILL, Launch, LibraryProduct, Program
from psigraph.ir.regime import Regime
from psigraph.ir.text import parse_graph
from psigraph.ir.verify import verify

STRUCT = re.compile(r"struct MatvecAdd \{.*?\n\};", re.DOTALL)  # whatever members it has
NEW = """struct MatvecAdd {
    float by;
    METHOD float operator()(float residual, float product) const { return residual + by * product; }
};"""
WAYS = [(Regime.STEP, 1, False), (Regime.MANY, 20, False), (Regime.MANY, 20, True)]


@pytest.fixture
def by(monkeypatch: pytest.MonkeyPatch) -> None:
    """`matvec_add` with the optional attribute `by`, a factor of the product."""
    monkeypatch.setitem(OPS, "matvec_add", replace(OPS["matvec_add"], optional={"by": float}))


def graph_of(rows: int, attribute: str) -> Graph:
    """A residual and a product of it behind a norm."""
    halves = "f16" if rows > 1 else "f32"
    return parse_graph(f"""graph one(weight %w: f16[40,256], weight %norm: f32[256], state %x: f32[{rows},256],
            state %residual: f32[{rows},40], {row_states(rows)}) {{
        %h: {halves}[{rows},256] = rms_norm(%x, %norm) {{eps={EPS}}}
        %y: f32[{rows},40] = matvec_add(%h, %w, %residual) {attribute}
        return h=%h, y=%y
    }}""")


def lowered(graph: Graph, regime: Regime, library: bool = False) -> Program:
    name = PREFILL if regime is Regime.MANY else DECODE
    return lower(graph, target_for("host"), regime=regime, name=name, library=library)


def with_member(program: Program) -> Program:
    """The program with the op's struct as it is where the op has the attribute."""
    text, count = STRUCT.subn(NEW, program.headers["functions.cuh"])
    assert count == 1, "functions.cuh has no struct MatvecAdd"
    return replace(program, headers={**program.headers, "functions.cuh": text})


@pytest.mark.parametrize(("regime", "rows", "library"), WAYS)
@pytest.mark.usefixtures("by")
def test_every_kernel_computes_it(regime: Regime, rows: int, library: bool) -> None:
    graph = graph_of(rows, "{by=0.5}")
    verify(graph)
    raw, values = random_matrices(graph)
    states: dict[str, Any] = {
        "x": np.random.default_rng(1).standard_normal((rows, 256)).astype(np.float32),
        "residual": np.random.default_rng(2).standard_normal((rows, 40)).astype(np.float32),
    }
    program = with_member(lowered(graph, regime, library))
    with Step(graph, target_for("host"), raw, program=program) as step:
        got = step.run(states)
    product = np.asarray(got["h"], np.float64) @ values["w"].T
    np.testing.assert_allclose(got["y"], states["residual"] + 0.5 * product, rtol=0, atol=1e-5)


def test_a_library_adds_where_nothing_else_is_asked_for() -> None:
    launches = lowered(graph_of(20, ""), Regime.MANY, library=True).step(PREFILL).launches
    product = launches[-1]
    assert isinstance(product, LibraryProduct)
    assert (product.add, product.c) == (True, "residual")


@pytest.mark.usefixtures("by")
def test_a_kernel_comes_behind_a_library_where_an_attribute_says_how() -> None:
    *_, product, end = lowered(graph_of(20, "{by=0.5}"), Regime.MANY, library=True).step(PREFILL).launches
    assert isinstance(product, LibraryProduct)
    assert isinstance(end, Launch)
    assert (product.add, end.kernel) == (False, "prefill_matvec_add_end")
