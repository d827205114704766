"""The parts of a model spec, each bound to a file's metadata and tensors by its own method."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ModelFileError, SpecError, UnsupportedModelError
from ..graph import Origin, TensorType
from ..types import BLOCK_SIZE, WEIGHT_DTYPES
from .expression import Number, evaluate

LAYER = "{layer}"


@dataclass(frozen=True)
class Shape:
    """Extents as expressions of sizes."""

    extents: tuple[str, ...]
    origin: Origin

    def bind(self, sizes: Mapping[str, Number]) -> tuple[int, ...]:
        """The extents as numbers; SpecError if one is no whole number above zero."""
        found = []
        for extent in self.extents:
            value = evaluated(extent, sizes, self.origin)
            if not isinstance(value, int) or value < 1:
                raise SpecError(f"{self.origin}: the extent {extent} is {value}, wanted a whole number above 0")
            found.append(value)
        return tuple(found)


@dataclass(frozen=True)
class Size:
    """A named number: from a metadata key, the rows of a weight, or an expression.

    Exactly one of key, rows and value is set. whole: an integer is wanted; low, high: the
    range that is accepted, both ends included. otherwise: an expression for an absent key;
    absent: what the user is told then. named: a key with an array of names for the rows: those
    behind the last name are padding and left out.
    """

    name: str
    origin: Origin
    key: str = ""
    rows: str = ""
    value: str = ""
    whole: bool = True
    low: float = -math.inf
    high: float = math.inf
    otherwise: str = ""
    absent: str = ""
    named: str = ""

    def bind(self, metadata: Mapping[str, object], sizes: Mapping[str, Number], rows: int | None) -> Number:
        """The number. ModelFileError names the key or tensor that is absent or out of range."""
        if self.value:
            return evaluated(self.value, sizes, self.origin)
        if self.rows:
            if rows is None:
                raise ModelFileError("the tensor is missing", field=self.rows)
            return self.checked(self._named_rows(metadata, rows), self.rows)
        if self.key not in metadata:
            if not self.otherwise:
                raise ModelFileError("the key is missing", field=self.key)
            if self.absent:
                warnings.warn(f"{self.key} is missing: {self.absent}", UserWarning, stacklevel=2)
            return self.checked(evaluated(self.otherwise, sizes, self.origin), self.key)
        return self.checked(self._one_for_all(metadata[self.key], sizes), self.key)

    def _named_rows(self, metadata: Mapping[str, object], rows: int) -> int:
        """The rows that have a name, all of them where the file holds no names."""
        names = metadata.get(self.named)
        if not isinstance(names, Sequence) or isinstance(names, str) or not names:
            return rows
        if len(names) > rows:
            raise ModelFileError(f"{len(names)} tokens, and {self.rows} has only {rows} rows", field=self.named)
        return len(names)

    def _one_for_all(self, value: object, sizes: Mapping[str, Number]) -> object:
        """What an array of one number a layer says, where it says the same of each."""
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or len(value) != sizes.get("layers"):
            return value
        if (value != value[0]).any():
            raise UnsupportedModelError(f"{self.key} differs from layer to layer; one number for all is supported")
        number: object = value[0].item()
        warnings.warn(f"{self.key} is an array; each of its numbers is {number}", UserWarning, stacklevel=2)
        return number

    def checked(self, value: object, field: str) -> Number:
        kind = numbers.Integral if self.whole else numbers.Real
        wanted = f"{'a whole' if self.whole else 'a'} number from {self.low:g} to {self.high:g}"
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ModelFileError(f"is {shown(value)}, wanted {wanted}", field=field)
        # A size of a file may be a numpy number; nan fails the comparison.
        number: Number = int(value) if self.whole else float(value)  # type: ignore[call-overload]
        if not self.low <= number <= self.high:
            raise ModelFileError(f"is {number}, wanted {wanted}", field=field)
        return number


@dataclass(frozen=True)
class Variant:
    """What a word at a key means: sizes that are read for it, and what holds for it alone (see `ModelSpec`)."""

    sizes: tuple[str, ...] = ()
    checks: tuple[tuple[str, str, Origin], ...] = ()
    expected: Mapping[str, tuple[int | float | str, ...]] = field(default_factory=dict)


def check_expected(expected: Mapping[str, tuple[int | float | str, ...]], metadata: Mapping[str, object]) -> None:
    """UnsupportedModelError for a key that is there and has another value than those."""
    for key, allowed in expected.items():
        value = metadata.get(key, allowed[0])
        if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)) or value not in allowed:
            known = " or ".join(map(str, allowed))
            raise UnsupportedModelError(f"{key} is {shown(value)}, psigraph computes only {known}")


@dataclass(frozen=True)
class Weight:
    """A tensor of the file under the name that the step uses. `otherwise` is another weight's
    name: it takes this one's place if the file lacks the tensor."""

    name: str
    tensor: str
    shape: Shape
    otherwise: str = ""

    @property
    def per_layer(self) -> bool:
        return LAYER in self.tensor

    def tensor_name(self, layer: int | None) -> str:
        return self.tensor if layer is None else self.tensor.replace(LAYER, str(layer))

    def bind(self, name: str, actual: TensorType, sizes: Mapping[str, Number], padded: frozenset[str]) -> TensorType:
        """The tensor as the step reads it. ModelFileError or UnsupportedModelError names it unless shape and type fit.

        padded: extents that the file may have more rows of; those at the end are left out.
        """
        wanted = self.shape.bind(sizes)
        most = actual.shape[0] if self.shape.extents[0] in padded and len(wanted) > 1 else 0
        if actual.shape[1:] != wanted[1:] or actual.shape[0] != max(wanted[0], most):
            raise ModelFileError(f"has the shape {list(actual.shape)}, wanted {list(wanted)}", field=name)
        allowed = WEIGHT_DTYPES if len(wanted) > 1 else ("f32",)
        if actual.dtype not in allowed:
            raise UnsupportedModelError(f"{name}: no kernel reads {actual.dtype} here (known: {', '.join(allowed)})")
        if wanted[-1] % BLOCK_SIZE[actual.dtype]:
            block = BLOCK_SIZE[actual.dtype]
            raise ModelFileError(f"rows of {wanted[-1]} are no whole blocks of {block} ({actual.dtype})", field=name)
        return TensorType(actual.dtype, wanted)


@dataclass(frozen=True)
class Held:
    """A state or constant: element type and shape. A name with `{layer}` means one a layer.

    dtype: one of `types.DTYPES`, or `cache`: the type that binding chooses for the KV cache.
    """

    name: str
    dtype: str
    shape: Shape

    @property
    def per_layer(self) -> bool:
        return LAYER in self.name

    @property
    def stem(self) -> str:
        """The name that the step uses: `k_cache` for `k_cache.{layer}`."""
        return self.name.replace("." + LAYER, "")

    def param_name(self, layer: int | None) -> str:
        return self.name if layer is None else self.name.replace(LAYER, str(layer))


def evaluated(text: str, sizes: Mapping[str, Number], origin: Origin) -> Number:
    """The expression's value; SpecError names the YAML line if it has none."""
    try:
        return evaluate(text, sizes)
    except ValueError as problem:
        raise SpecError(f"{origin}: {problem}") from None


def shown(value: object) -> str:
    """A metadata value for a message: never long, whatever the file holds."""
    if isinstance(value, (str, numbers.Number)):
        return ascii(value if not isinstance(value, str) else value[:60])[:100]
    return f"a list ({type(value).__name__})"
