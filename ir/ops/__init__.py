"""The op table: one row an op, with its type rule and its reference in numpy beside it, a file a kind.

Unfused ops are what model specs are written in; fused ops are what passes make of them, and one kernel computes.
"""

from __future__ import annotations

from ..op import Op, TypeMismatch
from . import attention, choice, product, vector
from .attention import ROPE_SCALING

_ROWS = (*vector.OPS, *product.OPS, *attention.OPS, *choice.OPS)
OPS: dict[str, Op] = {op.name: op for op in _ROWS}
UNFUSED = tuple(op for op in _ROWS if not op.fused)
FUSED = tuple(op for op in _ROWS if op.fused)
FUSED_NAMES = frozenset(op.name for op in FUSED)

__all__ = ["FUSED", "FUSED_NAMES", "OPS", "ROPE_SCALING", "UNFUSED", "Op", "TypeMismatch"]
