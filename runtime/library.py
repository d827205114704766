"""What a library that multiplies offers; `runtime.cuda.cublas` is one."""

from __future__ import annotations

from typing import Any, Protocol


class Library(Protocol):
    """Products of halves with float32 sums, by somebody else's code."""

    name: str

    def prepare(self, rows: int, tokens: int, columns: int) -> None:
        """Whatever may allocate or measure, before anything is captured."""

    def product(
        self, w: int, x: int, c: int, y: int, rows: int, tokens: int, columns: int, add: bool, up: int, stream: Any
    ) -> None:
        """Queue y[tokens, rows] = 2^up * x[tokens, columns] @ w[rows, columns].T, plus c[tokens, rows] if add.

        w, x: addresses of halves; c, y: of float32, rows without gaps.
        """

    def close(self) -> None:
        """Give everything back; nothing may be running."""
