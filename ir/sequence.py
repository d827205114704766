"""Ops over a sequence: what a node means whose values have one more dimension in front, a row a token.

A graph over a sequence of T tokens (`passes.over_sequence`) is written in the same ops as a step. An operand that
belongs to a token, say x of `matvec`, then is [T, n] instead of [n]; weights and caches are shared by all tokens.
In the place of `position` stands a *span*, i32[2]: the position of the first row, and how many rows count, so that
one graph serves any number of tokens up to T.

The meaning is that of the step, row after row: row t is computed as at position first + t, and sees the caches as the
rows before left them. An op with a span computes the rows that count, and the others are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .graph import Literal, TensorType
from .op import I32_ONE, Machine, Op, TypeMismatch, Types

SPAN = TensorType("i32", (2,))

# Op -> operand that belongs to a token -> its rank in a step. Other ops have no form over a sequence.
# rms_norm needs none for a vector: [T, n] along its last axis is what [heads, n] is.
PER_TOKEN: Mapping[str, Mapping[str, int]] = {
    "embed": {"token": 1},
    "rms_norm": {"x": 2},
    "matvec": {"x": 1},
    "split_heads": {"x": 1},
    "merge_heads": {"x": 2},
    "rope": {"x": 2},
    "cache_append": {"row": 2},
    "attention": {"q": 2},
    "swiglu": {"gate": 1, "up": 1},
    "add": {"a": 1, "b": 1},
    "mul": {"a": 1, "b": 1},
    "record": {"token": 1},
    "matvec_swiglu": {"x": 1},
    "matvec_add": {"x": 1, "residual": 1},
    "rope_append": {"q": 1, "k": 1, "v": 1},
}


def sequence_length(op: Op, names: Sequence[str], ranks: Sequence[int], firsts: Sequence[int]) -> int | None:
    """T of a node over a sequence, None for one of a step. ranks, firsts: each operand's rank and first extent."""
    known = PER_TOKEN.get(op.name, {})
    for name, rank, first in zip(names, ranks, firsts, strict=True):
        if name in known and rank == known[name] + 1:
            return first
    return None


def may_be_halves(op: Op, types: Sequence[TensorType]) -> bool:
    """Whether a node's f32 results may be declared f16: those of a sequence may."""
    names = op.operand_names(len(types))
    over = sequence_length(op, names, [len(t.shape) for t in types], [t.shape[0] for t in types]) is not None
    return over or (op.name == "rms_norm" and len(types[0].shape) == 2)


def infer_over(op: Op, types: Sequence[TensorType], attrs: Mapping[str, Literal]) -> tuple[TensorType, ...] | None:
    """Result types of a node over a sequence, None for one of a step; TypeMismatch says what does not fit."""
    names = op.operand_names(len(types))
    length = sequence_length(op, names, [len(t.shape) for t in types], [t.shape[0] for t in types])
    if length is None:
        return None
    rows = []
    for index, (name, type_) in enumerate(zip(names, types, strict=True)):
        rank = PER_TOKEN[op.name].get(name)
        if name == "position":
            if type_ != SPAN:
                raise TypeMismatch(f"position is {type_}, wanted a span i32[2]", index)
            rows.append(I32_ONE)
        elif rank is not None and len(type_.shape) == rank + 1:
            if type_.shape[0] != length:
                raise TypeMismatch(f"{name} is {type_}, wanted {length} rows", index)
            # Halves are how a chunk's activations may lie in memory; to the rule they are what they stand for.
            rows.append(TensorType("f32" if type_.dtype == "f16" else type_.dtype, type_.shape[1:]))
        else:
            rows.append(type_)
    results = op.rule(Types(names, rows), attrs)
    made = op.result_names(len(types), attrs)
    return tuple(
        type_ if name in op.consumes else TensorType(type_.dtype, (length, *type_.shape))
        for name, type_ in zip(made, results, strict=True)
    )


def compute_over(
    op: Op, machine: Machine, ins: list[np.ndarray], attrs: Mapping[str, Any]
) -> tuple[np.ndarray, ...] | None:
    """The results of a node over a sequence, None for one of a step."""
    names = op.operand_names(len(ins))
    length = sequence_length(op, names, [array.ndim for array in ins], [array.shape[0] for array in ins])
    if length is None:
        return None
    per_token = [
        array.ndim == PER_TOKEN[op.name].get(name, array.ndim) + 1 for name, array in zip(names, ins, strict=True)
    ]
    made = op.result_names(len(ins), attrs)
    first, count = (int(n) for n in ins[names.index("position")]) if "position" in names else (0, length)
    current, rows = list(ins), []
    for t in range(count):
        row = [array[t] if own else array for own, array in zip(per_token, current, strict=True)]
        if "position" in names:
            row[names.index("position")] = np.array([first + t], np.int32)
        rows.append(op.meaning(machine, row, attrs))
        for name, array in zip(made, rows[-1], strict=True):
            if name in op.consumes:
                current[names.index(name)] = array
    results: list[np.ndarray] = []
    for index, name in enumerate(made):
        if name in op.consumes:
            results.append(current[names.index(name)])
        elif rows:
            whole = np.zeros((length, *rows[0][index].shape), rows[0][index].dtype)
            whole[:count] = [row[index] for row in rows]
            results.append(whole)
        else:  # nothing counts, so only the types tell what would have come out
            raise ValueError(f"{op.name} over a sequence of which no row counts")
    return tuple(results)
