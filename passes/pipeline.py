"""The passes in order: the table of contents of what psigraph does to a graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..ir.errors import UsageError
from ..ir.graph import Graph
from ..ir.regime import ALL, Regime
from ..ir.verify import verify
from .defer_norm import defer_norm
from .drop_choice import drop_choice
from .drop_unused import drop_unused
from .fuse_attention import fuse_attention
from .fuse_choice import fuse_choice
from .fuse_residual import fuse_residual
from .fuse_rope_append import fuse_rope_append
from .fuse_swiglu import fuse_swiglu
from .halve_activations import halve_activations
from .merge_qkv import merge_qkv
from .norm_in_producer import norm_in_producer
from .quantize_activations import quantize_activations
from .quantize_in_producer import quantize_in_producer

PassFunction = Callable[[Graph], tuple[Graph, int]]
Observer = Callable[[str, Graph], None]


@dataclass(frozen=True)
class Pass:
    """One step of the pipeline. regimes: for which numbers of rows it pays. reason: why it stands where it stands.
    lowering: kernels need it, so that it cannot be disabled."""

    name: str
    function: PassFunction
    regimes: frozenset[Regime]
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


STEP, SEVERAL, MANY = frozenset({Regime.STEP}), frozenset({Regime.FEW, Regime.MANY}), frozenset({Regime.MANY})
CHOOSING = frozenset({Regime.STEP, Regime.FEW})

# With one row a step is made of kernels that wait for each other: what saves one pays. With many rows a product has
# enough to do that a norm beside it costs little; what pays is what saves a trip of their activations through memory.
PIPELINE: tuple[Pass, ...] = (
    Pass("drop_choice", drop_choice, MANY, "first: a prompt's tokens are given", lowering=True),
    Pass("merge_qkv", merge_qkv, ALL, "while every product still has one weight and the spec's form"),
    Pass("fuse_swiglu", fuse_swiglu, ALL, "before the norm is deferred, so that one rule covers both forms of it"),
    Pass("defer_norm", defer_norm, STEP, "behind the passes that gather products: it must see all readers as products"),
    Pass("fuse_residual", fuse_residual, ALL, "takes the plain products that are left: o and down"),
    Pass("fuse_rope_append", fuse_rope_append, ALL, "on the single ops of the spec, which no earlier pass touches"),
    Pass("drop_unused", drop_unused, MANY, "nobody asks for the head, or the last layer's end, once it is fused", True),
    Pass("fuse_attention", fuse_attention, STEP, "continues what fuse_rope_append made"),
    Pass("fuse_choice", fuse_choice, CHOOSING, "behind defer_norm, which decides the form of the head's product"),
    Pass("norm_in_producer", norm_in_producer, STEP, "needs the residual's producers and the deferred norms"),
    Pass("quantize_activations", quantize_activations, STEP, "when it is settled what reads which vector", True),
    Pass("quantize_in_producer", quantize_in_producer, STEP, "removes the quantize nodes that a producer does itself"),
    Pass("halve_activations", halve_activations, SEVERAL, "when it is settled what reads which rows", lowering=True),
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
    graph: Graph, disable: Iterable[str] = (), observe: Observer | None = None, regime: Regime = Regime.STEP
) -> tuple[Graph, tuple[PassReport, ...]]:
    """The fused and lowered graph, and a report for every pass of the regime, in order.

    observe(name, graph) is called for "input" and after every pass, disabled ones too.
    UsageError for a name in `disable` that is none; SpecError if a graph breaks the IR's rules.
    """
    skipped = disabled_names(disable)
    verify(graph)
    if observe:
        observe("input", graph)
    reports = []
    lowered = False
    for step in (step for step in PIPELINE if regime in step.regimes):
        began = time.perf_counter()
        before, matches = len(graph.nodes), 0
        if step.name not in skipped:
            graph, matches = step.function(graph)
            lowered = lowered or step.function is quantize_activations
            verify(graph, lowered)
        seconds = time.perf_counter() - began
        reports.append(PassReport(step.name, matches, before, len(graph.nodes), seconds, step.name in skipped))
        if observe:
            observe(step.name, graph)
    return graph, tuple(reports)
