"""Changes a graph one group of nodes at a time, keeping order and names sound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..ir.graph import Graph, Node, Origin, Value
from ..ir.verify import takeovers


class Rewriter:
    """A graph under change: nodes in order, with producers and uses kept up to date."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = list(graph.nodes)
        self.returned = {value.name for _, value in graph.results}
        self.taken = {param.name for param in graph.params} | {o.name for node in graph.nodes for o in node.outs}
        self._index()

    def _index(self) -> None:
        self.producers: dict[str, Node] = {}
        self.readers: dict[str, list[Node]] = {}
        self.place: dict[int, int] = {}
        for place, node in enumerate(self.nodes):
            self.place[id(node)] = place
            for out in node.outs:
                self.producers[out.name] = node
            for value in node.ins:
                readers = self.readers.setdefault(value.name, [])
                if not readers or readers[-1] is not node:
                    readers.append(node)

    def uses(self, value: Value) -> list[Node]:
        """The nodes that read a value, each once, in order."""
        return self.readers.get(value.name, [])

    def is_returned(self, value: Value) -> bool:
        """Whether the value is a result of the graph."""
        return value.name in self.returned

    def fresh(self, name: str) -> str:
        """The name, or with a number behind it if the graph has it already."""
        candidate, number = name, 2
        while candidate in self.taken:
            candidate, number = f"{name}.{number}", number + 1
        self.taken.add(candidate)
        return candidate

    def replace(self, old: Sequence[Node], new: Sequence[Node]) -> bool:
        """Puts `new` in the place of `old`. False, and no change, if that cannot be ordered:
        something outside reads a result of `old` and feeds `old` again, or would have to move
        behind a node that takes over the memory of what it reads.

        New nodes without an origin take those of all the old nodes.
        """
        gone = {id(node) for node in old}
        first, last = min(self.place[i] for i in gone), max(self.place[i] for i in gone)
        before: list[Node] = []
        after: list[Node] = []
        tainted = {out.name for node in old for out in node.outs}
        wanted = {value.name for node in old for value in node.ins} - tainted
        overwritten = {name for node in new for name in takeovers(node)}
        for node in self.nodes[first : last + 1]:
            if id(node) in gone:
                continue
            # What reads a replaced value, or the reader of one, moves behind the new nodes.
            if any(value.name in tainted for value in node.ins):
                outs = {out.name for out in node.outs}
                if outs & wanted or any(value.name in overwritten for value in node.ins):
                    return False
                tainted |= outs
                after.append(node)
            else:
                before.append(node)
        origin = merged_origins(old)
        placed = [node if node.origin else replace(node, origin=origin) for node in new]
        self.nodes[first : last + 1] = before + placed + after
        self._index()
        return True

    def absorb(self, node: Node, value: Value) -> None:
        """Removes a node of one input and one result: what makes its input is declared to make
        `value` (the input's name, another type), and what reads its result reads that."""
        names = {node.ins[0].name, node.out.name}

        def changed(values: tuple[Value, ...]) -> tuple[Value, ...]:
            return tuple(value if old.name in names else old for old in values)

        nodes = [other for other in self.nodes if other is not node]
        concerned = {id(self.producers[node.ins[0].name]), *(id(user) for user in self.uses(node.out))}
        self.nodes = [
            replace(other, outs=changed(other.outs), ins=changed(other.ins)) if id(other) in concerned else other
            for other in nodes
        ]
        self._index()

    def finish(self) -> Graph:
        """The changed graph."""
        return replace(self.graph, nodes=tuple(self.nodes))


def merged_origins(nodes: Iterable[Node]) -> tuple[Origin, ...]:
    """All origins once, in order."""
    return tuple(sorted({origin for node in nodes for origin in node.origin}))
