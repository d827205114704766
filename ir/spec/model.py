"""A model spec, what binding it to a file gives, and its step over any number of rows as a graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import ModelFileError, SpecError, UnsupportedModelError, UsageError
from ..graph import Graph, Literal, Node, Origin, Param, TensorType, Value
from ..op import TypeMismatch
from ..ops import OPS
from ..syntax import Name, Statement, underlined
from ..types import CACHE, CACHE_DTYPES
from .expression import Number, names_in
from .parts import Held, Size, Variant, Weight, check_expected, evaluated, shown

SECTIONS = ("before", "layer", "after")
DEFAULT_CONTEXT = 4096
MOST_LAYERS = 4096
"""Whatever a spec allows: every layer is a few nodes of the graph."""


@dataclass(frozen=True)
class ModelSpec:
    """A model family, as its YAML file declares it; made by `ir.spec.loader.load_spec`.

    refused: architecture -> why it is not this one. checks: (expression, what it means, line).
    expected: key -> values that it may have. variants: key -> its words, the first for an absent key, and what each of
    them means. steps: section -> op lines.
    """

    file: str
    lines: tuple[str, ...]
    architecture: str
    refused: Mapping[str, str]
    sizes: tuple[Size, ...]
    checks: tuple[tuple[str, str, Origin], ...]
    expected: Mapping[str, tuple[int | float | str, ...]]
    variants: Mapping[str, Mapping[str, Variant]]
    weights: tuple[Weight, ...]
    states: tuple[Held, ...]
    constants: tuple[Held, ...]
    steps: Mapping[str, tuple[Statement, ...]]

    def line_error(self, line: int, message: str, at: str = "") -> SpecError:
        """A SpecError that shows a line of the file with `at` underlined (all of it if empty)."""
        text = self.lines[line - 1].strip()
        found = re.search(re.escape(at) + r"(?![A-Za-z0-9_.])", text) if at else None
        start, length = (found.start(), len(at)) if found else (0, len(text))
        return SpecError(f"{self.file}:{line}: {message}\n{underlined(text, start, length)}")

    def bind(
        self,
        metadata: Mapping[str, object],
        tensors: Mapping[str, TensorType],
        ctx: int | None,
        kv_type: str = CACHE_DTYPES[0],
        max_sequences: int = 1,
    ) -> Binding:
        """Takes sizes and tensors from a file's header.

        metadata: GGUF keys to Python values. tensors: names to types, shapes as [rows, columns].
        ctx: positions that the caches hold; None: the model's context or 4096, the smaller one.
        kv_type: element type of the caches, of `types.CACHE_DTYPES`. max_sequences: whose caches and logs there are.
        UnsupportedModelError: another architecture, an element type without kernels, a rope
        scaling or a tensor that the spec does not know. ModelFileError: a key or tensor that is
        missing or does not fit. UsageError: a ctx below 1 or above the model's context, an unknown kv_type.
        """
        check_cache_type(kv_type)
        self._check_architecture(metadata)
        chosen = self._chosen(metadata)
        for expected in (self.expected, *(variant.expected for variant in chosen)):
            check_expected(expected, metadata)
        optional = self.optional_sizes - {name for variant in chosen for name in variant.sizes}
        sizes: dict[str, Number] = {}
        by_name = {weight.name: weight for weight in self.weights}
        for size in self.sizes:
            if size.name in optional:
                continue
            table = tensors.get(by_name[size.rows].tensor) if size.rows else None
            try:
                sizes[size.name] = size.bind(metadata, sizes, table.shape[0] if table else None)
            except ModelFileError as problem:
                if size.rows and problem.field == size.rows:
                    problem = ModelFileError("the tensor is missing or has no rows", by_name[size.rows].tensor)
                raise problem from None
        for text, meaning, origin in (*self.checks, *(check for variant in chosen for check in variant.checks)):
            if not evaluated(text, sizes, origin):
                read = ", ".join(f"{name} is {sizes[name]}" for name in sorted(names_in(text)))
                raise UnsupportedModelError(f"the sizes do not fit ({read}): {meaning} ({origin})")
        sizes["max_sequences"] = max_sequences
        limit = int(sizes["context"])
        sizes["context"] = checked_context(ctx, limit)
        if sizes["layers"] > MOST_LAYERS:
            raise UnsupportedModelError(f"{sizes['layers']} layers; at most {MOST_LAYERS} are supported")
        names = self._tensor_names(tensors, int(sizes["layers"]))
        used = {}
        padded = frozenset(size.name for size in self.sizes if size.named)
        for (weight, _), name in names.items():
            if name not in tensors:
                raise ModelFileError("the tensor is missing", field=name)
            used[name] = by_name[weight].bind(name, tensors[name], sizes, padded)
        for name in tensors:
            if name not in used:
                raise UnsupportedModelError(f"{name}: the {self.architecture} step does not use this tensor")
        return Binding(sizes, int(sizes["layers"]), limit, names, used, kv_type)

    @property
    def optional_sizes(self) -> frozenset[str]:
        """Sizes that a binding has only for the variants that name them."""
        return frozenset(
            name for words in self.variants.values() for variant in words.values() for name in variant.sizes
        )

    def _chosen(self, metadata: Mapping[str, object]) -> list[Variant]:
        """The variant of every key; UnsupportedModelError for a word that is none."""
        found = []
        for key, words in self.variants.items():
            check_expected({key: tuple(words)}, metadata)
            found.append(words[str(metadata.get(key, next(iter(words))))])
        return found

    def _check_architecture(self, metadata: Mapping[str, object]) -> None:
        if "general.architecture" not in metadata:
            raise ModelFileError("the key is missing", field="general.architecture")
        name = metadata["general.architecture"]
        if name == self.architecture:
            return
        reason = self.refused.get(str(name), f"{self.file} is for {self.architecture}")
        raise UnsupportedModelError(f"general.architecture {shown(name)} is not supported: {reason}")

    def _tensor_names(self, tensors: Mapping[str, TensorType], layers: int) -> dict[tuple[str, int | None], str]:
        """(weight, layer) -> the tensor that the file has for it, substitutes included."""
        by_name = {weight.name: weight for weight in self.weights}
        found: dict[tuple[str, int | None], str] = {}
        for weight in self.weights:
            for layer in range(layers) if weight.per_layer else (None,):
                name = weight.tensor_name(layer)
                if weight.otherwise and name not in tensors:
                    name = by_name[weight.otherwise].tensor_name(layer)
                found[weight.name, layer] = name
        return found

    def graph(self, binding: Binding, outputs: Sequence[str] = (), rows: int = 1) -> Graph:
        """A step over so many rows, one node an op line and layer.

        outputs: names of values at the step's end that the host may read beside the states
        (`logits`); UsageError names one that the step does not compute.
        """
        return _Builder(self, binding, rows).build(outputs)


@dataclass(frozen=True)
class Binding:
    """A spec's sizes and tensors for one file.

    sizes: by name; `context` is the number of positions asked for. layers: how many.
    context_limit: the model's own context. tensors: name -> type of every tensor that is used, which may have fewer
    rows than the file's: padding is left out. kv_type: of the caches.
    """

    sizes: dict[str, Number]
    layers: int
    context_limit: int
    names: dict[tuple[str, int | None], str]
    tensors: dict[str, TensorType]
    kv_type: str = CACHE_DTYPES[0]


def check_cache_type(kv_type: str) -> None:
    """UsageError unless a KV cache may have this type."""
    if kv_type not in CACHE_DTYPES:
        raise UsageError(f"--kv-type {kv_type}: choose one of {', '.join(CACHE_DTYPES)}")


def checked_context(ctx: int | None, limit: int) -> int:
    """The number of positions to hold; UsageError unless it is between 1 and the model's limit."""
    if ctx is None:
        return min(limit, DEFAULT_CONTEXT)
    if not 1 <= ctx <= limit:
        raise UsageError(f"a context of {ctx} tokens is not possible: the model allows 1 to {limit}")
    return ctx


@dataclass
class _Builder:
    """Unrolls the op lines over the layers and gives every value a name of its own.

    A value is called `x` outside of the layers, `L3.x` in layer 3; when a name is assigned
    again the next values are called `L3.x.2`, `L3.x.3`. A state counts as its first value.
    """

    spec: ModelSpec
    binding: Binding
    rows: int
    nodes: list[Node] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    known: dict[str, Value] = field(default_factory=dict)
    results: dict[str, Value] = field(default_factory=dict)

    def build(self, outputs: Sequence[str]) -> Graph:
        params = self._params()
        by_name = {param.name: param.value for param in params}
        for held in (*self.spec.states, *self.spec.constants):
            if not held.per_layer:
                self.known[held.stem] = by_name[held.name]
                self.versions[held.stem] = 1
        self._enter_weights(by_name, None)
        self._run("before", "")
        for layer in range(self.binding.layers):
            self._enter_weights(by_name, layer)
            held_here = [held for held in (*self.spec.states, *self.spec.constants) if held.per_layer]
            for held in held_here:
                self.known[held.stem] = by_name[held.param_name(layer)]
            self._run("layer", f"L{layer}.")
            for held in held_here:
                self._keep(held.param_name(layer), by_name[held.param_name(layer)], self.known[held.stem])
        self._run("after", "")
        for held in self.spec.states:
            if not held.per_layer:
                self._keep(held.name, by_name[held.name], self.known[held.stem])
        for name in outputs:
            if name in self.results or name in by_name or name not in self.known:
                raise UsageError(f"the step of {self.spec.architecture} computes no output {name}")
            self.results[name] = self.known[name]
        ordered = [param.name for param in params if param.name in self.results] + list(outputs)
        results = tuple((name, self.results[name]) for name in ordered)
        return Graph(self.spec.architecture, params, tuple(self.nodes), results)

    def _keep(self, name: str, before: Value, after: Value) -> None:
        if after is not before:
            self.results[name] = after

    def _params(self) -> tuple[Param, ...]:
        weights = [Param("weight", Value(name, type_)) for name, type_ in self.binding.tensors.items()]
        held = [("state", held) for held in self.spec.states] + [("constant", held) for held in self.spec.constants]
        rest = []
        for kind, item in held:
            dtype = self.binding.kv_type if item.dtype == CACHE else item.dtype
            type_ = TensorType(dtype, item.shape.bind({**self.binding.sizes, "rows": self.rows}))
            each: Sequence[int | None] = range(self.binding.layers) if item.per_layer else (None,)
            rest += [Param(kind, Value(item.param_name(layer), type_)) for layer in each]
        return (*weights, *rest)

    def _enter_weights(self, by_name: Mapping[str, Value], layer: int | None) -> None:
        for weight in self.spec.weights:
            if weight.per_layer == (layer is not None):
                self.known[weight.name] = by_name[self.binding.names[weight.name, layer]]

    def _run(self, section: str, prefix: str) -> None:
        for statement in self.spec.steps[section]:
            node = self._node(statement, prefix)
            self.nodes.append(node)
            for (name, _), value in zip(statement.outs, node.outs, strict=True):
                self.known[name] = value

    def _node(self, statement: Statement, prefix: str) -> Node:
        ins = tuple(self.known[name] for name in statement.ins)
        absent = self.spec.optional_sizes - self.binding.sizes.keys()
        attrs = {
            key: self._literal(value)
            for key, value in statement.attrs
            if not (isinstance(value, Name) and value.name in absent)
        }
        try:
            types = OPS[statement.op].infer([value.type for value in ins], attrs)
        except TypeMismatch as problem:
            at = "" if problem.operand is None else f"%{statement.ins[problem.operand]}"
            raise self.spec.line_error(statement.line, f"{statement.op}: {problem}", at) from None
        outs = tuple(self._fresh(prefix + name, type_) for (name, _), type_ in zip(statement.outs, types, strict=True))
        origin = (Origin(self.spec.file, statement.line),)
        return Node(outs, statement.op, ins, tuple(attrs.items()), origin)

    def _literal(self, value: Literal | Name) -> Literal:
        return self.binding.sizes[value.name] if isinstance(value, Name) else value

    def _fresh(self, name: str, type_: TensorType) -> Value:
        count = self.versions.get(name, 0) + 1
        self.versions[name] = count
        return Value(name if count == 1 else f"{name}.{count}", type_)
