"""Where the user's lines come from: a terminal, a pipe, or a file."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import click

from ..ir.errors import UsageError
from .chat_history import add_to_history, read_history
from .terminal import is_dumb
from .texts import decoded, read_text, stdin_is_piped

PROMPT, CONTINUED = "> ", ". "
BLOCK = '"""'

Read = Callable[[str], str]


def terminal_reader(history: Path | None = None) -> Read:
    """Lines with editing, and with what was typed before, where readline is to be had.

    Several lines that are pasted come as one, with their line breaks: terminals mark what is pasted, and GNU readline
    reads the marks. Without it, and where TERM says that there are no marks, lines that wait when one has been read
    belong to it. history: the file of what was typed before.
    """
    try:
        import readline  # importing it is what makes input() edit
    except ImportError:
        return _with_what_waits
    readline.set_auto_history(False)  # an entry of several lines is one, and `remember` knows where it ends
    readline.clear_history()
    for entry in read_history(history) if history is not None else ():
        with suppress(UnicodeEncodeError):  # typed where the locale had letters that this one lacks
            readline.add_history(entry)
    if is_dumb() or "GNU" not in (readline.__doc__ or ""):  # Python with libedit
        return _with_what_waits
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    return input


def _with_what_waits(prompt: str) -> str:
    lines = [input(prompt)]
    while select.select([sys.stdin], [], [], 0.02)[0]:
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines)


class History:
    """Remembers what is typed: for the arrow keys of this chat, and in a file for those of later ones."""

    def __init__(self, path: Path | None) -> None:
        """path: None where nothing is to be kept."""
        self.path = path

    def remember(self, entry: str) -> None:
        """The entry is over."""
        with suppress(ImportError, UnicodeEncodeError):
            import readline

            readline.add_history(entry)
        if self.path is not None and not add_to_history(self.path, entry):
            self.path = None  # said once


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


def reader(script: Path | None, history: Path | None = None) -> Read:
    """The one that fits; it raises EOFError where nothing is left."""
    if script is not None:
        return script_reader(script)
    if sys.stdin is None:
        raise UsageError("there is no stdin to read from; give the lines with --script FILE")
    return pipe_reader() if stdin_is_piped() else terminal_reader(history)


def entries(read: Read) -> Iterator[str]:
    """What the user says, entry by entry: a line, lines that were pasted together, or the lines between two rows of
    three quotes. Empty ones not.

    Ends with the lines; UsageError where they end within three quotes. KeyboardInterrupt comes through from the reader.
    """
    while True:
        try:
            line = read(PROMPT)
        except EOFError:
            return
        if line.startswith(BLOCK):
            line = _block(line, read)
        if line.strip():
            yield line.strip()


def _block(line: str, read: Read) -> str:
    parts = [line.removeprefix(BLOCK)]
    while not parts[-1].rstrip().endswith(BLOCK):
        try:
            parts.append(read(CONTINUED))
        except EOFError:
            count = sum(bool(part.strip()) for part in parts)
            lines = "a line was" if count == 1 else f"{count} lines were"
            raise UsageError(f"the input ended within {BLOCK}: {lines} not sent; a further {BLOCK} ends them") from None
    parts[-1] = parts[-1].rstrip().removesuffix(BLOCK)
    return "\n".join(parts)
