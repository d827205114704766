"""Launch shapes found by measuring on the GPU that is here (`psigraph tune`).

Candidates differ in how a product's columns and tiles are shared by warps and, where kernels take no
places on the multiprocessors, in the size of the ring. What counts is the whole dependent step with cold weights, not
the kernel alone: a shape that is fast by itself can keep its neighbours from being resident.
So each class of product is tried in place, one after the other, the most bytes first, and
keeps what made the step fastest by more than the spread of two runs of the same shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..codegen.emit.product import product_class
from ..codegen.lower import lower
from ..codegen.target import REGISTERS, Target, stand_in_target, target_for
from ..codegen.tiling import MAX_SLICE
from ..codegen.weight_types import superblocks
from ..ir.errors import UnsupportedModelError, UsageError
from ..ir.graph import Graph, Node
from ..ir.program import Program
from ..ir.verify import product_weights
from ..runtime.cuda.compiler import CompiledKernel, compile_program
from ..runtime.cuda.kernel_cache import KernelCache, default_cache_dir
from ..runtime.engine import Engine
from ..session import Session
from .tuned import Shapes

LIMIT_S = 60.0
STEPS = 60
LEAST_SPREAD = 0.005  # of a step: two runs of one shape may agree by luck
POSITION = 256
RING_LIMITS = (36, 56, 80, 112, 160, 200)  # KiB
Report = Callable[[str, str, float, float], None]


@dataclass(frozen=True)
class Tuned:
    """What tuning found: the shapes, and microseconds of the step before and after."""

    shapes: Shapes
    before_us: float
    after_us: float
    tried: int
    seconds: float


def candidates(node: Node, target: Target) -> Iterator[dict[str, int]]:
    """Shapes worth trying for a product: ways to share its columns and tiles over 4 to 24 warps.

    Where kernels take places on the multiprocessors the ring fills its place; elsewhere its size is tried too.
    """
    columns = superblocks(product_weights(node)[0].type.shape[1])
    limits = () if target.slots else tuple(limit for limit in RING_LIMITS if limit * 1024 < target.shared_bytes)
    for column_warps in range(1, min(columns, 24) + 1):
        if columns % column_warps or columns // column_warps > MAX_SLICE:
            continue
        for tile_warps in (1, 2, 3, 4):
            if not 4 <= column_warps * tile_warps <= 24 and columns >= 4:
                continue
            shape = {"column_warps": column_warps, "tile_warps": tile_warps}
            for limit in limits:
                yield {**shape, "ring_limit": limit * 1024}
            if not limits:
                yield shape


def target_of(session: Session) -> Target:
    """The target that a session's program was written for; UsageError where no kernels run."""
    if session.program is None:
        raise UsageError("the backend cpu runs no kernels: there is nothing to tune")
    if session.backend == "host" and session.device_facts is not None:
        return stand_in_target(session.device_facts.capability, session.program.sm_count)
    return target_for(str(session.program.notes["arch"]), session.program.sm_count)


def tune(session: Session, target: Target, limit_s: float = LIMIT_S, report: Report | None = None) -> Tuned:
    """Try candidates in an open session, at most `limit_s` seconds; its engine ends with the best.

    report(class, shape, microseconds, best so far) is called for each candidate. Shapes
    that cannot be launched are passed over.
    """
    engine, graph = session.engine, session.graph
    assert isinstance(engine, Engine)
    started = time.perf_counter()
    cache = KernelCache(default_cache_dir())

    def use(shapes: Shapes) -> bool:
        """Let the engine run these shapes; False if it does already, or nothing can."""
        try:
            program = lower(graph, target, shapes)
        except UnsupportedModelError:
            return False
        key = (tuple(kernel.text for kernel in program.kernels), tuple(x.shared_bytes for x in program.step().kernels))
        if key in seen:
            return False
        seen.add(key)
        compiled = compile_program(program, target.arch, cache)
        if not launchable(program, compiled):
            return False
        engine.adopt(program, compiled)
        return True

    steps = STEPS if session.backend == "cuda" else 4  # a step takes a hundred times longer without a GPU
    best: Shapes = {}
    seen: set[object] = set()
    use(best)
    before = _step_us(engine, steps)
    again = _step_us(engine, steps)
    fastest, spread, tried = before, max(abs(again - before), LEAST_SPREAD * before), 0
    for name, node in _classes(graph):
        for shape in candidates(node, target):
            if time.perf_counter() - started > limit_s:
                break
            if not use({**best, name: shape}):
                continue
            us = _step_us(engine, steps)
            tried += 1
            if us < fastest - spread:
                fastest, best = us, {**best, name: shape}
            if report:
                report(name, ", ".join(f"{key} {value}" for key, value in shape.items()), us, fastest)
    seen.clear()
    use({})
    before = min(before, _step_us(engine, steps))
    after = before
    if best and use(best):
        after = _step_us(engine, steps)
        if after >= before - spread:  # a lucky run, not a better shape
            best, after = {}, before
            seen.clear()
            use(best)
    return Tuned(best, before, after, tried, time.perf_counter() - started)


def launchable(program: Program, compiled: Mapping[str, CompiledKernel]) -> bool:
    """Whether a block of every kernel has registers enough: a driver that has to say so leaves the step unusable."""
    return all(
        -(-compiled[launch.kernel].resources.registers // 8) * 8 * launch.block <= REGISTERS
        for step in program.steps
        for launch in step.kernels
    )


def _classes(graph: Graph) -> list[tuple[str, Node]]:
    """Product classes of a graph, those that move the most bytes first."""
    found: dict[str, Node] = {}
    weight: dict[str, int] = {}
    for node in graph.nodes:
        if weights := product_weights(node):
            name = product_class(node)
            found.setdefault(name, node)
            weight[name] = weight.get(name, 0) + sum(value.type.size for value in weights)
    return sorted(found.items(), key=lambda item: -weight[item[0]])


def _step_us(engine: Engine, steps: int) -> float:
    """Median microseconds of `steps` steps around position POSITION, or near the end of a small context."""
    engine.reset()
    warm_up = steps // 4
    engine.feed([1] * max(1, min(POSITION if steps == STEPS else steps, engine.context - steps - warm_up)))
    engine.step_times(warm_up)
    return float(np.median(engine.step_times(steps)))
