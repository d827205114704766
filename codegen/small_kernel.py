"""A kernel under construction, for emitters that write its lines one after the other."""

from __future__ import annotations

from .emission import KernelSpec
from .writer import Writer


class SmallKernel:
    """Parameters with their arguments, and the lines of the body.

    stem: its name, up to a number; threads: a block's; includes: device headers.
    """

    includes: tuple[str, ...] = ("cache.cuh", "quant.cuh")

    def __init__(self, stem: str, threads: int) -> None:
        self.stem, self.threads = stem, threads
        self.writer = Writer()
        self.parameters: list[str] = []
        self.args: list[str | int] = []

    def take(self, declaration: str, arg: str | int) -> None:
        """One parameter more: as C declares it, and the buffer or number that a launch gives."""
        self.parameters.append(declaration)
        self.args.append(arg)

    def done(self, grid: int, shared_bytes: int = 0, bytes_read: int = 0, describe: str = "") -> KernelSpec:
        """The kernel and its launch."""
        return KernelSpec(
            stem=self.stem,
            includes=self.includes,
            threads=self.threads,
            parameters=tuple(self.parameters),
            args=tuple(self.args),
            body=self.writer.text(),
            grid=grid,
            shared_bytes=shared_bytes,
            bytes_read=bytes_read,
            describe=describe,
        )
