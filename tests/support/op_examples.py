"""The example of an op's row in the table, with random arrays, and as a graph of one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from psigraph.ir.graph import Graph, Literal, Node, Param, TensorType, Value
from psigraph.ir.op import EvalContext
from psigraph.ir.ops import OPS
from psigraph.ir.types import CACHE_DTYPES
from psigraph.text.sampler import SamplerSettings

Arrays = dict[str, np.ndarray]
Dtype = type[np.floating[Any]]
SETTINGS = SamplerSettings(temperature=2.0, repetition_penalty=1.2, frequency_penalty=0.1, penalty_window=5, seed=8)
IDS = 9  # tokens are 0 to 8: every example's table and vocabulary has them
# What each row is: two sequences side by side, each in order, and rows that are absent.
COLUMNS = ("sequences", "positions")
ROWS = ((0, 2), (1, 5), (0, -1), (0, 3), (1, -1), (1, 6), (0, 4))


@dataclass(frozen=True)
class Example:
    """A node of an op over so many rows: arrays of its operands by name, in order, and its attributes."""

    name: str
    rows: int
    types: dict[str, TensorType]
    arrays: Arrays
    attrs: dict[str, Literal]

    @property
    def per_row(self) -> set[str]:
        """The operands that have a row for each token."""
        one, _ = OPS[self.name].example_of(self.rows + 1)
        return {name for (name, mine), other in zip(self.types.items(), one, strict=True) if mine != other}

    def compute(self, dtype: Dtype = np.float64, **changed: np.ndarray) -> Arrays:
        """The reference's results by name, with other arrays in the place of those that are named."""
        op, ins = OPS[self.name], {**self.arrays, **changed}
        names = op.result_names(len(ins), self.attrs)
        return dict(zip(names, op.reference(EvalContext(dtype), list(ins.values()), self.attrs), strict=True))

    def results(self) -> dict[str, TensorType]:
        """The types that the op's rule gives."""
        op = OPS[self.name]
        inferred = op.infer(list(self.types.values()), self.attrs)
        return dict(zip(op.result_names(len(self.types), self.attrs), inferred, strict=True))

    def graph(self) -> Graph:
        """The op as the only node of a graph; a state that it takes over becomes what it makes of it."""
        params = {name: Value(name, type_) for name, type_ in self.types.items()}
        outs = {name: Value(f"{name}.made", type_) for name, type_ in self.results().items()}
        node = Node(tuple(outs.values()), self.name, tuple(params.values()), tuple(self.attrs.items()))
        taken = OPS[self.name].consumes
        results = tuple((name if name in taken else out.name, out) for name, out in outs.items())
        return Graph("example", tuple(Param("state", value) for value in params.values()), (node,), results)


def example(name: str, rows: int = len(ROWS), dtype: Dtype = np.float64) -> Example:
    """The op's example with random arrays of its types; rows as in ROWS, again and again."""
    op = OPS[name]
    types, attrs = op.example_of(rows)
    rng = np.random.default_rng(5)
    typed = dict(zip(op.operand_names(len(types)), types, strict=True))
    arrays = {operand: _array(operand, type_, rng, dtype) for operand, type_ in typed.items()}
    made = Example(name, rows, typed, arrays, attrs)
    if "end_tokens" in arrays:  # the second row's and the third's, which is absent
        ends = (arrays if "tokens" in arrays else made.compute(dtype))["tokens"][1:3]
        arrays["end_tokens"][:] = [*ends, *[-1] * (len(arrays["end_tokens"]) - len(ends))]
    return made


def _array(name: str, type_: TensorType, rng: np.random.Generator, dtype: Dtype) -> np.ndarray:
    if name in COLUMNS:
        return np.resize(np.array(ROWS, np.int32)[:, COLUMNS.index(name)], type_.shape)
    if name == "sampler":
        return SETTINGS.words(IDS)
    if name == "stop":
        return np.zeros(type_.shape, np.int32)
    if type_.dtype == "i32":
        return rng.integers(0, IDS, type_.shape, np.int32)
    cache = len(type_.shape) == 4 and type_.dtype in CACHE_DTYPES
    return rng.standard_normal(type_.shape).astype(np.float16 if cache else dtype)
