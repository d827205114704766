"""How many rows a step has: what decides which fusions pay and which kernels serve."""

from __future__ import annotations

from enum import Enum


class Regime(Enum):
    """STEP: one row, bound by reading the weights. FEW: up to 16, which share one reading. MANY: a prompt's chunk,
    whose rows fill the tensor cores."""

    STEP = "one row"
    FEW = "few rows"
    MANY = "many rows"

    def __str__(self) -> str:
        return self.value


ALL = frozenset(Regime)
