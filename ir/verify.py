"""Checks a graph: names, order, types, attributes, results. Runs between passes."""

from __future__ import annotations

import difflib
import re

from .errors import SpecError
from .graph import PARAM_KINDS, Graph, Node, TensorType, Value
from .op import Op, TypeMismatch
from .ops import OPS
from .syntax import underlined
from .text import print_node
from .types import DTYPES, I8X2_GROUP, family


def suggestion(name: str, known: list[str]) -> str:
    """` (did you mean X?)`, or nothing."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def node_error(graph_name: str, node: Node, message: str, at: str = "") -> SpecError:
    """A SpecError that shows the node's line with `at` underlined (the whole line if empty).

    at: an operand as `%name`, the op, or any other part of the line.
    """
    line = print_node(node, origin=False)
    # An operand is looked for behind the op, where the results with similar names are not.
    behind = line.index(f" = {node.op}(") + 3
    found = re.compile(re.escape(at) + r"(?![A-Za-z0-9_.])").search(line, behind if at else 0) if at else None
    start, length = (found.start(), len(at)) if found else (0, len(line))
    where = ", ".join(map(str, node.origin)) or f"graph {graph_name}"
    return SpecError(f"{where}: {node.op}: {message}\n{underlined(line, start, length)}")


def check_node(graph_name: str, node: Node) -> None:
    """The op exists, and operands, attributes and results fit its row of the table."""
    op = OPS.get(node.op)
    if op is None:
        message = f"no such op{suggestion(node.op, list(OPS))}"
        raise node_error(graph_name, node, message, node.op)
    try:
        wanted = op.infer([value.type for value in node.ins], node.attributes)
    except TypeMismatch as problem:
        at = "" if problem.operand is None else f"%{node.ins[problem.operand].name}"
        raise node_error(graph_name, node, str(problem), at) from None
    if len(wanted) != len(node.outs):
        raise node_error(graph_name, node, f"has {len(wanted)} results, not {len(node.outs)}")
    for index, (out, type_) in enumerate(zip(node.outs, wanted, strict=True)):
        if out.type != type_ and not _may_be_quantized(op, node, index, out.type, type_):
            raise node_error(graph_name, node, f"%{out.name} is {out.type}, but the op makes {type_}")


def _may_be_quantized(op: Op, node: Node, index: int, actual: TensorType, inferred: TensorType) -> bool:
    if inferred != TensorType("f32", actual.shape):
        return False
    if actual.dtype == "f16":
        return True  # how rows of activations may lie in memory
    fits = actual.dtype == "i8x2" and actual.shape[-1] % I8X2_GROUP == 0
    return fits and index in op.quantizable(len(node.ins), node.attributes)


def verify(graph: Graph, lowered: bool = False) -> None:
    """Raises SpecError, with the line of the program underlined and its YAML line, unless:

    - every value is defined once, before its uses, and used with the type it was defined with;
    - every node fits its op's row; i8x2 stands only where the row allows it;
    - nothing reads a cache or log after a node took it over;
    - every result is defined, named once, and has the type of the state that takes it.

    lowered: also that integer weights meet i8x2 activations and float weights f32 ones.
    """
    defined: dict[str, Value] = {}
    for param in graph.params:
        _check_param(graph, param.kind, param.value, defined)
        defined[param.name] = param.value
    consumed: dict[str, str] = {}
    for node in graph.nodes:
        for value in node.ins:
            if value.name not in defined:
                raise node_error(graph.name, node, f"%{value.name} is not defined before it is used", f"%{value.name}")
            if defined[value.name].type != value.type:
                was = defined[value.name].type
                message = f"%{value.name} is read as {value.type} but was defined as {was}"
                raise node_error(graph.name, node, message, f"%{value.name}")
            if value.name in consumed:
                message = f"%{value.name} was taken over by %{consumed[value.name]} already"
                raise node_error(graph.name, node, message, f"%{value.name}")
        check_node(graph.name, node)
        if lowered:
            _check_lowered(graph, node)
        for out in node.outs:
            if out.name in defined:
                raise node_error(graph.name, node, f"%{out.name} is defined twice")
            defined[out.name] = out
        consumed.update(takeovers(node))
    _check_results(graph, defined)


def takeovers(node: Node) -> dict[str, str]:
    """Operand name -> name of the result that overwrites its memory."""
    op = OPS[node.op]
    if not op.consumes:
        return {}
    operands = op.operand_names(len(node.ins))
    results = op.result_names(len(node.ins), node.attributes)
    return {node.ins[operands.index(name)].name: node.outs[results.index(name)].name for name in op.consumes}


def product_weights(node: Node) -> tuple[Value, ...]:
    """The weight matrices that a product multiplies its first operand with; () for other ops."""
    op = OPS[node.op]
    if not op.product:
        return ()
    names = op.operand_names(len(node.ins))
    return tuple(value for name, value in zip(names, node.ins, strict=True) if re.fullmatch(r"w\d*|w_\w+", name))


def _check_lowered(graph: Graph, node: Node) -> None:
    for weight in product_weights(node):
        wanted = "i8x2" if family(weight.type.dtype) == "integer" else "f32"
        if node.ins[0].type.dtype != wanted:
            message = f"{weight.type.dtype} weights want a {wanted} activation, not {node.ins[0].type.dtype}"
            raise node_error(graph.name, node, message, f"%{node.ins[0].name}")


def _check_param(graph: Graph, kind: str, value: Value, defined: dict[str, Value]) -> None:
    problem = ""
    if kind not in PARAM_KINDS:
        problem = f"{kind} is no kind of parameter ({', '.join(PARAM_KINDS)})"
    elif value.name in defined:
        problem = "is defined twice"
    elif value.type.dtype not in DTYPES:
        problem = f"has an unknown element type (known: {', '.join(DTYPES)})"
    elif not value.type.shape or min(value.type.shape) < 1:
        problem = "has an empty shape"
    if problem:
        line = f"{kind} {value}"
        raise SpecError(f"graph {graph.name}: %{value.name} {problem}\n{underlined(line, 0, len(line))}")


def _check_results(graph: Graph, defined: dict[str, Value]) -> None:
    params = {param.name: param for param in graph.params}
    seen = set()
    for name, value in graph.results:
        line = f"return {name}=%{value.name}"
        problem = ""
        if name in seen:
            problem = f"{name} is returned twice"
        elif defined.get(value.name) != value:
            problem = f"%{value.name} is not defined as {value.type}"
        elif name in params and params[name].kind != "state":
            problem = f"{name} is a {params[name].kind} and keeps its value"
        elif name in params and params[name].type != value.type:
            problem = f"{name} is {params[name].type} and cannot take {value.type}"
        if problem:
            raise SpecError(f"graph {graph.name}: {problem}\n{underlined(line, 7, len(line) - 7)}")
        seen.add(name)
