"""Graph over a sequence -> Program: the launches that take a chunk of a prompt in.

Weights, caches, states and tables are those of the decode step's Program, by name (`runtime.prefill` shares them);
what lies between two launches has names of its own. Launches are plain: a chunk's kernels are long enough.
"""

from __future__ import annotations

from ..ir.errors import UnsupportedModelError
from ..ir.graph import Graph, Node, Value
from ..ir.program import Buffer, Program
from .device import device_headers
from .emission import KernelSpec
from .lower import param_buffer
from .prefill_emission import Place
from .prefill_kernels import PREFILL_EMITTERS
from .prefill_product import PREFILL_PRODUCTS, emit_prefill_product
from .schedule import scheduled
from .target import Target
from .weight_types import padded_columns

CHUNK_TOKENS = 512
"""Rows of the chunk's graph: enough for the tensor cores, little enough for its activations to stay in the L2 cache."""


class _Lowering:
    """The context that emitters see (`prefill_emission.PrefillContext`), and the tables that grow."""

    def __init__(self, graph: Graph, tokens: int, library: bool) -> None:
        self.library = library
        self.tokens = tokens
        self.ctx = max((param.type.shape[1] for param in graph.params if len(param.type.shape) == 3), default=1)
        self.state_of = {value.name: state for state, value in graph.results}
        self.buffers = {param.name: param_buffer(param.kind, param.value) for param in graph.params}
        self.places = {name: Place(name, 0, buffer.shape[-1]) for name, buffer in self.buffers.items()}
        self.free: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        self.holding: dict[str, set[str]] = {}  # buffer -> values in it that somebody will read
        self.last_use = {value.name: index for index, node in enumerate(graph.nodes) for value in node.ins}
        self.last_use |= {value.name: len(graph.nodes) for _, value in graph.results}

    # --- what emitters ask for ---

    def place(self, value: Value) -> Place:
        return self.places[value.name]

    def param(self, value: Value) -> str:
        return self.buffers[value.name].name

    def write(self, *values: Value, up: int = 0) -> Place:
        halves = values[0].type.dtype == "f16"
        widths = [value.type.size // self.tokens for value in values]
        stride = padded_columns(sum(widths)) if halves else sum(widths)
        shape, layout = (self.tokens, sum(widths)), "halves" if halves else "plain"
        spare = self.free.get((layout, shape))
        if spare:
            name = spare.pop()
        else:
            name = f"prefill.{len(self.buffers)}"
            nbytes = self.tokens * stride * (2 if halves else 4)
            self.buffers[name] = Buffer(
                name, "scratch", values[0].type.dtype, shape, layout, nbytes, True, values[0].name
            )
        offset = 0
        for value, width in zip(values, widths, strict=True):
            self.places[value.name] = Place(name, offset, stride, up)
            offset += width
        self.holding[name] = {value.name for value in values if value.name in self.last_use}
        return self.places[values[0].name]

    def in_place(self, result: Value, state: Value) -> str:
        """state: the operand that the result takes over, or the result itself where only its own state is named."""
        name = self.state_of[result.name] if state is result else self.places[state.name].buffer
        self.places[result.name] = Place(name, 0, result.type.shape[-1])
        return name

    def scratch(self, name: str, nbytes: int) -> str:
        full = f"prefill.scratch.{name}"
        known = self.buffers.get(full)
        if known is None or known.nbytes < nbytes:
            self.buffers[full] = Buffer(full, "scratch", "u8", (nbytes,), "plain", nbytes, True)
        return full

    def table(self, name: str, nbytes: int, **attrs: object) -> str:
        full = f"table.{name}"
        wanted = Buffer(full, "table", "f32", (nbytes // 4,), name, nbytes, False, "", tuple(sorted(attrs.items())))
        if self.buffers.setdefault(full, wanted) != wanted:
            raise UnsupportedModelError(f"a prompt needs two tables of kind {name}")
        return full

    # --- planning ---

    def view(self, node: Node) -> None:
        """A node that only renames memory."""
        shown, out = node.ins[0], node.out
        self.places[out.name] = self.places[shown.name]
        self.holding[self.places[shown.name].buffer].add(out.name)

    def release(self, index: int) -> None:
        """After node `index`: buffers of which nobody reads anything any more become free."""
        for name, values in list(self.holding.items()):
            values -= {value for value in values if self.last_use.get(value, -1) <= index}
            if not values:
                buffer = self.buffers[name]
                self.free.setdefault((buffer.layout, buffer.shape), []).append(name)
                del self.holding[name]


def lower_prefill(graph: Graph, target: Target, library: bool = False) -> Program:
    """The Program of a prompt's graph (`passes.prefill`) on a target.

    library: products are launches named `LIBRARY_PRODUCT` on weights spread as halves, instead of own kernels.
    UnsupportedModelError names what no kernel supports: such a model takes its prompts in token by token.
    """
    # Every graph over a sequence begins with something that has a row a token.
    lowering = _Lowering(graph, graph.nodes[0].outs[0].type.shape[0], library)
    pieces: list[tuple[Node, KernelSpec]] = []
    for index, node in enumerate(graph.nodes):
        if node.op == "merge_heads" and node.out.type.dtype == node.ins[0].type.dtype == "f16":
            lowering.view(node)
        elif node.op in PREFILL_PRODUCTS:
            pieces += [(node, piece) for piece in emit_prefill_product(node, lowering)]
        elif node.op in PREFILL_EMITTERS:
            pieces.append((node, PREFILL_EMITTERS[node.op](node, lowering)))
        else:
            raise UnsupportedModelError(f"op {node.op} has no kernel over a sequence")
        lowering.release(index)
    kernels, launches = scheduled(pieces)
    return Program(
        name=f"{graph.name}_prefill",
        graph=graph,
        headers=device_headers(),
        kernels=kernels,
        launches=launches,
        buffers=tuple(lowering.buffers.values()),
        sm_count=target.sm_count,
        programmatic=False,
        results=tuple((state, lowering.places[value.name].buffer) for state, value in graph.results),
        notes={"arch": target.arch, "context": lowering.ctx, "tokens": lowering.tokens, "library": library},
    )
