"""Changes a graph one group of nodes at a time, keeping order and names sound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..ir.analysis import dependents
from ..ir.graph import Graph, Node, Origin, Value
from ..ir.verify import takeovers


class Rewriter:
    """A graph under change: nodes in order, with producers and uses kept up to date."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = list(graph.nodes)
        self.returned = {value.name for _, value in graph.results}
        self.taken = {param.name for param in graph.params} | {o.name for node in graph.nodes for o in node.outs}
        self.producers: dict[str, Node] = {}
        self.readers: dict[str, list[Node]] = {}
        self.place: dict[int, int] = {}
        self._number(0)
        for node in self.nodes:
            self._learn(node)

    def _number(self, first: int) -> None:
        """Gives the nodes from `first` on their places."""
        last = len(self.nodes)
        self.place.update(zip(map(id, self.nodes[first:]), range(first, last), strict=True))

    def _learn(self, node: Node) -> None:
        for out in node.outs:
            self.producers[out.name] = node
        for name in {value.name for value in node.ins}:
            self.readers.setdefault(name, []).append(node)

    def _forget(self, node: Node) -> None:
        del self.place[id(node)]
        for out in node.outs:
            if self.producers.get(out.name) is node:
                del self.producers[out.name]
        for name in {value.name for value in node.ins}:
            self.readers[name] = [reader for reader in self.readers[name] if reader is not node]

    def _put(self, first: int, last: int, nodes: Sequence[Node]) -> None:
        """Puts `nodes` in the places first..last; those that stood there before may stand there again."""
        old = self.nodes[first : last + 1]
        staying = {id(node) for node in nodes}
        known = {id(node) for node in old}
        for node in old:
            if id(node) not in staying:
                self._forget(node)
        self.nodes[first : last + 1] = nodes
        self._number(first)
        for node in nodes:
            if id(node) not in known:
                self._learn(node)
        for name in {value.name for node in nodes for value in node.ins}:
            self.readers[name].sort(key=lambda reader: self.place[id(reader)])

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
        gone = {self.place[id(node)] for node in old}
        first, last = min(gone), max(gone)
        window = self.nodes[first : last + 1]
        inside = {index - first for index in gone}
        # What depends on a replaced value moves behind the new nodes.
        moved = dependents(window, {out.name for node in old for out in node.outs}) - inside
        behind = {out.name for index in moved for out in window[index].outs}
        if any(value.name in behind for node in old for value in node.ins):
            return False
        overwritten = {name for node in new for name in takeovers(node)}
        if any(value.name in overwritten for index in moved for value in window[index].ins):
            return False
        before = [node for index, node in enumerate(window) if index not in inside | moved]
        after = [window[index] for index in sorted(moved)]
        origin = merged_origins(old)
        placed = [node if node.origin else replace(node, origin=origin) for node in new]
        self._put(first, last, before + placed + after)
        return True

    def absorb(self, node: Node, value: Value) -> None:
        """Removes a node of one input and one result: what makes its input is declared to make
        `value` (the input's name, another type), and what reads its result reads that."""
        names = {node.ins[0].name, node.out.name}

        def changed(values: tuple[Value, ...]) -> tuple[Value, ...]:
            return tuple(value if old.name in names else old for old in values)

        concerned = [self.producers[node.ins[0].name], *self.uses(node.out)]
        for other in concerned:
            place = self.place[id(other)]
            self._put(place, place, [replace(other, outs=changed(other.outs), ins=changed(other.ins))])
        place = self.place[id(node)]
        self._put(place, place, [])

    def finish(self) -> Graph:
        """The changed graph."""
        return replace(self.graph, nodes=tuple(self.nodes))


def merged_origins(nodes: Iterable[Node]) -> tuple[Origin, ...]:
    """All origins once, in order."""
    return tuple(sorted({origin for node in nodes for origin in node.origin}))
