"""A kernel under construction, for emitters that write its lines one after the other."""

from __future__ import annotations

from .emission import Emitted
from .writer import Writer, signature


class SmallKernel:
    """Parameters with their arguments, and the lines of the body.

    stem: its name, up to a number; threads: a block's; header: text in front of the kernel.
    """

    header = ""

    def __init__(self, stem: str, threads: int) -> None:
        self.stem, self.threads = stem, threads
        self.writer = Writer()
        self.parameters: list[str] = []
        self.args: list[str | int] = []

    def take(self, declaration: str, arg: str | int) -> None:
        """One parameter more: as C declares it, and the buffer or number that a launch gives."""
        self.parameters.append(declaration)
        self.args.append(arg)

    def done(self, grid: int, shared_bytes: int = 0, bytes_read: int = 0, describe: str = "") -> Emitted:
        """The kernel and its launch."""
        head = self.header + signature(self.threads, self.parameters) + " {\n"
        body = "".join(f"    {line}\n" if line else "\n" for line in self.writer.text().splitlines())
        args = tuple(self.args)
        return Emitted(
            self.stem, head + body + "}\n", grid, self.threads, args, shared_bytes, bytes_read, describe=describe
        )
