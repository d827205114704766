"""Random models and random graphs, through random subsets of the passes: the numbers stay."""

import time
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ROWS, Small, assert_same_steps, only, random_weights, row_feeds, run_steps

from psigraph.ir.graph import Graph, Node, Param, TensorType, Value
from psigraph.ir.interpret import Interpreter
from psigraph.ir.regime import Regime
from psigraph.ir.text import parse_graph, print_graph
from psigraph.ir.types import WEIGHT_DTYPES
from psigraph.ir.verify import verify
from psigraph.passes.pipeline import PIPELINE, run_pipeline

SUBSETS = st.sets(st.sampled_from([step.name for step in PIPELINE if not step.lowering]))
REGIMES = st.sampled_from(Regime)
KINDS = ("attn_q", "attn_v", "attn_output", "ffn_gate", "ffn_down", "token_embd", "output")


@st.composite
def models(draw):
    """Shapes whose rows are whole blocks of every type, mostly with head_dim != hidden / heads."""
    head_dim = draw(st.sampled_from([32, 64, 128]))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    group = 256 // head_dim if kv_heads * head_dim < 256 else 1
    heads = kv_heads * draw(st.sampled_from([1, 2, 4])) * group
    special = draw(st.dictionaries(st.sampled_from(KINDS), st.sampled_from(WEIGHT_DTYPES), max_size=3))
    return Small(
        layers=draw(st.sampled_from([1, 3])),
        hidden=draw(st.sampled_from([256, 512])),
        ffn=draw(st.sampled_from([256, 768])),
        heads=heads if heads * head_dim % 256 == 0 else heads * (256 // head_dim),
        kv_heads=kv_heads,
        head_dim=head_dim,
        tied=draw(st.booleans()),
        dtype=draw(st.sampled_from(WEIGHT_DTYPES)),
        dtypes=tuple(special.items()),
        context=32,
        sequences=2,
    )


@given(models(), REGIMES, SUBSETS, st.sampled_from([(), ("logits",)]))
@settings(max_examples=25, deadline=None)
def test_random_models(small, regime, disabled, outputs):
    graph = small.graph(*outputs, rows=ROWS[regime])
    fused, _ = run_pipeline(graph, disabled, regime=regime)
    assert parse_graph(print_graph(fused)) == fused
    weights, feeds = random_weights(graph), row_feeds(ROWS[regime])
    wanted = only(dict(fused.results), run_steps(graph, weights, feeds))
    assert_same_steps(wanted, run_steps(fused, weights, feeds, exact_activations=True))


N = 32


class Wiring:
    """Adds nodes to a graph, with operands drawn from what is there."""

    def __init__(self, draw, matrices, rows):
        self.draw = draw
        self.matrices = matrices
        self.type, self.factor_type = TensorType("f32", (rows, N)), TensorType("f32", (rows, 1))
        self.weights = [Value(name, TensorType("f32", (N,))) for name in ("n", "m")]
        self.values = [Value("x", self.type)]
        self.factors = []
        self.nodes = []

    def add(self, op, *ins):
        type_ = self.factor_type if op == "rms_factor" else self.type
        out = Value(f"v{len(self.nodes)}", type_)
        attrs = (("eps", 1e-6),) if op in ("rms_norm", "rms_factor") else ()
        self.nodes.append(Node((out,), op, ins, attrs))
        (self.factors if op == "rms_factor" else self.values).append(out)
        return out

    def value(self):
        # The newest values most often, so that chains arise and not only stars.
        recent = self.values[-2:]
        return self.draw(st.sampled_from([*self.values, *recent, *recent, *recent]))

    def weight(self):
        return self.draw(st.sampled_from(self.weights))

    def matrix(self):
        return self.draw(st.sampled_from(self.matrices))

    # The forms that passes look for. What is drawn later may read any value of theirs.

    def product(self):
        self.add("matvec", self.value(), self.matrix())

    def scaled(self):
        factor = self.add("rms_factor", self.value())
        self.add("scaled_matvec", self.value(), self.draw(st.sampled_from([factor, *self.factors])), self.matrix())

    def pair(self):
        self.add(self.draw(st.sampled_from(["add", "mul", "swiglu"])), self.value(), self.value())

    def norm(self, x=None):
        normed = self.add("rms_norm", x or self.value(), self.weight())
        for _ in range(self.draw(st.integers(0, 3))):
            self.add("matvec", normed, self.matrix())

    def residual(self):
        x, product = self.value(), self.add("matvec", self.value(), self.matrix())
        total = self.add("add", *self.draw(st.permutations([x, product])))
        if self.draw(st.booleans()):
            self.norm(total)
        elif self.draw(st.booleans()):
            self.add("mul", total, self.draw(st.sampled_from([self.weight(), self.value()])))
            self.add("rms_factor", total)

    def gate(self):
        x = self.value()
        self.add("swiglu", self.add("matvec", x, self.matrix()), self.add("matvec", x, self.matrix()))


@st.composite
def graphs(draw):
    """Any wiring of the vector ops, with any values as results."""
    dtypes = draw(st.lists(st.sampled_from(["q8_0", "f16"]), min_size=1, max_size=3))
    matrices = [Value(f"w{index}", TensorType(dtype, (N, N))) for index, dtype in enumerate(dtypes)]
    wiring = Wiring(draw, matrices, draw(st.sampled_from([1, 3])))
    forms = [wiring.product, wiring.scaled, wiring.pair, wiring.norm, wiring.residual, wiring.residual, wiring.gate]
    for _ in range(draw(st.integers(1, 6))):
        draw(st.sampled_from(forms))()
    made = [node.out for node in wiring.nodes]
    kept = draw(st.lists(st.sampled_from(made), max_size=2, unique=True))
    results = {f"r{index}": value for index, value in enumerate([*kept, made[-1]])}
    params = [Param("weight", value) for value in (*matrices, *wiring.weights)]
    states = [wiring.values[0], *(replace(value, name=name) for name, value in results.items())]
    params += [Param("state", value) for value in states]
    return Graph("random", tuple(params), tuple(wiring.nodes), tuple(results.items()))


@given(graphs(), REGIMES, SUBSETS)
@settings(max_examples=100, deadline=None)
def test_random_graphs(graph, regime, disabled):
    verify(graph)
    fused, _ = run_pipeline(graph, disabled, regime=regime)
    assert parse_graph(print_graph(fused)) == fused
    rng = np.random.default_rng(1)
    values = {param.name: rng.standard_normal(param.type.shape) for param in graph.params}
    interpreter = Interpreter(exact_activations=True)
    wanted = interpreter.results(graph, interpreter.run(graph, values))
    found = interpreter.results(fused, interpreter.run(fused, values))
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        scale = np.abs(array).max() if np.isfinite(array).all() else 1
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-6 * scale)


def test_a_large_model_takes_little_time():
    small = Small(layers=36)
    began = time.process_time()
    graph = small.graph("logits")
    fused, _ = run_pipeline(graph)
    assert time.process_time() - began < 2
    assert len(fused.nodes) == 5 * 36 + 2
