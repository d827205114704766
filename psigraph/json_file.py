"""JSON files that are either whole or not there."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from .ir.errors import OutputError, UsageError

# json.dumps gives every number of a list a line of its own: 512 token ids would fill 512 lines.
_NUMBER_LIST = re.compile(r"\[\n\s+(-?\d[-+.\deE,\s]*?)\n\s*\]")


def json_text(obj: object) -> str:
    """Indented JSON with lists of numbers on one line. Raises ValueError for NaN and infinities."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    return _NUMBER_LIST.sub(lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text) + "\n"


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OutputError unless a file can be written at `path`: asked before an hour of work, not after it.

    Missing parent folders are made, as the write itself would.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise OutputError(f"{target}: is a folder; name a file")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from None


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole text file in UTF-8, or leave what was there: temporary file beside it, fsync, rename.

    Raises OutputError; nothing half-written stays, after an interrupt neither.
    """
    target = Path(path)
    check_writable(target)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp gives 0600: a report is for others to read, as far as the umask allows.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
        temporary = ""
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def write_json_atomically(path: str | os.PathLike[str], obj: object) -> None:
    """`obj` as indented JSON, as `write_text_atomically` writes. ValueError for NaN, before anything is touched."""
    write_text_atomically(path, json_text(obj))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file; UsageError names the file where it is none."""
    try:
        obj = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(obj, dict):
        raise UsageError(f"{path}: holds no JSON object")
    return obj
