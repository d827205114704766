"""Random models and random graphs, through random subsets of the passes: the numbers stay."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Small, assert_same_steps, decode, random_weights

from psigraph.ir.graph import Graph, Node, Param, TensorType, Value
from psigraph.ir.interpret import Interpreter
from psigraph.ir.text import parse_graph, print_graph
from psigraph.ir.types import WEIGHT_DTYPES
from psigraph.ir.verify import verify
from psigraph.passes.pipeline import PIPELINE, run_pipeline

SUBSETS = st.sets(st.sampled_from([step.name for step in PIPELINE if not step.lowering]))
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
    )


@given(models(), SUBSETS, st.sampled_from([(), ("logits",)]))
@settings(max_examples=25, deadline=None)
def test_random_models(small, disabled, outputs):
    graph = small.graph(*outputs)
    fused, _ = run_pipeline(graph, disabled)
    assert parse_graph(print_graph(fused)) == fused
    weights = random_weights(graph)
    assert_same_steps(decode(graph, weights, steps=2), decode(fused, weights, steps=2, exact_activations=True))


N = 32
VECTOR, ONE = TensorType("f32", (N,)), TensorType("f32", (1,))


class Wiring:
    """Adds nodes to a graph, with operands drawn from what is there."""

    def __init__(self, draw, matrices):
        self.draw = draw
        self.matrices = matrices
        self.weight = Value("n", VECTOR)
        self.vectors = [Value("x", VECTOR)]
        self.factors = []
        self.nodes = []

    def add(self, op, *ins, type_=VECTOR):
        out = Value(f"v{len(self.nodes)}", type_)
        attrs = (("eps", 1e-6),) if op in ("rms_norm", "rms_factor") else ()
        self.nodes.append(Node((out,), op, ins, attrs))
        (self.vectors if type_ == VECTOR else self.factors).append(out)
        return out

    def vector(self):
        # The newest values most often, so that chains arise and not only stars.
        recent = self.vectors[-2:]
        return self.draw(st.sampled_from([self.weight, *self.vectors, *recent, *recent, *recent]))

    def matrix(self):
        return self.draw(st.sampled_from(self.matrices))

    # The forms that passes look for. What is drawn later may read any value of theirs.

    def product(self):
        self.add("matvec", self.vector(), self.matrix())

    def scaled(self):
        factor = self.add("rms_factor", self.vector(), type_=ONE)
        self.add("scaled_matvec", self.vector(), self.draw(st.sampled_from([factor, *self.factors])), self.matrix())

    def pair(self):
        self.add(self.draw(st.sampled_from(["add", "mul", "swiglu"])), self.vector(), self.vector())

    def norm(self, x=None):
        weight = self.draw(st.sampled_from([self.weight, self.weight, self.vectors[-1]]))
        normed = self.add("rms_norm", x or self.vector(), weight)
        for _ in range(self.draw(st.integers(0, 3))):
            self.add("matvec", normed, self.matrix())

    def residual(self):
        x, product = self.vector(), self.add("matvec", self.vector(), self.matrix())
        total = self.add("add", *self.draw(st.permutations([x, product])))
        if self.draw(st.booleans()):
            self.norm(total)

    def gate(self):
        x = self.vector()
        self.add("swiglu", self.add("matvec", x, self.matrix()), self.add("matvec", x, self.matrix()))


@st.composite
def graphs(draw):
    """Any wiring of the vector ops, with any values as results."""
    dtypes = draw(st.lists(st.sampled_from(["q8_0", "f16"]), min_size=1, max_size=3))
    matrices = [Value(f"w{index}", TensorType(dtype, (N, N))) for index, dtype in enumerate(dtypes)]
    wiring = Wiring(draw, matrices)
    forms = [wiring.product, wiring.scaled, wiring.pair, wiring.norm, wiring.residual, wiring.residual, wiring.gate]
    for _ in range(draw(st.integers(1, 6))):
        draw(st.sampled_from(forms))()
    made = [node.out for node in wiring.nodes]
    kept = draw(st.lists(st.sampled_from(made), max_size=2, unique=True))
    results = {f"r{index}": value for index, value in enumerate([*kept, made[-1]])}
    params = [Param("weight", value) for value in (*matrices, wiring.weight)]
    params.append(Param("state", wiring.vectors[0]))
    return Graph("random", tuple(params), tuple(wiring.nodes), tuple(results.items()))


@given(graphs(), SUBSETS)
@settings(max_examples=100, deadline=None)
def test_random_graphs(graph, disabled):
    verify(graph)
    fused, _ = run_pipeline(graph, disabled)
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
