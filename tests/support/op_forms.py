"""The example of every op of the table as a small graph, with what goes into it: for tests that are derived."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from weights import dequantized, raw_weights

from psigraph.codegen.lower import lower
from psigraph.codegen.target import Target
from psigraph.ir.errors import SpecError, UnsupportedModelError
from psigraph.ir.graph import Graph, Literal, Node, Param, TensorType, Value
from psigraph.ir.op import Op, TypeMismatch
from psigraph.ir.regime import Regime
from psigraph.ir.sampling import peaks_of
from psigraph.ir.types import I8X2_GROUP
from psigraph.ir.verify import verify
from psigraph.text.sampler import SamplerSettings

ROWS = {Regime.STEP: 1, Regime.FEW: 5, Regime.MANY: 20}
THERE = {Regime.STEP: 1, Regime.FEW: 4, Regime.MANY: 13}  # rows that are not absent
FIRST = 2  # position of the first
CONSTANTS = ("end_tokens", "sampler")
SETTINGS = SamplerSettings(temperature=0.9, repetition_penalty=1.3, presence_penalty=0.4, logit_bias={7: 0.5}, seed=3)
NARROW = {Regime.STEP: "i8x2", Regime.FEW: "f16", Regime.MANY: "f16"}
"""How activations lie in memory where not as float32."""


@dataclass(frozen=True)
class Form:
    """One way in which an op's values may lie in memory: its node, with the nodes that make its operands."""

    op: Op
    regime: Regime
    graph: Graph

    @property
    def node(self) -> Node:
        return self.graph.nodes[-1]

    @property
    def label(self) -> str:
        types = ", ".join(str(value.type) for value in self.node.ins)
        return f"{self.op.name}({types}) -> {', '.join(str(value.type) for value in self.node.outs)}"


def forms(op: Op, regime: Regime) -> Iterator[Form]:
    """The example with float32 everywhere, and with narrow activations wherever the op's types allow them."""
    types, attributes = op.example_of(ROWS[regime])
    types = [one_sequence(type_) for type_ in types]
    names = op.operand_names(len(types))
    activations = [i for i, type_ in enumerate(types) if type_.dtype == "f32" and type_.shape[0] == ROWS[regime]]
    first = [i for i in activations[:1] if len(types[i].shape) > 1]
    for narrow_operand in (False, True) if first else (False,):
        operands = list(types)
        if narrow_operand:
            operands[first[0]] = replace(types[first[0]], dtype=NARROW[regime])
        try:
            results = op.infer(operands, attributes)
        except TypeMismatch:
            continue
        for narrow_result in (False, True):
            outs = list(results)
            if narrow_result:
                allowed = op.quantizable(len(types), attributes) if NARROW[regime] == "i8x2" else range(len(outs))
                index = next((i for i in allowed if outs[i].dtype == "f32" and len(outs[i].shape) > 1), None)
                if index is None or (NARROW[regime] == "i8x2" and outs[index].shape[-1] % I8X2_GROUP):
                    continue
                outs[index] = replace(outs[index], dtype=NARROW[regime])
            yield Form(op, regime, _graph(op, regime, names, operands, outs, attributes))


def one_sequence(type_: TensorType) -> TensorType:
    """Caches of one sequence, as kernels know them."""
    return replace(type_, shape=(1, *type_.shape[1:])) if len(type_.shape) == 4 else type_


def _graph(
    op: Op,
    regime: Regime,
    names: list[str],
    types: list[TensorType],
    results: list[TensorType],
    attributes: dict[str, Literal],
) -> Graph:
    """The node behind those that make what no memory from outside holds: narrow activations, RMS factors."""
    rows = ROWS[regime]
    params: list[Param] = []
    nodes: list[Node] = []
    ins: list[Value] = []

    def param(name: str, type_: TensorType) -> Value:
        value = Value(name, type_)
        kind = "constant" if name in CONSTANTS else "weight" if is_weight(name, type_) else "state"
        params.append(Param(kind, value))
        return value

    def made(name: str, dtype: str, shape: tuple[int, ...], node: str, *operands: Value, **attrs: Literal) -> Value:
        value = Value(name, TensorType(dtype, shape))
        nodes.append(Node((value,), node, operands, tuple(sorted(attrs.items()))))
        return value

    for name, type_ in zip(names, types, strict=True):
        if type_.dtype == "i8x2":
            wide = param(name, replace(type_, dtype="f32"))
            ins.append(made(f"{name}.narrow", "i8x2", type_.shape, "quantize", wide))
        elif type_.dtype == "f16" and len(type_.shape) < 4 and not is_weight(name, type_):
            size = int(np.prod(type_.shape[1:]))
            heads = type_.shape[1] if len(type_.shape) == 3 else 1
            wide = param(name, TensorType("f32", (rows, heads, size // heads)))
            halves = made(f"{name}.narrow", "f16", (rows, size), "merge_heads", wide)
            if len(type_.shape) == 3:
                halves = made(f"{name}.heads", "f16", type_.shape, "split_heads", halves, heads=heads)
            ins.append(halves)
        elif name == "f":
            ins.append(made("f", "f32", type_.shape, "rms_factor", params[0].value, eps=1e-6))
        else:
            ins.append(param(name, type_))
    if "positions" not in names:
        param("positions", TensorType("i32", (rows,)))
    result_names = op.result_names(len(types), attributes)
    outs = tuple(Value(f"{name}.out", type_) for name, type_ in zip(result_names, results, strict=True))
    nodes.append(Node(outs, op.name, tuple(ins), tuple(attributes.items())))
    returned = tuple((f"result.{value.name}", value) for node in nodes for value in node.outs)
    return Graph(op.name, tuple(params), tuple(nodes), returned)


def is_weight(name: str, type_: TensorType) -> bool:
    """Matrices by their operand's name, and vectors that all rows share."""
    matrix = re.fullmatch(r"table|w\d*|w_\w+", name) is not None
    return matrix or (type_.dtype == "f32" and len(type_.shape) == 1)


def refusal(form: Form, target: Target) -> str:
    """Why there is no kernel for a form; "" where there is one."""
    try:
        verify(form.graph, lowered=form.regime is Regime.STEP)
        lower(form.graph, target, regime=form.regime)
    except (SpecError, UnsupportedModelError) as error:
        return str(error)
    return ""


def together(name: str, found: Sequence[Form]) -> Graph:
    """Forms of one regime as one graph, so that one image has their kernels; names of the form number i begin with
    `i.`."""
    params: list[Param] = []
    nodes: list[Node] = []
    results: list[tuple[str, Value]] = []
    for number, form in enumerate(found):

        def named(value: Value, prefix: str = f"{number}.") -> Value:
            return replace(value, name=prefix + value.name)

        params += [replace(param, value=named(param.value)) for param in form.graph.params]
        nodes += [
            replace(node, outs=tuple(map(named, node.outs)), ins=tuple(map(named, node.ins)))
            for node in form.graph.nodes
        ]
        results += [(f"{number}.{name}", named(value)) for name, value in form.graph.results]
    rows = Param("state", Value("positions", TensorType("i32", (ROWS[found[0].regime],))))
    return Graph(name, (rows, *params), tuple(nodes), tuple(results))


def inputs(form: Form) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(what lies in the device's memory, what it stands for) by parameter."""
    generator = np.random.default_rng(7)
    rows, there = ROWS[form.regime], THERE[form.regime]
    given: dict[str, np.ndarray] = {}
    values: dict[str, np.ndarray] = {}
    for param in form.graph.params:
        name, type_ = param.name, param.type
        if param.kind == "weight" and len(type_.shape) == 2:
            given[name] = raw_weights(type_.dtype, *type_.shape, 7)
            values[name] = dequantized(given[name], type_.dtype, *type_.shape).astype(np.float64)
            continue
        if name == "positions":
            array = np.where(np.arange(rows) < there, FIRST + np.arange(rows), -1).astype(np.int32)
        elif name == "tokens":
            array = generator.integers(0, 9, type_.shape).astype(np.int32)
        elif name == "sampler":
            array = SETTINGS.words()
        elif name == "end_tokens":
            array = np.arange(8, dtype=np.int32) - 1
        elif name == "peaks":
            array = np.stack([peaks_of(row) for row in values["logits"]]).astype(np.float32)
        elif type_.dtype == "i32":
            array = np.zeros(type_.shape, np.int32)
        else:
            array = generator.standard_normal(type_.shape).astype(np.float16 if type_.dtype == "f16" else np.float32)
        given[name] = array
        values[name] = array.astype(np.float64) if array.dtype == np.float32 else array
    return given, values
