"""What a row of the op table is, and the words that type rules are written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .graph import Literal, TensorType
from .types import ACTIVATION_DTYPES, WEIGHT_DTYPES

F32_ONE = TensorType("f32", (1,))
I32_ONE = TensorType("i32", (1,))

MOST_INFERRED = 4096  # nodes of different types that an op remembers


class TypeMismatch(Exception):
    """A node that breaks the type rule of its op; `operand` is the input at fault, if it is one."""

    def __init__(self, message: str, operand: int | None = None) -> None:
        super().__init__(message)
        self.operand = operand


class Types:
    """The operand types of one node, with checks that raise TypeMismatch naming the operand."""

    def __init__(self, names: Sequence[str], types: Sequence[TensorType]) -> None:
        self.names = list(names)
        self.types = list(types)

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

    def vector(self, name: str, length: int | None = None, dtypes: str | Sequence[str] = "f32") -> int:
        """A one-dimensional value; returns its length."""
        return self.expect(name, dtypes, (length,))[0]

    def activation(self, name: str, length: int | None = None) -> int:
        """A vector that a product reads: f32, or i8x2 after lowering."""
        return self.vector(name, length, ACTIVATION_DTYPES)

    def weight(self, name: str, columns: int | None = None) -> tuple[int, int]:
        """A weight matrix; returns (rows, columns)."""
        rows, cols = self.expect(name, WEIGHT_DTYPES, (None, columns))
        return rows, cols

    def scalar(self, name: str, dtype: str = "i32") -> None:
        self.expect(name, dtype, (1,))


Attributes = Mapping[str, Any]
TypeRule = Callable[[Types, Attributes], tuple[TensorType, ...]]
Meaning = Callable[["Machine", list[np.ndarray], Attributes], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Machine:
    """How the interpreter computes: see `ir.interpret.Interpreter`.

    round_row: what a cache holds instead of a row [kv_heads, head_dim], before its array's own element type rounds it.
    """

    dtype: type[np.floating[Any]] = np.float64
    in_place_cache: bool = False
    round_row: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Op:
    """One row of the table: how a node must look and what it computes.

    operands      names in order; a last name that ends in `...` stands for one or more.
    results       names in order; `...` as above, as many as there are operands of that kind.
    rule          operand types and attributes -> result types (f32 where i8x2 may stand too).
    meaning       operand arrays -> result arrays.
    attributes    required ones and their Python types; `optional` may be missing.
    may_quantize  results that may be declared i8x2 instead of f32 (if they are vectors).
    product       the first operand is multiplied with the weights: it may be i8x2.
    consumes      operands that the result of the same name overwrites in memory: nothing
                  may read the old value once the node has run.
    extra_result  name of the result that comes first when the attribute `keep_<name>` is true.
    summary       one line for the documentation.
    """

    name: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    rule: TypeRule
    meaning: Meaning
    summary: str
    attributes: Mapping[str, type] = field(default_factory=dict)
    optional: Mapping[str, type] = field(default_factory=dict)
    may_quantize: tuple[str, ...] = ()
    product: bool = False
    consumes: tuple[str, ...] = ()
    extra_result: str = ""
    _inferred: dict[Any, tuple[TensorType, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        """Result types, with f32 where i8x2 may stand too; TypeMismatch says what does not fit."""
        # Layers repeat the same few nodes, and every pass is verified. The attributes' own types belong to the key:
        # 1, 1.0 and True are equal.
        key = (tuple(types), tuple((name, type(value), value) for name, value in attrs.items()))
        known = self._inferred.get(key)
        if known is None:
            if len(self._inferred) >= MOST_INFERRED:
                self._inferred.clear()
            known = self._inferred[key] = self._infer(types, attrs)
        return known

    def _infer(self, types: Sequence[TensorType], attrs: Mapping[str, Literal]) -> tuple[TensorType, ...]:
        from .sequence import infer_over  # it is written in the words of this file

        self.check_attributes(attrs)
        over = infer_over(self, types, attrs)
        return self.rule(Types(self.operand_names(len(types)), types), attrs) if over is None else over

    def compute(self, machine: Machine, ins: list[np.ndarray], attrs: Attributes) -> tuple[np.ndarray, ...]:
        """The meaning, over a sequence too (`ir.sequence`)."""
        from .sequence import compute_over

        over = compute_over(self, machine, ins, attrs)
        return self.meaning(machine, ins, attrs) if over is None else over
