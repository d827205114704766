"""Lines for people beside a command's result: on stderr, none with --quiet, and a model file's warnings once a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from ..printable import printable

_TOLD = "told"  # folder beside the kernel cache: an empty file for each warning that a user has read
_quiet = False


def set_quiet(wanted: bool) -> None:
    """What --quiet says, for the rest of the command."""
    global _quiet
    _quiet = wanted


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return _quiet


def note(text: str) -> None:
    """One line on stderr."""
    if not _quiet:
        click.echo(text, err=True)


def warn(text: str) -> None:
    """A warning, in the form of all of them."""
    note(f"psigraph: warning: {printable(text)}")


def warn_of_file(path: Path, warnings: Sequence[str]) -> None:
    """What the policy says about a model file: one line, and not again until the file or the words change."""
    if not warnings or _quiet:
        return
    text = "; ".join(warnings)
    if _is_news(path, text):
        warn(text)


def _is_news(path: Path, text: str) -> bool:
    """Whether nobody was told yet; remembers that somebody is now. True where nothing can be remembered."""
    import hashlib

    from ..runtime.cuda.kernel_cache import default_cache_dir
    from ..runtime.private_cache import make_private

    try:
        status = path.stat()
        known = f"{os.path.realpath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\0{text}"
        folder = default_cache_dir() / _TOLD
        make_private(folder)
        name = hashlib.sha256(os.fsencode(known)).hexdigest()[:32]
        os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    except (OSError, RuntimeError):  # no cache folder, or no home: told every time, then
        return True
    return True
