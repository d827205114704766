"""Where the user's lines come from: a terminal, a pipe, or a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import click

from ..ir.errors import UsageError
from .texts import decoded, read_text, stdin_is_piped

PROMPT, CONTINUED = "> ", ". "
BLOCK = '"""'

Read = Callable[[str], str]


def terminal_reader() -> Read:
    """Lines with editing and history where readline is to be had."""
    with suppress(ImportError):
        import readline  # noqa: F401 (importing it is what makes input() edit)

    return input


def pipe_reader() -> Read:
    """Lines of stdin; nothing is shown."""

    def read(_: str) -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decoded(line, "stdin").rstrip("\r\n")

    return read


def script_reader(path: Path) -> Read:
    """Lines of a file, shown as if they were typed."""
    lines = iter(read_text(path).splitlines())

    def read(prompt: str) -> str:
        try:
            line = next(lines)
        except StopIteration:
            raise EOFError from None
        click.echo(prompt + line)
        return line

    return read


def reader(script: Path | None) -> Read:
    """The one that fits; it raises EOFError where nothing is left."""
    if script is not None:
        return script_reader(script)
    if sys.stdin is None:
        raise UsageError("there is no stdin to read from; give the lines with --script FILE")
    return pipe_reader() if stdin_is_piped() else terminal_reader()


def entries(read: Read) -> Iterator[str]:
    """What the user says, entry by entry: a line, or the lines between two rows of three quotes. Empty ones not.

    Ends with the lines. KeyboardInterrupt comes through from the reader.
    """
    while True:
        try:
            line = read(PROMPT)
            if line.startswith(BLOCK):
                line = _block(line, read)
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _block(line: str, read: Read) -> str:
    parts = [line.removeprefix(BLOCK)]
    while not parts[-1].rstrip().endswith(BLOCK):
        parts.append(read(CONTINUED))
    parts[-1] = parts[-1].rstrip().removesuffix(BLOCK)
    return "\n".join(parts)
