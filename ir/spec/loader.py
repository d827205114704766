"""Reads a model spec (models/*.yaml) and checks it line by line; `model` makes graphs of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import SpecError
from ..graph import Origin
from ..op import TypeMismatch
from ..ops import OPS
from ..syntax import Name, Reader, Statement
from ..types import CACHE, DTYPES
from ..verify import suggestion
from .expression import names_in
from .model import SECTIONS, Binding, ModelSpec
from .parts import LAYER, Held, Shape, Size, Variant, Weight
from .yaml_nodes import Item, read_document, read_spec_text

REQUIRED = ("architecture", "sizes", "weights", "state", *SECTIONS)
OPTIONAL = ("refused", "checks", "expected", "variants", "constants")
REQUIRED_SIZES = ("layers", "context")
GIVEN_SIZES = (
    "rows",
    "max_sequences",
)  # by whoever makes a step: its rows, and how many sequences have caches and logs
WEIGHT_FORM = re.compile(r"(?P<tensor>\S+) \[(?P<shape>[^\]]+)\](?: or (?P<otherwise>\w+))?")
HELD_FORM = re.compile(r"(?P<dtype>\w+)\[(?P<shape>[^\]]+)\]")
NUMBER = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"
RANGE_FORM = re.compile(rf"(?P<low>{NUMBER})\.\.(?P<high>{NUMBER})")

__all__ = ["Binding", "ModelSpec", "available_specs", "load_spec"]


def load_spec(path: str | Path) -> ModelSpec:
    """The spec in a YAML file. SpecError names the file's line for anything that is wrong."""
    path = Path(path)
    document = read_document(path)
    parts = document.mapping()
    for key, item in parts.items():
        if key not in REQUIRED + OPTIONAL:
            raise item.error(f"no such part{suggestion(key, [*REQUIRED, *OPTIONAL])}")
    for key in REQUIRED:
        if key not in parts:
            raise document.error(f"{key}: is missing")
    sizes = _sizes(parts["sizes"])
    weights = _weights(parts["weights"])
    states = _held(parts["state"])
    constants = _held(parts["constants"]) if "constants" in parts else ()
    steps = {section: _statements(parts[section]) for section in SECTIONS}
    spec = ModelSpec(
        file=path.name,
        lines=tuple(read_spec_text(path).split("\n")),
        architecture=parts["architecture"].text(),
        refused={key: item.text() for key, item in _mapping(parts, "refused").items()},
        sizes=sizes,
        checks=_checks(_mapping(parts, "checks")),
        expected=_expected(_mapping(parts, "expected")),
        variants={
            key: _variants(item, [size.name for size in sizes]) for key, item in _mapping(parts, "variants").items()
        },
        weights=weights,
        states=states,
        constants=constants,
        steps=steps,
    )
    _check_sizes(spec, parts["sizes"])
    _check_weights(spec)
    _check_steps(spec)
    return spec


def available_specs(folder: str | Path) -> dict[str, Path]:
    """Architecture -> spec file, for every YAML file of the folder that names an architecture.

    SpecError if two files claim the same one."""
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("*.yaml")):
        parts = read_document(path).mapping()
        if "architecture" not in parts:
            continue
        name = parts["architecture"].text()
        if name in found:
            raise parts["architecture"].error(f"{name} is declared in {found[name].name} already")
        found[name] = path
    return found


def _mapping(parts: Mapping[str, Item], key: str) -> dict[str, Item]:
    return parts[key].mapping() if key in parts else {}


def _checks(items: Mapping[str, Item]) -> tuple[tuple[str, str, Origin], ...]:
    return tuple((key, item.text(), item.origin) for key, item in items.items())


def _expected(items: Mapping[str, Item]) -> dict[str, tuple[int | float | str, ...]]:
    return {key: tuple(value.scalar() for value in item.items()) for key, item in items.items()}


def _variants(part: Item, known: list[str]) -> dict[str, Variant]:
    found = {}
    for word, item in part.mapping().items():
        fields = item.mapping()
        for key in fields:
            if key not in ("sizes", "checks", "expected"):
                raise item.error(f"no such field: {key} (known: sizes, checks, expected)")
        names = fields["sizes"].items() if "sizes" in fields else []
        for name in names:
            if name.text() not in known:
                raise name.error(f"no size is called {name.text()}{suggestion(name.text(), known)}")
        sizes = tuple(name.text() for name in names)
        found[word] = Variant(sizes, _checks(_mapping(fields, "checks")), _expected(_mapping(fields, "expected")))
    if not found:
        raise part.error("wanted at least one word with its fields")
    return found


def _sizes(part: Item) -> tuple[Size, ...]:
    found = []
    for name, item in part.mapping().items():
        fields = item.mapping()
        known = {"key", "rows", "value", "integer", "float", "otherwise", "absent", "named"}
        if set(fields) - known:
            unknown = ", ".join(sorted(set(fields) - known))
            raise item.error(f"no such field: {unknown} (known: {', '.join(sorted(known))})")
        texts = {key: field.text() for key, field in fields.items()}
        if sum(key in texts for key in ("key", "rows", "value")) != 1:
            raise item.error("wanted exactly one of key, rows and value")
        ranges = [key for key in ("integer", "float") if key in texts]
        if "value" not in texts and len(ranges) != 1:
            raise item.error("wanted a range: integer: LOW..HIGH or float: LOW..HIGH")
        low, high = _range(item, texts[ranges[0]]) if ranges else (float("-inf"), float("inf"))
        sources = {key: texts.get(key, "") for key in ("key", "rows", "value", "otherwise", "absent", "named")}
        found.append(Size(name, item.origin, whole=ranges != ["float"], low=low, high=high, **sources))
    return tuple(found)


def _range(item: Item, text: str) -> tuple[float, float]:
    form = RANGE_FORM.fullmatch(text)
    if form is None:
        raise item.error(f"{text!r} is no range LOW..HIGH")
    return float(form["low"]), float(form["high"])


def _shape(item: Item, text: str) -> Shape:
    extents = tuple(extent.strip() for extent in text.split(","))
    for extent in extents:
        try:
            names_in(extent)
        except ValueError as problem:
            raise item.error(str(problem)) from None
    return Shape(extents, item.origin)


def _weights(part: Item) -> tuple[Weight, ...]:
    found = []
    for name, item in part.mapping().items():
        form = WEIGHT_FORM.fullmatch(item.text())
        if form is None:
            raise item.error("wanted `tensor.name [rows, columns]`, with ` or WEIGHT` behind it if it may be absent")
        found.append(Weight(name, form["tensor"], _shape(item, form["shape"]), form["otherwise"] or ""))
    return tuple(found)


def _held(part: Item) -> tuple[Held, ...]:
    found = []
    known = (*DTYPES, CACHE)
    for name, item in part.mapping().items():
        form = HELD_FORM.fullmatch(item.text())
        if form is None or form["dtype"] not in known:
            raise item.error(f"wanted `dtype[extent, ...]`, with a dtype of {', '.join(known)}")
        if LAYER in name and not name.endswith("." + LAYER):
            raise item.error("{layer} belongs at the end, behind a dot")
        found.append(Held(name, form["dtype"], _shape(item, form["shape"])))
    return tuple(found)


def _statements(part: Item) -> tuple[Statement, ...]:
    text, line = part.block()
    return Reader(text, part.file, line).statements()


def _check_sizes(spec: ModelSpec, part: Item) -> None:
    """Every expression reads sizes that stand above it (shapes and checks: any size)."""
    known = set(GIVEN_SIZES)
    weights = {weight.name for weight in spec.weights}
    optional = spec.optional_sizes
    for size in spec.sizes:
        if size.rows and size.rows not in weights:
            raise SpecError(f"{size.origin}: {size.name}: no weight is called {size.rows}")
        for text in filter(None, (size.value, size.otherwise)):
            _check_expression(text, known, size.origin)
        if size.name not in optional:
            known.add(size.name)
    for variant in (variant for words in spec.variants.values() for variant in words.values()):
        for text, _, origin in variant.checks:
            _check_expression(text, known | set(variant.sizes), origin)
    for name in REQUIRED_SIZES:
        if name not in known:
            raise part.error(f"the size {name} is missing")
    for text, _, origin in spec.checks:
        _check_expression(text, known, origin)
    for shape in (*(w.shape for w in spec.weights), *(h.shape for h in (*spec.states, *spec.constants))):
        for extent in shape.extents:
            _check_expression(extent, known, shape.origin)


def _check_expression(text: str, known: set[str], origin: Origin) -> None:
    try:
        unknown = sorted(names_in(text) - known)
    except ValueError as problem:
        raise SpecError(f"{origin}: {problem}") from None
    if unknown:
        raise SpecError(f"{origin}: no size is called {unknown[0]} here{suggestion(unknown[0], sorted(known))}")


def _check_weights(spec: ModelSpec) -> None:
    """Substitutes exist and have the same shape; every weight is used."""
    by_name = {weight.name: weight for weight in spec.weights}
    read = {name for statements in spec.steps.values() for statement in statements for name in statement.ins}
    for weight in spec.weights:
        origin = weight.shape.origin
        if weight.otherwise:
            other = by_name.get(weight.otherwise)
            if other is None or other.otherwise or other.shape.extents != weight.shape.extents:
                raise SpecError(f"{origin}: {weight.name}: {weight.otherwise} is no weight of the same shape")
            read.add(weight.otherwise) if weight.name in read else None
        if weight.name not in read and not any(weight.name == w.otherwise for w in spec.weights):
            raise SpecError(f"{origin}: the weight {weight.name} is never used")


def _check_steps(spec: ModelSpec) -> None:
    """Names, ops, operand counts, attributes and sizes of every op line."""
    sizes = {size.name for size in spec.sizes}
    fixed = {weight.name: weight.per_layer for weight in spec.weights}
    fixed |= {held.stem: held.per_layer for held in spec.constants}
    assigned: set[str] = {held.stem for held in spec.states if not held.per_layer}
    layered = {held.stem for held in spec.states if held.per_layer}
    for section in SECTIONS:
        known = assigned | {name for name, per_layer in fixed.items() if section == "layer" or not per_layer}
        known |= layered if section == "layer" else set()
        for statement in spec.steps[section]:
            _check_statement(spec, statement, known, sizes, fixed)
            known |= {name for name, _ in statement.outs}
        assigned = known - layered - set(fixed)


def _check_statement(
    spec: ModelSpec, statement: Statement, known: set[str], sizes: set[str], fixed: Mapping[str, bool]
) -> None:
    op = OPS.get(statement.op)
    if op is None:
        raise line_error(spec, statement, f"no such op{suggestion(statement.op, list(OPS))}", statement.op)
    for name in statement.ins:
        if name not in known:
            raise line_error(spec, statement, f"%{name} is not known here{suggestion(name, sorted(known))}", f"%{name}")
    for name, type_ in statement.outs:
        if type_ is not None or "." in name or name in fixed:
            problem = "takes no type here" if type_ else "cannot be assigned (a weight, a constant or a dotted name)"
            raise line_error(spec, statement, f"%{name} {problem}", f"%{name}")
    for _, value in statement.attrs:
        if isinstance(value, Name) and value.name not in sizes:
            message = f"no size is called {value.name}{suggestion(value.name, sorted(sizes))}"
            raise line_error(spec, statement, message, f"${value.name}")
    try:
        op.operand_names(len(statement.ins))
        results = op.result_names(len(statement.ins), dict(statement.attrs))
        keys = {key for key, _ in statement.attrs}
        op.check_attributes(
            {key: kind() for key, kind in {**op.attributes, **op.optional}.items() if key in keys}
            | dict.fromkeys(keys - {*op.attributes, *op.optional}, 0)
        )
    except TypeMismatch as problem:
        raise line_error(spec, statement, str(problem), statement.op) from None
    if len(results) != len(statement.outs):
        raise line_error(spec, statement, f"{op.name} has {len(results)} results ({', '.join(results)})", "")


def line_error(spec: ModelSpec, statement: Statement, message: str, at: str) -> SpecError:
    return spec.line_error(statement.line, message, at)
