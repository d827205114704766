"""The one structure of psigraph: values, nodes and graphs.

Grammar (what `ir.text` prints and parses):

    graph    := "graph" NAME "(" param ("," param)* ")" "{" node* "return" result ("," result)* "}"
    param    := KIND value                          KIND: weight | state | constant
    value    := "%" NAME ":" type
    type     := DTYPE "[" INT ("," INT)* "]"
    node     := value ("," value)* "=" OP "(" use ("," use)* ")" attrs? origin?
    use      := "%" NAME
    attrs    := "{" KEY "=" literal ("," KEY "=" literal)* "}"
    result   := NAME "=" use                        NAME: the state that takes the value
    origin   := "#" FILE ":" LINE ("," FILE ":" LINE)*

Everything is frozen and compared by value; `origin`, where in the YAML a node comes
from, is left out of the comparison. A graph is changed by building another one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

Literal = int | float | bool | str | tuple[int, ...]

PARAM_KINDS = ("weight", "state", "constant")


@dataclass(frozen=True)
class TensorType:
    """Element type and shape. Matrices are [rows, columns] = [outputs, inputs]."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Value:
    """A named result: assigned once, used any number of times."""

    name: str
    type: TensorType

    def __str__(self) -> str:
        return f"%{self.name}: {self.type}"


@dataclass(frozen=True)
class Param:
    """A value that comes from outside.

    kind: `weight` (from the model file, the name is the tensor's name there), `state`
    (lives on the device from step to step, see `Graph.results`) or `constant` (filled
    once when the model is loaded).
    """

    kind: str
    value: Value

    @property
    def name(self) -> str:
        return self.value.name

    @property
    def type(self) -> TensorType:
        return self.value.type


@dataclass(frozen=True, order=True)
class Origin:
    """A line of a model spec."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Node:
    """One operation. `ins` are values of earlier nodes or parameters."""

    outs: tuple[Value, ...]
    op: str
    ins: tuple[Value, ...]
    attrs: tuple[tuple[str, Literal], ...] = ()
    origin: tuple[Origin, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attrs", tuple(sorted(self.attrs)))

    @property
    def attributes(self) -> dict[str, Literal]:
        return dict(self.attrs)

    def attr(self, key: str, default: Literal | None = None) -> Literal:
        """The attribute's value; without a default KeyError names the op if it is missing."""
        for name, value in self.attrs:
            if name == key:
                return value
        if default is None:
            raise KeyError(f"{self.op} has no attribute {key}")
        return default

    @property
    def out(self) -> Value:
        """The only result; ValueError if there are several."""
        (value,) = self.outs
        return value


@dataclass(frozen=True)
class Graph:
    """One decode step: parameters, nodes in execution order, and the states' new values.

    results: pairs (state name, value). A state that is not among them keeps its value;
    a result whose name is no state (`logits`) is an extra output that the host may read.
    """

    name: str
    params: tuple[Param, ...]
    nodes: tuple[Node, ...]
    results: tuple[tuple[str, Value], ...]

    def producers(self) -> dict[str, Node]:
        """Value name -> the node that makes it."""
        return {out.name: node for node in self.nodes for out in node.outs}

    def uses(self) -> dict[str, list[Node]]:
        """Value name -> the nodes that read it, in order (results not included)."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in node.ins:
                found.setdefault(value.name, []).append(node)
        return found

    def param(self, name: str) -> Param:
        for param in self.params:
            if param.name == name:
                return param
        raise KeyError(f"graph {self.name} has no parameter %{name}")


def layer_of(node: Node) -> int | None:
    """The layer that a node's first result belongs to (`L3.q`: 3), or None outside of layers."""
    found = re.match(r"L(\d+)\.", node.outs[0].name)
    return int(found[1]) if found else None
