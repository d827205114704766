"""The tokens of a prompt are given: choices go, and with them all that depends on one. Always runs.

before:
    %adjusted, %peaks, %history2 = adjust(%logits, %tokens, %history, %sampler, %positions, %sequences)
    %tokens2 = draw(%adjusted, %peaks, %sampler, %positions)
    %log2 = record(%log, %tokens2, %positions, %sequences)
after:
    %history2 = record(%history, %tokens, %positions, %sequences)

What is left are the caches, and for a step that samples the history, which takes the tokens that go in. Tokens and
positions of the next rows come from the host.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.analysis import dependents
from ..ir.graph import Graph, Node
from ..ir.ops import OPS

CHOICES = ("argmax", "draw")
GIVEN = ("tokens", "positions")


def drop_choice(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of choices that are gone."""
    chosen: set[str] = set()
    count = 0
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op == "adjust":  # of what it does only this is asked for
            names = OPS["adjust"].operand_names(len(node.ins))
            ins = dict(zip(names, node.ins, strict=True))
            record = tuple(ins[name] for name in ("history", "tokens", "positions", "sequences"))
            nodes.append(Node((node.outs[2],), "record", record, (), node.origin))
            chosen |= {out.name for out in node.outs[:2]}
        elif node.op in CHOICES:
            chosen.add(node.out.name)
            count += 1
        else:
            nodes.append(node)
    gone = dependents(nodes, chosen)
    chosen |= {out.name for index in gone for out in nodes[index].outs}
    kept = tuple(node for index, node in enumerate(nodes) if index not in gone)
    results = tuple((name, value) for name, value in graph.results if name not in GIVEN and value.name not in chosen)
    states = {param.name for param in graph.params if param.kind == "state"}
    return replace(graph, nodes=kept, results=tuple(pair for pair in results if pair[0] in states)), count
