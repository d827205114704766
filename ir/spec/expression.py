"""Arithmetic in model specs: `heads * head_dim`, `head_dim ** -0.5`, `heads % kv_heads == 0`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

Number = int | float

OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
LARGEST_EXPONENT = 8
MOST_CHARACTERS = 200
MOST_BITS = 128
"""Of a result: far more than any extent has, and nothing that takes long to multiply."""


def names_in(text: str) -> set[str]:
    """The sizes that an expression reads; ValueError if it is no expression."""
    return {node.id for node in ast.walk(_tree(text)) if isinstance(node, ast.Name)}


def evaluate(text: str, sizes: Mapping[str, Number]) -> Number:
    """The value of an expression of numbers, names of sizes, + - * / // % ** and one comparison.

    ValueError says what is wrong: an unknown size, a form that is not allowed, a division by zero.
    """
    try:
        return _evaluate(_tree(text), sizes)
    except ArithmeticError as problem:
        raise ValueError(f"{text}: {problem}") from None


def _tree(text: str) -> ast.expr:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{text[:40]}... is no expression: it has {len(text)} characters, at most {MOST_CHARACTERS}")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):  # a NUL, or more digits than Python reads
        raise ValueError(f"{text!r} is no expression") from None


def _evaluate(node: ast.expr, sizes: Mapping[str, Number]) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.Name(id=name):
            if name not in sizes:
                raise ValueError(f"no size is called {name} (there are: {', '.join(sizes)})")
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, sizes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _apply(op, _evaluate(left, sizes), _evaluate(right, sizes))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in OPERATORS:
            return _apply(op, _evaluate(left, sizes), _evaluate(right, sizes))
    raise ValueError(f"{ast.unparse(node)} is not allowed in a size (numbers, sizes, + - * / // % ** and a comparison)")


def _apply(op: ast.AST, left: Number, right: Number) -> Number:
    if isinstance(op, ast.Pow) and abs(right) > LARGEST_EXPONENT:
        raise ValueError(f"the exponent {right} is above {LARGEST_EXPONENT}")
    return _bounded(OPERATORS[type(op)](left, right))


def _bounded(result: Any) -> Number:
    """The number; ValueError for one that no size can be, or that takes long to reckon with."""
    if isinstance(result, complex) or (isinstance(result, float) and not math.isfinite(result)):
        raise ValueError("a result is no finite number")
    if isinstance(result, int) and result.bit_length() > MOST_BITS:
        raise ValueError(f"a result has more than {MOST_BITS} bits")
    found: Number = result
    return found
