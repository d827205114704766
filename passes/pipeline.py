"""The passes in order: the table of contents of what psigraph does to a graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..ir.errors import UsageError
from ..ir.graph import Graph
from ..ir.verify import verify
from .defer_norm import defer_norm
from .fuse_attention import fuse_attention
from .fuse_choice import fuse_choice
from .fuse_residual import fuse_residual
from .fuse_rope_append import fuse_rope_append
from .fuse_swiglu import fuse_swiglu
from .merge_qkv import merge_qkv
from .norm_in_producer import norm_in_producer
from .quantize_activations import quantize_activations
from .quantize_in_producer import quantize_in_producer

PassFunction = Callable[[Graph], tuple[Graph, int]]
Observer = Callable[[str, Graph], None]


@dataclass(frozen=True)
class Pass:
    """One step of the pipeline. reason: why it stands where it stands. lowering: kernels need
    it, so that it cannot be disabled."""

    name: str
    function: PassFunction
    reason: str
    lowering: bool = False


@dataclass(frozen=True)
class PassReport:
    """What one pass did: matches, nodes before and after, seconds (its verification included)."""

    name: str
    matches: int
    nodes_before: int
    nodes_after: int
    seconds: float
    disabled: bool


PIPELINE: tuple[Pass, ...] = (
    Pass("merge_qkv", merge_qkv, "first, while every product still has one weight and the spec's form"),
    Pass("fuse_swiglu", fuse_swiglu, "before the norm is deferred, so that one rule covers both forms of it"),
    Pass("defer_norm", defer_norm, "behind the passes that gather products: it must see all readers as products"),
    Pass("fuse_residual", fuse_residual, "takes the plain products that are left: o and down"),
    Pass("fuse_rope_append", fuse_rope_append, "on the single ops of the spec, which no earlier pass touches"),
    Pass("fuse_attention", fuse_attention, "continues what fuse_rope_append made"),
    Pass("fuse_choice", fuse_choice, "behind defer_norm, which decides the form of the head's product"),
    Pass("norm_in_producer", norm_in_producer, "needs the residual's producers and the deferred norms"),
    Pass("quantize_activations", quantize_activations, "when it is settled what reads which vector", lowering=True),
    Pass("quantize_in_producer", quantize_in_producer, "removes the quantize nodes that a producer can do itself"),
)


def disabled_names(disable: Iterable[str]) -> frozenset[str]:
    """The names as a set; UsageError if one is no pass or a lowering."""
    wanted = frozenset(disable)
    optional = [step.name for step in PIPELINE if not step.lowering]
    for name in sorted(wanted):
        if name not in optional:
            required = any(step.name == name for step in PIPELINE)
            problem = "is a lowering that kernels need" if required else "does not exist"
            raise UsageError(f"the pass {name} {problem}; these can be disabled: {', '.join(optional)}")
    return wanted


def run_pipeline(
    graph: Graph, disable: Iterable[str] = (), observe: Observer | None = None
) -> tuple[Graph, tuple[PassReport, ...]]:
    """The fused and lowered graph, and a report for every pass, in order.

    observe(name, graph) is called for "input" and after every pass, disabled ones too.
    UsageError for a name in `disable` that is none; SpecError if a graph breaks the IR's rules.
    """
    skipped = disabled_names(disable)
    verify(graph)
    if observe:
        observe("input", graph)
    reports = []
    lowered = False
    for step in PIPELINE:
        began = time.perf_counter()
        before, matches = len(graph.nodes), 0
        if step.name not in skipped:
            graph, matches = step.function(graph)
            lowered = lowered or step.lowering
            verify(graph, lowered)
        seconds = time.perf_counter() - began
        reports.append(PassReport(step.name, matches, before, len(graph.nodes), seconds, step.name in skipped))
        if observe:
            observe(step.name, graph)
    return graph, tuple(reports)
