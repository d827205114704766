"""Buffers are shared by values whose lives do not meet: what a kernel reads was written by what made its input."""

from __future__ import annotations

import re

import pytest
from shipped import FUSIONS, graph_of, prefill_of, tiny_graph
from signature import read, written

from psigraph.codegen.lower import is_view, lower
from psigraph.codegen.target import TARGETS, target_for
from psigraph.ir.graph import Node, Value
from psigraph.ir.program import DECODE, PREFILL, Launch, LibraryProduct, Program
from psigraph.ir.regime import Regime

OF_A_VALUE = re.compile(r"(value|prefill)\.\d+")


def directions(program: Program, launch: Launch | LibraryProduct) -> tuple[set[str], set[str]]:
    """(buffers it reads, buffers it writes)."""
    if isinstance(launch, LibraryProduct):
        return {launch.w, launch.x} | ({launch.c} if launch.add else set()), {launch.y}
    kernel = program.kernel(launch.kernel)
    return {str(launch.args[i]) for i in read(kernel)}, {str(launch.args[i]) for i in written(kernel)}


def overwritten(program: Program, name: str = DECODE) -> list[str]:
    """Reads of a value's buffer that find another value in it, as `op: buffer`."""
    step = program.step(name)
    makers = {out.name: node for node in step.graph.nodes for out in node.outs}

    def maker(value: Value) -> Node | None:
        node = makers.get(value.name)
        return maker(node.ins[0]) if node and is_view(node) else node

    wrong = []
    last_writer: dict[str, Node] = {}
    for launch in step.launches:
        node = makers[launch.nodes[0]]
        reads, writes = directions(program, launch)
        inputs = [maker(value) for value in node.ins]
        known = sorted(reads & set(last_writer))
        wrong += [f"{node.op}: {b}" for b in known if b in writes or last_writer[b] not in inputs]
        last_writer |= {buffer: node for buffer in writes if OF_A_VALUE.fullmatch(buffer)}
    assert len(last_writer) > 1, "buffers of values were looked at"
    return wrong


def values(program: Program) -> int:
    """How many values of the step have a buffer, if each had its own."""
    return sum(len(node.outs) for node in program.step().graph.nodes if not is_view(node))


@pytest.mark.parametrize(
    "disable", [(), *[(name,) for name in FUSIONS], FUSIONS], ids=lambda names: "+".join(names)[:40]
)
@pytest.mark.parametrize("quant", ["q4_k_m", "q8_0"])
def test_no_value_is_overwritten_while_somebody_reads_it(quant, disable):
    program = lower(tiny_graph(quant, disable), target_for("host", 4))
    assert overwritten(program) == []


def test_a_published_model_shares_its_buffers():
    program = lower(graph_of("1.7b", "q4_k_m"), TARGETS["sm_90a"])
    assert overwritten(program) == []
    buffers = [buffer for buffer in program.buffers if buffer.name.startswith("value.")]
    assert len(buffers) < values(program) / 10


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("disable", [(), FUSIONS], ids=["fused", "unfused"])
def test_no_value_of_a_prompt_is_overwritten_while_somebody_reads_it(disable, library):
    graph = prefill_of("0.6b", "q4_k_m", 3, disable=disable)
    program = lower(graph, TARGETS["sm_90a"], regime=Regime.MANY, name=PREFILL, library=library)
    assert overwritten(program, PREFILL) == []
