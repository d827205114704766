"""A run of tokens that are known, for what is made of one."""

from __future__ import annotations

from psigraph.text.turns import Turns


class Listed:
    """Stands where a TokenRun is."""

    def __init__(self, tokens: list[int]) -> None:
        self.pieces, self.reason, self.turns = iter(tokens), "", Turns()

    def end(self) -> None:
        self.reason = self.reason or "interrupted"
