"""Buffers are shared by values whose lives do not meet: what a kernel reads was written by what made its input."""

from __future__ import annotations

import re

import pytest
from shipped import graph_of, tiny_graph
from test_gates import FUSIONS

from psigraph.codegen.lower import is_view, lower
from psigraph.codegen.target import TARGETS, target_for
from psigraph.ir.program import Launch, Program


def directions(program: Program, launch: Launch) -> tuple[set[str], set[str]]:
    """(buffers it reads, buffers it writes): `const` pointers of its kernel and the others."""
    found = re.search(rf"\bvoid [^{{]*?\b{launch.kernel}\(([^)]*)\) {{", program.kernel(launch.kernel).text)
    assert found, launch.kernel
    reads, writes = set(), set()
    for text, arg in zip(found[1].split(","), launch.args, strict=True):
        if "*" in text:
            (reads if text.split()[0] == "const" else writes).add(str(arg))
    return reads, writes


def overwritten(program: Program) -> list[str]:
    """Reads of a value's buffer that find another value in it, as `launch: buffer`."""
    nodes = program.graph.nodes
    makers = {out.name: node.ins[0].name if is_view(node) else node for node in nodes for out in node.outs}
    launch_of = {id(makers[name]): launch for launch in program.launches for name in launch.nodes}

    def maker(name: str) -> Launch | None:
        while isinstance(makers.get(name), str):
            name = makers[name]
        return launch_of.get(id(makers.get(name)))

    wrong = []
    last_writer: dict[str, Launch] = {}
    for launch in program.launches:
        reads, writes = directions(program, launch)
        inputs = [maker(value.name) for name in launch.nodes for value in makers[name].ins]
        known = sorted(reads & set(last_writer))
        wrong += [f"{launch.kernel}: {b}" for b in known if b in writes or last_writer[b] not in inputs]
        last_writer |= {name: launch for name in writes if name.startswith("value.")}
    assert len(last_writer) > 1, "buffers of values were looked at"
    return wrong


def values(program: Program) -> int:
    """How many values of the step have a buffer, if each had its own."""
    return sum(len(node.outs) for node in program.graph.nodes if not is_view(node))


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
