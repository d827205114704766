"""Prompts out of files and pipes."""

from __future__ import annotations

import sys
from pathlib import Path

from ..ir.errors import UsageError

STDIN = "-"
_MOST_BYTES = 64 << 20  # no context holds the tokens of more


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or of stdin for "-", without the line break at its end.

    UsageError for a file that cannot be read, is no UTF-8, or is larger than any context.
    """
    name = "stdin" if str(path) == STDIN else str(path)
    try:
        if name == "stdin":
            data = sys.stdin.buffer.read(_MOST_BYTES + 1) if sys.stdin is not None else b""
        else:
            with open(path, "rb") as file:
                data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror or error}") from None
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{name}: more than {_MOST_BYTES >> 20} MiB of text; no context holds that")
    return decoded(data, name).removesuffix("\n").removesuffix("\r")


def decoded(data: bytes, name: str) -> str:
    """UTF-8, with or without a byte order mark; UsageError names the byte at fault."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; "
            "convert the text first, for example with iconv"
        ) from None


def stdin_is_piped() -> bool:
    """Whether somebody may have put a text there."""
    return sys.stdin is not None and not sys.stdin.closed and not sys.stdin.isatty()
