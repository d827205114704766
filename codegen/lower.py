"""Graph -> Program: an emitter for every node, a buffer for every value, a launch for each in order."""

from __future__ import annotations

from dataclasses import replace

from ..ir.errors import UnsupportedModelError
from ..ir.graph import Graph, Node, Value
from ..ir.program import Buffer, Program
from .cache_types import CACHE_TYPES
from .device import device_headers
from .digits import digit_bytes
from .emission import Factor, KernelSpec
from .emit_attention import ATTENTION_OPS, emit_attention
from .emit_product import PRODUCTS, emit_product
from .emit_sampling import SAMPLING_EMITTERS
from .emit_vector import VECTOR_EMITTERS
from .places import step_places
from .probe import probe_kernel
from .repack import repack_kernel
from .schedule import scheduled
from .target import Place, Target
from .weight_types import WEIGHT_TYPES

ALIASES = ("split_heads", "merge_heads")
ELEMENT_BYTES = {"f32": 4, "i32": 4, "f16": 2}


class _Lowering:
    """The context that emitters see (`emission.Context`), and the tables that grow."""

    def __init__(self, graph: Graph, target: Target, shapes: dict[str, dict[str, int]]) -> None:
        self.graph, self.target, self.shapes = graph, target, shapes
        self.buffers: dict[str, Buffer] = {}
        self.where: dict[str, str] = {}
        self.factors: dict[str, Factor] = {}
        self.free: dict[tuple[object, ...], list[str]] = {}
        self.state_of = {value.name: state for state, value in graph.results}
        self.states = {param.name for param in graph.params if param.kind == "state"}
        self.ctx = graph.param("log").type.shape[0]
        self.last_use = self._last_uses()
        kernels = [node for node in graph.nodes if not is_view(node)]
        self.places = step_places(kernels, PRODUCTS, ATTENTION_OPS, target)
        self.attentions = [node for node in kernels if node.op == "rope_attention"]
        for param in graph.params:
            self._place_param(param.kind, param.value)

    # --- what emitters ask for ---

    def read(self, value: Value) -> str:
        return self.where[value.name]

    def write(self, value: Value) -> str:
        state = self.state_of.get(value.name)
        if state in self.states:
            self._settle(value, self.where[state])
            return self.where[state]
        quantized = value.type.dtype == "i8x2"
        layout = "i8x2" if quantized else "plain"
        size = value.type.size
        nbytes = digit_bytes(size) if quantized else size * ELEMENT_BYTES[value.type.dtype]
        name = self._allocate(value.name, value.type.dtype, value.type.shape, layout, nbytes, zeroed=quantized)
        self._settle(value, name)
        return name

    def write_factor(self, value: Value, parts: int, size: int, eps: float) -> str:
        name = self._allocate(value.name, "f32", (parts,), "square_sums", parts * 4, zeroed=False)
        self._settle(value, name)
        self.factors[value.name] = Factor(name, parts, size, eps)
        return name

    def factor(self, value: Value) -> Factor:
        return self.factors[value.name]

    def in_place(self, result: Value, state: Value) -> str:
        self._settle(result, self.where[state.name])
        return self.where[state.name]

    def place(self, node: Node) -> Place:
        return self.places.of[node.outs[0].name]

    def place_bytes(self, node: Node) -> int:
        return self.target.place_bytes(self.place(node), self.places.attention_bytes)

    @property
    def attention_stages(self) -> int:
        return self.places.attention_stages

    def attention_after(self, node: Node) -> Node:
        index = self.attentions.index(node)
        return self.attentions[(index + 1) % len(self.attentions)]

    def scratch(self, name: str, nbytes: int, zeroed: bool = False) -> str:
        full = f"scratch.{name}"
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
        self.buffers[value.name] = param_buffer(kind, value)
        self.where[value.name] = value.name

    def _last_uses(self) -> dict[str, int]:
        """Value -> index of the last node that reads it; views count for what they show."""
        root: dict[str, str] = {}
        last: dict[str, int] = {}
        for index, node in enumerate(self.graph.nodes):
            for value in node.ins:
                last[root.get(value.name, value.name)] = index
            if is_view(node):
                root[node.out.name] = root.get(node.ins[0].name, node.ins[0].name)
        for _, value in self.graph.results:
            last[root.get(value.name, value.name)] = len(self.graph.nodes)
        return last

    def _allocate(self, name: str, dtype: str, shape: tuple[int, ...], layout: str, nbytes: int, zeroed: bool) -> str:
        """A free buffer of the same kind and shape (so that padding stays zero), or a new one."""
        key = (dtype, shape, layout)
        spare = self.free.get(key)
        if spare:
            return spare.pop()
        buffer = Buffer(f"value.{len(self.buffers)}", "scratch", dtype, shape, layout, nbytes, zeroed, name)
        self.buffers[buffer.name] = buffer
        return buffer.name

    def _settle(self, value: Value, buffer: str) -> None:
        self.where[value.name] = buffer

    def release(self, index: int) -> None:
        """After node `index`: buffers whose value nobody reads any more become free."""
        for name, last in list(self.last_use.items()):
            if last == index:
                buffer = self.buffers[self.where[name]]
                if buffer.name.startswith("value."):
                    self.free.setdefault((buffer.dtype, buffer.shape, buffer.layout), []).append(buffer.name)
                del self.last_use[name]


def param_buffer(kind: str, value: Value) -> Buffer:
    """Where a parameter lies, in every Program of a model; UnsupportedModelError for a vector that is not f32."""
    dtype, shape = value.type.dtype, value.type.shape
    attrs: tuple[tuple[str, object], ...] = ()
    if kind == "weight" and len(shape) == 2:
        row = WEIGHT_TYPES[dtype]
        layout, nbytes = "tiles", row.packed_bytes(*shape)
        attrs = (("repack", f"repack_{dtype}"), ("file_bytes", row.file_bytes(*shape)))
    elif kind == "weight" and dtype != "f32":
        raise UnsupportedModelError(f"{value.name}: a vector of type {dtype}; kernels support f32 vectors")
    elif len(shape) == 3 and dtype in CACHE_TYPES:
        layout, nbytes = CACHE_TYPES[dtype].layout, CACHE_TYPES[dtype].nbytes(shape)
    else:
        layout, nbytes = "plain", value.type.size * ELEMENT_BYTES[dtype]
    return Buffer(value.name, kind, dtype, shape, layout, nbytes, kind == "state", value.name, attrs)


def is_view(node: Node) -> bool:
    """True for ops that only rename memory."""
    return node.op in ALIASES and node.out.type.dtype == "f32"


def lower(graph: Graph, target: Target, shapes: dict[str, dict[str, int]] | None = None) -> Program:
    """The Program of a graph on a target.

    shapes: launch shapes that tuning found, by product class (`product_class`); the
    built-in rule serves what is not among them. UnsupportedModelError names what no
    kernel supports.
    """
    lowering = _Lowering(graph, target, shapes or {})
    emitted: list[tuple[Node, KernelSpec]] = []
    for index, node in enumerate(graph.nodes):
        if is_view(node):
            lowering.where[node.out.name] = lowering.where[node.ins[0].name]
        else:
            emitted.append((node, _emit(node, lowering)))
        lowering.release(index)
    kernels, launches = scheduled(emitted, target.programmatic)
    repacks = sorted({str(dict(b.attrs)["repack"]) for b in lowering.buffers.values() if b.layout == "tiles"})
    kernels += (probe_kernel(),)
    kernels += tuple(repack_kernel(name.removeprefix("repack_")) for name in repacks)
    return Program(
        name=graph.name,
        graph=graph,
        headers=device_headers(),
        kernels=kernels,
        launches=launches,
        buffers=tuple(lowering.buffers.values()),
        sm_count=target.sm_count,
        programmatic=target.programmatic,
        results=tuple((state, lowering.where[value.name]) for state, value in graph.results),
        notes={"arch": target.arch, "context": lowering.ctx},
    )


def product_class(node: Node) -> str:
    """The key of tuned launch shapes: op, weight types and matrix shapes."""
    weights = [value for value in node.ins if len(value.type.shape) == 2]
    return node.op + "".join(f" {weight.type}" for weight in weights)


def _emit(node: Node, lowering: _Lowering) -> KernelSpec:
    if node.op in PRODUCTS:
        return emit_product(node, lowering, lowering.shapes.get(product_class(node)))
    if node.op in ATTENTION_OPS:
        return emit_attention(node, lowering)
    if node.op in SAMPLING_EMITTERS:
        return SAMPLING_EMITTERS[node.op](node, lowering)
    if node.op in VECTOR_EMITTERS:
        return VECTOR_EMITTERS[node.op](node, lowering)
    raise UnsupportedModelError(f"op {node.op} has no kernel")
