"""Prints a graph as text and reads it back: `parse_graph(print_graph(g)) == g`, origins too."""

from __future__ import annotations

import json

from .errors import SpecError
from .graph import PARAM_KINDS, Graph, Literal, Node, Param, Value, layer_of
from .syntax import Name, Reader, Statement


def print_literal(value: Literal) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return f"({','.join(map(str, value))})"
    return repr(value)


def print_node(node: Node, origin: bool = True) -> str:
    """`%y: f32[4] = add(%a, %b)   # qwen3.yaml:12`"""
    outs = ", ".join(map(str, node.outs))
    ins = ", ".join(f"%{value.name}" for value in node.ins)
    attrs = ", ".join(f"{key}={print_literal(value)}" for key, value in node.attrs)
    line = f"{outs} = {node.op}({ins})" + (f" {{{attrs}}}" if attrs else "")
    if origin and node.origin:
        line += f"   # {', '.join(map(str, node.origin))}"
    return line


def print_graph(graph: Graph, layer: int | None = None) -> str:
    """The graph's text. With `layer` only the nodes of that layer and the parameters that they
    read: for people, not for parse_graph, because the other layers' values are missing."""
    nodes = [node for node in graph.nodes if layer is None or layer_of(node) == layer]
    read = {value.name for node in nodes for value in node.ins}
    params = [param for param in graph.params if layer is None or param.name in read]
    lines = [f"graph {graph.name}("]
    lines += [f"  {param.kind} {param.value}{',' if last else ''}" for param, last in _with_comma(params)]
    lines.append(") {")
    lines += [f"  {print_node(node)}" for node in nodes]
    if layer is None:
        lines.append(f"  return {', '.join(f'{name}=%{value.name}' for name, value in graph.results)}")
    lines.append("}")
    return "\n".join(lines) + "\n"


def _with_comma(params: list[Param]) -> list[tuple[Param, bool]]:
    return [(param, index + 1 < len(params)) for index, param in enumerate(params)]


def parse_graph(text: str, file: str = "graph.ir") -> Graph:
    """Reads what print_graph printed. SpecError underlines what it cannot read, a value that
    nothing defined, or a type that is missing; `ir.verify` checks the rest."""
    reader = Reader(text, file)
    reader.take("graph")
    name = reader.take("word").text
    known: dict[str, Value] = {}
    params = _params(reader, known)
    reader.take("{")
    nodes = []
    while reader.token.text != "return":
        nodes.append(_node(reader, reader.statement(), known))
    reader.take("return")
    results = []
    while True:
        state = reader.take("word").text
        reader.take("=")
        results.append((state, _known(reader, reader.value(), known)))
        if not reader.accept(","):
            break
    reader.take("}")
    reader.take("end")
    return Graph(name, params, tuple(nodes), tuple(results))


def _params(reader: Reader, known: dict[str, Value]) -> tuple[Param, ...]:
    found = []
    reader.take("(")
    while not reader.accept(")"):
        kind = reader.take(*PARAM_KINDS).text
        name = reader.value()
        reader.take(":")
        known[name] = Value(name, reader.type())
        found.append(Param(kind, known[name]))
        if reader.token.text != ")":
            reader.take(",")
    return tuple(found)


def _node(reader: Reader, statement: Statement, known: dict[str, Value]) -> Node:
    ins = tuple(_known(reader, name, known) for name in statement.ins)
    outs = []
    for name, type_ in statement.outs:
        if type_ is None:
            raise SpecError(f"{reader.file}:{statement.line}: %{name} needs a type")
        known[name] = Value(name, type_)
        outs.append(known[name])
    attrs = []
    for key, value in statement.attrs:
        if isinstance(value, Name):
            raise SpecError(f"{reader.file}:{statement.line}: {key}=${value.name} is no literal")
        attrs.append((key, value))
    return Node(tuple(outs), statement.op, ins, tuple(attrs), statement.origin)


def _known(reader: Reader, name: str, known: dict[str, Value]) -> Value:
    if name not in known:
        token = next(t for t in reversed(reader.tokens[: reader.index]) if t.text == f"%{name}")
        raise reader.error(f"%{name} is not defined here", token)
    return known[name]
