"""Rules: a fusion written as the program before and after.

`%name` stands for any value, `$name` for any value of an attribute; an attribute that is
not named must be absent. A match is a set of nodes that are wired as `before` says, where

- values of `before` that `after` makes too keep their names, types and readers;
- what `before` reads and does not make comes from outside of the match;
- values that `after` does not make have no reader outside of the match and are no result;
- the graph can be ordered after the change.

`where`, if there is one, gets the values by name and decides in the end. `carried` are attributes that may be there
or not: a match has them at all nodes whose op knows them, with one value, or at none, and so has what takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from ..ir.graph import Literal, Node, Value
from ..ir.ops import OPS
from ..ir.syntax import Name, Reader, Statement
from .rewriter import Rewriter, merged_origins

Condition = Callable[[Mapping[str, Value]], bool]


@dataclass
class Match:
    """What the names of a rule stand for in one place of a graph."""

    values: dict[str, Value] = field(default_factory=dict)
    captures: dict[str, Literal] = field(default_factory=dict)
    carried: dict[str, Literal | None] = field(default_factory=dict)  # None: seen to be absent
    nodes: dict[int, Node] = field(default_factory=dict)

    def copy(self) -> Match:
        return Match(dict(self.values), dict(self.captures), dict(self.carried), dict(self.nodes))


class Rule:
    """before, after: op lines; where: a condition on the matched values; carried: attributes. See the module's text."""

    def __init__(self, before: str, after: str, where: Condition | None = None, carried: Collection[str] = ()) -> None:
        self.before = Reader(before, "before").statements()
        self.after = Reader(after, "after").statements()
        self.where = where
        self.carried = carried
        made = {name for statement in self.after for name, _ in statement.outs}
        inner = {name for statement in self.before for name, _ in statement.outs}
        self.vanishing = inner - made
        read = {name for statement in self.before for name in statement.ins}
        self.given = read - inner
        for statement in self.after:
            unknown = [name for name in statement.ins if name not in read | inner | made]
            assert not unknown, f"the rule's after reads %{unknown[0]}, which before does not have"
        for statement in (*self.before, *self.after):
            op = OPS.get(statement.op)
            assert op, f"the rule names the op {statement.op}, for which ir/ops has no row"
            strange = [key for key, _ in statement.attrs if key not in {*op.attributes, *op.optional}]
            assert not strange, f"the rule gives {op.name} the attribute {strange[0]}, which its row in ir/ops has not"
        for key in carried:
            for name, statements in (("before", self.before), ("after", self.after)):
                has = any(key in OPS[statement.op].optional for statement in statements)
                assert has, f"the rule carries {key}, which is optional for no op of {name}: it would be lost"

    def apply(self, rewriter: Rewriter) -> int:
        """Rewrites every match, in order of its last line's node; returns how many there were."""
        count = 0
        anchor = self.before[-1].op
        for node in [node for node in rewriter.nodes if node.op == anchor]:
            if id(node) not in rewriter.place:
                continue
            for match in self._matches(rewriter, node):
                old = list(match.nodes.values())
                if self._allowed(rewriter, match) and rewriter.replace(old, self._replacement(rewriter, match)):
                    count += 1
                    break
        return count

    def _matches(self, rewriter: Rewriter, node: Node) -> Iterator[Match]:
        """Matches whose last line is this node."""
        match = Match()
        last = len(self.before) - 1
        if self._unify(self.before[last], node, match):
            match.nodes[last] = node
            yield from self._extend(rewriter, match)

    def _extend(self, rewriter: Rewriter, match: Match) -> Iterator[Match]:
        if len(match.nodes) == len(self.before):
            yield match
            return
        index, candidates = self._next(rewriter, match)
        for node in candidates:
            if any(node is other for other in match.nodes.values()):
                continue
            trial = match.copy()
            if self._unify(self.before[index], node, trial):
                trial.nodes[index] = node
                yield from self._extend(rewriter, trial)

    def _next(self, rewriter: Rewriter, match: Match) -> tuple[int, list[Node]]:
        """The open line with the fewest candidates: a known result has one producer."""
        best: tuple[int, list[Node]] = (-1, rewriter.nodes)
        for index, statement in enumerate(self.before):
            if index in match.nodes:
                continue
            produced = [match.values[name] for name, _ in statement.outs if name in match.values]
            read = [match.values[name] for name in statement.ins if name in match.values]
            if produced:
                producer = rewriter.producers.get(produced[0].name)
                return index, [producer] if producer else []
            for value in read:
                users = rewriter.uses(value)
                if best[0] < 0 or len(users) < len(best[1]):
                    best = (index, users)
        assert best[0] >= 0, "the lines of a rule hang together"
        return best

    def _allowed(self, rewriter: Rewriter, match: Match) -> bool:
        inside = {id(node) for node in match.nodes.values()}
        made = {out.name for node in match.nodes.values() for out in node.outs}
        if any(match.values[name].name in made for name in self.given):
            return False
        for name in self.vanishing:
            value = match.values[name]
            if rewriter.is_returned(value) or any(id(user) not in inside for user in rewriter.uses(value)):
                return False
        return self.where is None or self.where(match.values)

    def _replacement(self, rewriter: Rewriter, match: Match) -> list[Node]:
        values = dict(match.values)
        origin = merged_origins(match.nodes.values())
        nodes: list[Node] = []
        for statement in self.after:
            ins = tuple(values[name] for name in statement.ins)
            attrs = {key: _literal(value, match) for key, value in statement.attrs}
            carried = {key: match.carried.get(key) for key in self._carried_by(statement.op)}
            attrs |= {key: value for key, value in carried.items() if value is not None}
            types = OPS[statement.op].infer([value.type for value in ins], attrs)
            for (name, _), type_ in zip(statement.outs, types, strict=True):
                if name not in values:
                    values[name] = Value(rewriter.fresh(f"{nodes[0].outs[0].name if nodes else name}.{name}"), type_)
            outs = tuple(values[name] for name, _ in statement.outs)
            nodes.append(Node(outs, statement.op, ins, tuple(attrs.items()), origin))
        return nodes

    def _unify(self, statement: Statement, node: Node, match: Match) -> bool:
        """Extends the match by one line and node; False (and a match of no use) if they differ."""
        if node.op != statement.op or len(node.ins) != len(statement.ins) or len(node.outs) != len(statement.outs):
            return False
        named = [name for name, _ in statement.outs] + list(statement.ins)
        for name, value in zip(named, (*node.outs, *node.ins), strict=True):
            if match.values.setdefault(name, value).name != value.name:
                return False
        attrs = node.attributes
        for key in self._carried_by(node.op):
            carried = attrs.pop(key, None)
            if match.carried.setdefault(key, carried) != carried:
                return False
        if set(attrs) != {key for key, _ in statement.attrs}:
            return False
        for key, wanted in statement.attrs:
            known = match.captures.setdefault(wanted.name, attrs[key]) if isinstance(wanted, Name) else wanted
            if known != attrs[key] or type(known) is not type(attrs[key]):
                return False
        return True

    def _carried_by(self, op: str) -> list[str]:
        return [key for key in self.carried if key in OPS[op].optional]


def _literal(value: Literal | Name, match: Match) -> Literal:
    return match.captures[value.name] if isinstance(value, Name) else value


def apply_rules(rewriter: Rewriter, *rules: Rule) -> int:
    """Every rule in turn; returns the number of matches of all of them."""
    return sum(rule.apply(rewriter) for rule in rules)
