"""Runs a graph, fused or not, in numpy: the reference that every kernel is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .errors import UsageError
from .graph import Graph, Node, TensorType
from .op import EvalContext
from .ops import OPS
from .types import CACHE_DTYPES, round_i8x2, round_q8

ARRAYS_OF_CACHES: dict[str, type[np.floating[Any]]] = {"f16": np.float16, "f32": np.float32}
ROUND_ROW = {"q8": round_q8}  # cache types whose rows are rounded to more than their array's element type


class Interpreter:
    """Computes every value of a graph in numpy.

    dtype                float64 or float32: what activations are computed in.
    cache_dtype          element type of the caches' arrays: `f16`, as on the device (a q8 cache holds halves too, those
                         that its integers and scales stand for), or `f32`: caches are not rounded, whatever their type.
    exact_activations    treat i8x2 vectors and halves as if they were not rounded: a fused graph then equals the
                         unfused one up to the order of float operations.
    in_place_cache       write cache rows into the given arrays instead of copies, so that
                         a step costs no copy of the cache. The given arrays change.
    """

    def __init__(
        self,
        dtype: type[np.floating[Any]] = np.float64,
        cache_dtype: str = "f16",
        exact_activations: bool = False,
        in_place_cache: bool = False,
    ) -> None:
        if cache_dtype not in ARRAYS_OF_CACHES:
            raise UsageError(f"cache_dtype is {cache_dtype!r}, known are {', '.join(ARRAYS_OF_CACHES)}")
        self.context = EvalContext(dtype, in_place_cache)
        self.cache_dtype = ARRAYS_OF_CACHES[cache_dtype]
        self.exact_activations = exact_activations

    def array_dtype(self, type_: TensorType) -> type[np.generic]:
        """The numpy type that states and constants of this IR type have."""
        if type_.dtype == "i32":
            return np.int32
        return self.cache_dtype if type_.dtype in CACHE_DTYPES else self.context.dtype

    def initial_state(self, graph: Graph) -> dict[str, np.ndarray]:
        """Zeros for every state, and constants that hold -1 (no end token)."""
        found = {}
        for param in graph.params:
            if param.kind != "weight":
                fill = -1 if param.kind == "constant" else 0
                found[param.name] = np.full(param.type.shape, fill, self.array_dtype(param.type))
        return found

    def run(self, graph: Graph, values: Mapping[str, np.ndarray], until: str | None = None) -> dict[str, np.ndarray]:
        """All values by name after one step, parameters included.

        values: an array for every parameter: weights already dequantized, in any float type
        (in `dtype` no product copies them); states and constants as `initial_state` makes them.
        until: name of a value; the step stops once it is computed.
        UsageError names a parameter that is missing or has another shape, or an unknown `until`.
        """
        known = self._parameters(graph, values)
        if until is not None and until not in known and all(until != o.name for n in graph.nodes for o in n.outs):
            raise UsageError(f"graph {graph.name} has no value %{until} to stop at")
        for node in graph.nodes:
            if until is not None and until in known:
                break
            self.step(node, known)
        return known

    def step(self, node: Node, known: dict[str, np.ndarray]) -> None:
        """Runs one node: adds its results to `known`."""
        ins = [known[value.name] for value in node.ins]
        op = OPS[node.op]
        outs = op.reference(self._context_of(node), ins, node.attributes)
        names = op.result_names(len(ins), node.attributes)
        for name, value, array in zip(names, node.outs, outs, strict=True):
            if value.type.dtype == "i8x2" and not self.exact_activations:
                array = round_i8x2(array)
            elif value.type.dtype == "f16" and name not in op.consumes and not self.exact_activations:
                array = array.astype(np.float16).astype(array.dtype)
            known[value.name] = array

    def _context_of(self, node: Node) -> EvalContext:
        """The context, with the rounding of the caches that the node appends to."""
        if self.cache_dtype is not np.float16:
            return self.context
        rounding = next((ROUND_ROW[out.type.dtype] for out in node.outs if out.type.dtype in ROUND_ROW), None)
        return self.context if rounding is None else replace(self.context, round_row=rounding)

    def results(self, graph: Graph, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The states' next values and the extra outputs, by result name."""
        return {name: known[value.name] for name, value in graph.results}

    def _parameters(self, graph: Graph, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        missing = [param.name for param in graph.params if param.name not in values]
        if missing:
            raise UsageError(f"no array for %{missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
        known = {}
        for param in graph.params:
            array = values[param.name]
            if array.shape != param.type.shape:
                raise UsageError(f"%{param.name} is {param.type}, its array has the shape {list(array.shape)}")
            if param.kind != "weight":
                array = self._state(param.name, array, self.array_dtype(param.type))
            known[param.name] = array
        return known

    def _state(self, name: str, array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
        if array.dtype == dtype:
            return array
        if self.context.in_place_cache and dtype is self.cache_dtype:
            raise UsageError(f"%{name} is {array.dtype}, but a cache that changes in place must be {np.dtype(dtype)}")
        return array.astype(dtype)
