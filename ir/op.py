"""What a row of the op table is, and the words that type rules and references are written in.

Every value that belongs to a token has a row for each of the step's T tokens: x of `matvec` is [T, n], heads are [T,
heads, head_dim]. Two of them say which token a row is: `positions` i32[T], and `sequences` i32[T], the sequence whose
cache and log it belongs to. A row whose position is negative is absent: it changes no state, and whatever else it makes
is nobody's.
A decode step has T = 1, a chunk of a prompt many rows of one sequence, a batch one row each of many.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .graph import Literal, TensorType
from .types import WEIGHT_DTYPES

ACTIVATIONS = ("f32", "f16")  # what an op reads; halves are how a value may lie in memory
FACTORS_OF_PRODUCTS = ("f32", "f16", "i8x2")  # what a product multiplies with its weights

MOST_INFERRED = 4096  # nodes of different types that an op remembers


class TypeMismatch(Exception):
    """A node that breaks the type rule of its op; `operand` is the input at fault, if it is one."""

    def __init__(self, message: str, operand: int | None = None) -> None:
        super().__init__(message)
        self.operand = operand


class Types:
    """The operand types of one node, with checks that raise TypeMismatch naming the operand.

    length: T, the number of rows, once an operand has told it.
    """

    def __init__(self, names: Sequence[str], types: Sequence[TensorType]) -> None:
        self.names = list(names)
        self.types = list(types)
        self.length: int | None = None

    def __getitem__(self, name: str) -> TensorType:
        return self.types[self.names.index(name)]

    def fail(self, name: str, wanted: str) -> TypeMismatch:
        index = self.names.index(name)
        return TypeMismatch(f"{name} is {self.types[index]}, wanted {wanted}", index)

    def expect(self, name: str, dtypes: str | Sequence[str], shape: Sequence[int | None]) -> tuple[int, ...]:
        """Checks dtype and shape (None: any extent) and returns the shape."""
        allowed = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
        actual = self[name]
        fits = len(actual.shape) == len(shape)
        fits = fits and all(want in (None, have) for have, want in zip(actual.shape, shape, strict=True))
        if actual.dtype not in allowed or not fits:
            wanted = ",".join("?" if extent is None else str(extent) for extent in shape)
            raise self.fail(name, f"{'|'.join(allowed)}[{wanted}]")
        return actual.shape

    def rows(self, name: str, *extents: int | None, dtypes: str | Sequence[str] = ACTIVATIONS) -> tuple[int, ...]:
        """A value of T rows of these extents; returns the extents."""
        shape = self.expect(name, dtypes, (self.length, *extents))
        self.length = shape[0]
        return shape[1:]

    def integers(self, *names: str) -> None:
        """Values of one integer a row: tokens, positions, sequences."""
        for name in names:
            self.rows(name, dtypes="i32")

    def factor(self, name: str, length: int | None = None) -> int:
        """T vectors that a product multiplies with its weights; returns their length."""
        return self.rows(name, length, dtypes=FACTORS_OF_PRODUCTS)[0]

    def vector(self, name: str, length: int | None = None, dtypes: str | Sequence[str] = "f32") -> int:
        """One vector that all rows share; returns its length."""
        return self.expect(name, dtypes, (length,))[0]

    def weight(self, name: str, columns: int | None = None) -> tuple[int, int]:
        """A weight matrix; returns (rows, columns)."""
        rows, cols = self.expect(name, WEIGHT_DTYPES, (None, columns))
        return rows, cols

    def made(self, *extents: int, dtype: str = "f32") -> TensorType:
        """The type of a result of T rows of these extents."""
        assert self.length is not None, "an operand has told T by now"
        return TensorType(dtype, (self.length, *extents))


Attributes = Mapping[str, Any]
Arrays = tuple[np.ndarray, ...]
Results = tuple[TensorType, ...]
TypeRule = Callable[[Types, Attributes], Results]
Reference = Callable[["EvalContext", list[np.ndarray], Attributes], Arrays]


@dataclass(frozen=True)
class EvalContext:
    """How the interpreter computes: see `ir.interpret.Interpreter`.

    round_row: what a cache holds instead of rows [T, kv_heads, head_dim], before its array's own element type rounds
    them.
    """

    dtype: type[np.floating[Any]] = np.float64
    in_place_cache: bool = False
    round_row: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Op:
    """One row of the table: how a node must look and what it computes.

    signature     `name(operands) -> results`, of which the three fields are parts. A last operand that ends in `...`
                  stands for one or more, and so do results, as many as there are operands of that kind.
    summary       one line for the documentation.
    rule          operand types and attributes -> result types (f32 where i8x2 or f16 may stand too).
    reference     operand arrays -> result arrays, in numpy.
    example       operand types of a small node, T for the number of rows, and its attributes: what derived tests run.
    attributes    required ones and their Python types; `optional` may be missing.
    may_quantize  results that may be declared i8x2 instead of f32.
    product       the first operand is multiplied with the weights: it may be i8x2.
    consumes      operands that the result of the same name overwrites in memory: nothing
                  may read the old value once the node has run.
    extra_result  name of the result that comes first when the attribute `keep_<name>` is true.
    elementwise   a value of the result comes of one value of each operand: kernels call the struct of the op's name in
                  codegen/device/functions.cuh.
    fused         made by passes, not written in specs.
    """

    signature: str
    summary: str
    rule: TypeRule
    reference: Reference
    example: str
    attributes: Mapping[str, type] = field(default_factory=dict)
    optional: Mapping[str, type] = field(default_factory=dict)
    may_quantize: tuple[str, ...] = ()
    product: bool = False
    consumes: tuple[str, ...] = ()
    extra_result: str = ""
    elementwise: bool = False
    fused: bool = False
    name: str = field(init=False)
    operands: tuple[str, ...] = field(init=False)
    results: tuple[str, ...] = field(init=False)
    _inferred: dict[Any, tuple[TensorType, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name, operands, results = self.signature.replace("(", " -> ").replace(")", "").split(" -> ")
        named = {"name": name, "operands": tuple(operands.split(", ")), "results": tuple(results.split(", "))}
        self.__dict__.update(named)  # frozen for everybody else

    @property
    def variadic(self) -> bool:
        return self.operands[-1].endswith("...")

    def operand_names(self, count: int) -> list[str]:
        """Names for `count` operands; TypeMismatch if the op cannot take that many."""
        fixed = list(self.operands)
        if self.variadic:
            stem = fixed.pop().removesuffix("...")
            if count <= len(fixed):
                raise TypeMismatch(f"{self.name} takes at least {len(fixed) + 1} operands, not {count}")
            return fixed + [f"{stem}{index}" for index in range(count - len(fixed))]
        if count != len(fixed):
            raise TypeMismatch(f"{self.name} takes {len(fixed)} operands ({', '.join(fixed)}), not {count}")
        return fixed

    def result_names(self, operand_count: int, attrs: Attributes) -> list[str]:
        """Names of the results of a node with that many operands and these attributes."""
        names = list(self.results)
        if names[-1].endswith("..."):
            stem = names.pop().removesuffix("...")
            names += [f"{stem}{index}" for index in range(operand_count - len(self.operands) + 1)]
        if self.extra_result and attrs.get(f"keep_{self.extra_result}"):
            names.insert(0, self.extra_result)
        return names

    def quantizable(self, operand_count: int, attrs: Attributes) -> tuple[int, ...]:
        """Indices of the results that may be i8x2."""
        names = self.result_names(operand_count, attrs)
        return tuple(index for index, name in enumerate(names) if name in self.may_quantize)

    def check_attributes(self, attrs: Mapping[str, Literal]) -> None:
        """TypeMismatch for a missing, unknown or wrongly typed attribute."""
        known = {**self.attributes, **self.optional}
        for key in self.attributes:
            if key not in attrs:
                raise TypeMismatch(f"{self.name} needs the attribute {key}")
        for key, value in attrs.items():
            if key not in known:
                has = ", ".join(known) or "none"
                raise TypeMismatch(f"{self.name} has no attribute {key} (it has: {has})")
            if type(value) is not known[key]:
                raise TypeMismatch(f"{self.name} wants {key} as {known[key].__name__}, not {value!r}")

    def infer(self, types: Sequence[TensorType], attrs: Mapping[str, Literal]) -> tuple[TensorType, ...]:
        """Result types, with f32 where i8x2 or f16 may stand too; TypeMismatch says what does not fit."""
        # Layers repeat the same few nodes, and every pass is verified. The attributes' own types belong to the key:
        # 1, 1.0 and True are equal.
        key = (tuple(types), tuple((name, type(value), value) for name, value in attrs.items()))
        known = self._inferred.get(key)
        if known is None:
            if len(self._inferred) >= MOST_INFERRED:
                self._inferred.clear()
            self.check_attributes(attrs)
            known = self.rule(Types(self.operand_names(len(types)), types), attrs)
            self._inferred[key] = known
        return known

    def example_of(self, rows: int) -> tuple[list[TensorType], dict[str, Literal]]:
        """Operand types and attributes of the example, over so many rows."""
        types, _, attributes = self.example.partition(" {")
        found = []
        for dtype, shape in re.findall(r"(\w+)\[([\w,]+)\]", types):
            extents = (rows if extent == "T" else int(extent) for extent in shape.split(","))
            found.append(TensorType(dtype, tuple(extents)))
        pairs = (pair.split("=") for pair in attributes.rstrip("}").split(", ") if pair)
        known = {**self.attributes, **self.optional}
        return found, {key: value == "true" if known[key] is bool else known[key](value) for key, value in pairs}
