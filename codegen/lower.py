"""Graph -> Program: an emitter for every node, a buffer for every value, a launch for each in order.

One lowering serves every number of rows: which kernels there are for a regime is said by the emitters
(`emitters.EMITTERS`), and where rows lie by `emission.RowView`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..ir.analysis import last_uses
from ..ir.errors import UnsupportedModelError
from ..ir.graph import Graph, Node, Value
from ..ir.program import DECODE, Buffer, Kernel, LibraryProduct, Program, Step
from ..ir.regime import Regime
from .activation_block import activation_bytes
from .cache_types import CACHE_TYPES
from .device import device_headers
from .emission import Factor, KernelSpec, ReadNode, RowView
from .emitters import EMITTERS
from .half_range import half_range_buffer, half_range_kernel, halved_weights
from .occupancy import step_slots
from .probe import probe_kernel
from .repack import repack_kernel
from .schedule import scheduled
from .target import Slot, Target
from .weight_types import WEIGHT_TYPES, padded_columns

VIEWS = ("split_heads", "merge_heads")
ELEMENT_BYTES = {"f32": 4, "i32": 4, "f16": 2}
ROW_INPUTS = ("tokens", "positions", "sequences")  # of the decode step states that it moves on itself

PREFILL_ROWS = 512
"""Rows of a prompt's chunk: enough for the tensor cores, little enough for its activations to stay in the L2 cache."""


class _Lowering:
    """The context that emitters see (`emission.Context`), and the tables that grow."""

    def __init__(
        self,
        graph: Graph,
        target: Target,
        shapes: Mapping[str, dict[str, int]],
        regime: Regime,
        name: str,
        library: bool,
        known: tuple[Buffer, ...],
    ) -> None:
        self.graph, self.target, self.shapes = graph, target, shapes
        self.regime, self.name, self.library = regime, name, library
        self.rows = graph.param("positions").type.shape[0]
        self.buffers = {buffer.name: buffer for buffer in known}
        self.views: dict[str, RowView] = {}
        self.factors: dict[str, Factor] = {}
        self.free: dict[tuple[object, ...], list[str]] = {}
        self.holding: dict[str, set[str]] = {}  # buffer -> values in it that somebody will read
        self.state_of = {value.name: state for state, value in graph.results}
        self.states = {param.name for param in graph.params if param.kind == "state"}
        self.ctx = max((param.type.shape[2] for param in graph.params if len(param.type.shape) == 4), default=1)
        self.last_use = last_uses(graph, is_view)
        kernels = [node for node in graph.nodes if not is_view(node)]
        self.slots = step_slots(kernels, target)
        self.sampled = [node.outs[0].name for node in kernels if node.op.endswith("swiglu")]
        self.attentions = [node for node in kernels if node.op == "rope_attention"]
        for param in graph.params:
            self._place_param(param.kind, param.value)

    # --- what emitters ask for ---

    def read(self, value: Value) -> str:
        return self.views[value.name].buffer

    def view(self, value: Value) -> RowView:
        return self.views[value.name]

    def write(self, value: Value) -> str:
        state = self.state_of.get(value.name)
        if state in self.states:
            self.views[value.name] = self.views[str(state)]
            return self.read(value)
        return self.write_rows(value).buffer

    def write_rows(self, *values: Value, up: int = 0) -> RowView:
        dtype = values[0].type.dtype
        widths = [value.type.size // self.rows for value in values]
        width = sum(widths)
        layout = {"i8x2": "i8x2", "f16": "halves"}.get(dtype, "plain")
        stride = padded_columns(width) if layout == "halves" else width
        nbytes = activation_bytes(width) if layout == "i8x2" else self.rows * stride * ELEMENT_BYTES[dtype]
        shape = values[0].type.shape if len(values) == 1 else (self.rows, width)
        name = self._allocate(values[0].name, dtype, shape, layout, nbytes, zeroed=layout != "plain")
        offset = 0
        for value, own in zip(values, widths, strict=True):
            self.views[value.name] = RowView(name, offset, stride, up)
            offset += own
        self.holding[name] = {value.name for value in values if value.name in self.last_use}
        return self.views[values[0].name]

    def write_factor(self, value: Value, parts: int, size: int, eps: float) -> str:
        name = self._allocate(value.name, "f32", (parts,), "square_sums", parts * 4, zeroed=False)
        self.views[value.name] = RowView(name, 0, parts)
        self.holding[name] = {value.name}
        self.factors[value.name] = Factor(name, parts, size, eps)
        return name

    def factor(self, value: Value) -> Factor:
        return self.factors[value.name]

    def in_place(self, result: Value, state: Value) -> str:
        self.views[result.name] = self.views[state.name]
        return self.read(result)

    @property
    def count(self) -> str:
        return self._numbers("count", 1)

    @property
    def beyond(self) -> str:
        return self._numbers("beyond", 1 + len(self.sampled))

    def sampled_slot(self, node: Node) -> int:
        return 1 + self.sampled.index(node.outs[0].name)

    def _numbers(self, name: str, size: int) -> str:
        """Integers of the step that the host sets."""
        full = f"{self.name}.{name}"
        return self.buffers.setdefault(full, Buffer(full, "input", "i32", (size,), "plain", 4 * size, True)).name

    def slot(self, node: Node) -> Slot:
        return self.slots.of[node.outs[0].name]

    def slot_bytes(self, node: Node) -> int:
        return self.target.slot_bytes(self.slot(node), self.slots.attention_bytes)

    @property
    def attention_stages(self) -> int:
        return self.slots.attention_stages

    def attention_after(self, node: Node) -> Node:
        index = next(i for i, other in enumerate(self.attentions) if other.outs == node.outs)
        return self.attentions[(index + 1) % len(self.attentions)]

    def scratch(self, name: str, nbytes: int, zeroed: bool = False) -> str:
        full = f"{'' if self.name == DECODE else self.name + '.'}scratch.{name}"
        known = self.buffers.get(full)
        if known is None or known.nbytes < nbytes:
            self.buffers[full] = Buffer(full, "scratch", "u8", (nbytes,), "plain", nbytes, zeroed)
        return full

    def table(self, name: str, nbytes: int, **attrs: object) -> str:
        full = f"table.{name}"
        wanted = Buffer(full, "table", "f32", (nbytes // 4,), name, nbytes, False, "", tuple(sorted(attrs.items())))
        for number in range(len(self.buffers) + 1):
            candidate = replace(wanted, name=full if number == 0 else f"{full}.{number}")
            if self.buffers.setdefault(candidate.name, candidate) == candidate:
                return candidate.name
        raise AssertionError("unreachable: one more name than buffers")

    # --- planning ---

    def _place_param(self, kind: str, value: Value) -> None:
        buffer = param_buffer(kind, value)
        if value.name in ROW_INPUTS and self.name != DECODE:
            buffer = replace(buffer, name=f"{self.name}.{value.name}", kind="input", source="")
        if self.buffers.setdefault(buffer.name, buffer) != buffer:
            raise UnsupportedModelError(f"the steps of {self.graph.name} keep {buffer.name} differently")
        self.views[value.name] = RowView(buffer.name, 0, math.prod(buffer.shape[1:]))

    def _allocate(self, name: str, dtype: str, shape: tuple[int, ...], layout: str, nbytes: int, zeroed: bool) -> str:
        """A free buffer of the same kind and shape (so that padding stays zero), or a new one."""
        spare = self.free.get((dtype, shape, layout))
        if spare:
            return spare.pop()
        prefix = "value" if self.name == DECODE else self.name
        buffer = Buffer(f"{prefix}.{len(self.buffers)}", "scratch", dtype, shape, layout, nbytes, zeroed, name)
        self.buffers[buffer.name] = buffer
        return buffer.name

    def show(self, node: Node) -> None:
        """A node that only renames memory."""
        self.views[node.out.name] = self.views[node.ins[0].name]

    def release(self, index: int) -> None:
        """After node `index`: buffers of which nobody reads anything any more become free."""
        for name, values in list(self.holding.items()):
            values -= {value for value in values if self.last_use.get(value, -1) <= index}
            if not values:
                buffer = self.buffers[name]
                self.free.setdefault((buffer.dtype, buffer.shape, buffer.layout), []).append(name)
                del self.holding[name]


def param_buffer(kind: str, value: Value) -> Buffer:
    """Where a parameter lies; UnsupportedModelError for a vector that is not f32."""
    dtype, shape = value.type.dtype, value.type.shape
    attrs: tuple[tuple[str, object], ...] = ()
    if kind == "weight" and len(shape) == 2:
        row = WEIGHT_TYPES[dtype]
        layout, nbytes = "tiles", row.packed_bytes(*shape)
        attrs = (("repack", f"repack_{dtype}"), ("file_bytes", row.file_bytes(*shape)))
    elif kind == "weight" and dtype != "f32":
        raise UnsupportedModelError(f"{value.name}: a vector of type {dtype}; kernels support f32 vectors")
    elif len(shape) == 4 and dtype in CACHE_TYPES:
        if shape[0] != 1:
            raise UnsupportedModelError(f"{value.name}: caches of {shape[0]} sequences; kernels know one")
        layout, nbytes = CACHE_TYPES[dtype].layout, CACHE_TYPES[dtype].nbytes(shape)
    else:
        layout, nbytes = "plain", value.type.size * ELEMENT_BYTES[dtype]
    return Buffer(value.name, kind, dtype, shape, layout, nbytes, kind == "state", value.name, attrs)


def is_view(node: Node) -> bool:
    """True for ops that only rename memory."""
    return node.op in VIEWS and node.out.type.dtype == node.ins[0].type.dtype


def lower(
    graph: Graph,
    target: Target,
    shapes: Mapping[str, dict[str, int]] | None = None,
    *,
    regime: Regime = Regime.STEP,
    name: str = DECODE,
    library: bool = False,
    beside: Program | None = None,
) -> Program:
    """The Program of a graph on a target.

    shapes: launch shapes that tuning found, by `emit.product.product_class`; the built-in rule serves what is not among
    them. regime: for how many rows; name: of the step. library: products of many rows are `LibraryProduct`s.
    beside: a Program whose weights, caches, states and tables the step shares; the result has its steps too.
    UnsupportedModelError names what no kernel supports.
    """
    lowering = _Lowering(graph, target, shapes or {}, regime, name, library, beside.buffers if beside else ())
    pieces: list[tuple[Node, KernelSpec | LibraryProduct]] = []
    for index, node in enumerate(graph.nodes):
        if is_view(node):
            lowering.show(node)
        else:
            pieces += [(node, piece) for piece in _emit(node, lowering)]
        lowering.release(index)
    prefix = "" if name == DECODE else f"{name}_"
    kernels, launches = scheduled(pieces, prefix, target.programmatic and regime is Regime.STEP)
    repacks = sorted({str(dict(b.attrs)["repack"]) for b in lowering.buffers.values() if b.layout == "tiles"})
    halved = halved_weights(graph) if regime is Regime.MANY else ()
    if halved:
        counts = half_range_buffer(name, len(halved))
        lowering.buffers[counts.name] = counts
    kernels += tuple(half_range_kernel(dtype) for dtype in sorted({lowering.buffers[one].dtype for one in halved}))
    kernels += (probe_kernel(), *(repack_kernel(repack.removeprefix("repack_")) for repack in repacks))
    results = tuple((state, lowering.read(value)) for state, value in graph.results)
    step = Step(name, graph, regime, lowering.rows, launches, results)
    return Program(
        name=graph.name,
        headers=device_headers(),
        kernels=_together(beside.kernels if beside else (), kernels),
        steps=(*(beside.steps if beside else ()), step),
        buffers=tuple(lowering.buffers.values()),
        sm_count=target.sm_count,
        programmatic=target.programmatic,
        notes={"arch": target.arch, "context": lowering.ctx, **({"halved": halved} if halved else {})},
    )


def _together(old: tuple[Kernel, ...], new: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """All of them once; a kernel of both has one text."""
    known = {kernel.name: kernel for kernel in old}
    for kernel in new:
        assert known.setdefault(kernel.name, kernel) == kernel, kernel.name
    return tuple(known.values())


def _emit(node: Node, lowering: _Lowering) -> list[KernelSpec | LibraryProduct]:
    emitter = EMITTERS.get((node.op, lowering.regime))
    if emitter is None:
        raise UnsupportedModelError(f"op {node.op} has no kernel for {lowering.regime}")
    asked = ReadNode(node)
    emitted = emitter(asked, lowering)
    if unread := asked.unread():
        raise UnsupportedModelError(
            f"op {node.op}: its kernel for {lowering.regime} does not know the attribute {unread[0]}"
        )
    return [emitted] if isinstance(emitted, KernelSpec) else list(emitted)
