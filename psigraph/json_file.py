"""JSON files that are either whole or not there."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

from .ir.errors import OutputError, UsageError
from .runtime.whole_files import write_whole

# json.dumps gives every number of a list a line of its own: 512 token ids would fill 512 lines.
_NUMBER_LIST = re.compile(r"\[\n\s+(-?\d[-+.\deE,\s]*?)\n\s*\]")


# Half a surrogate pair: what Python makes of a file name's bytes that are no UTF-8. No UTF-8 file can hold one.
_SURROGATE = re.compile("[\ud800-\udfff]")
_MODEL_MAGIC = b"GGUF"
LARGEST_JSON = 64 << 20


def json_text(obj: object) -> str:
    """Indented JSON with lists of numbers on one line; bytes of file names that are not UTF-8 are written as `\\xff`.

    Raises ValueError for NaN and infinities.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    text = _NUMBER_LIST.sub(lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text) + "\n"
    return _SURROGATE.sub(_spelled_out, text)


def _spelled_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    # The backslash is doubled, as JSON has no \x: what is read back are the four characters.
    return f"\\\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\\\u{code:04x}"


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OutputError unless a file can be written at `path`: asked before an hour of work, not after it.

    A device, a pipe, a folder and a model file are never written over; a missing folder is named, not made.
    """
    _real_target(Path(path))


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Raise OutputError unless files can be written into the folder `path`, which may yet have to be made."""
    folder = Path(path)
    if folder.is_dir():
        _real_target(folder / ".psigraph-probe")
    elif os.path.lexists(folder):
        raise OutputError(f"{folder}: is no folder; name one")
    else:
        _real_target(folder)


def _real_target(path: Path) -> Path:
    """The regular file that a write to `path` replaces or makes: through symlinks, so that they stay."""
    try:
        # strict=False: the last part may be missing; a loop of links shows when it is looked at.
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            what = "is no folder" if target.parent.exists() else "there is no such folder; make it first"
            raise OutputError(f"{path}: cannot be written: {target.parent}: {what}")
        if os.path.lexists(target):
            mode = target.stat().st_mode
            if stat.S_ISDIR(mode):
                raise OutputError(f"{path}: is a folder; name a file")
            if not stat.S_ISREG(mode):
                raise OutputError(f"{path}: is no regular file; name one, or leave the option out")
            if _is_model(target):
                raise OutputError(f"{path}: is a model file (GGUF), which is not written over; name another file")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None
    return target


def _is_model(path: Path) -> bool:
    """Whether a regular file begins as model files do. One that cannot be read is no model of this user."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(_MODEL_MAGIC)) == _MODEL_MAGIC
    except PermissionError:
        return False


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole text file in UTF-8, or leave what was there: temporary file beside it, fsync, rename.

    Raises OutputError, as `check_writable` does; nothing half-written stays, after an interrupt neither.
    """
    target = _real_target(Path(path))
    try:
        # A report is for others to read, as far as the umask allows.
        write_whole(target, text.encode(), 0o666)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_json_atomically(path: str | os.PathLike[str], obj: object) -> None:
    """`obj` as indented JSON, as `write_text_atomically` writes. ValueError for NaN, before anything is touched."""
    write_text_atomically(path, json_text(obj))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file, whoever wrote it; UsageError names the file where it is none.

    Numbers are finite and integers have at most 64 bits, texts are Unicode, and the file is a regular one of at most
    LARGEST_JSON bytes: what is read can be computed with, printed and written again.
    """
    try:
        text = read_regular(path, LARGEST_JSON).decode()
        obj = json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_short)
        if "\\ud" in text.lower():
            json.dumps(obj, ensure_ascii=False).encode()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeError:
        raise UsageError(f"{path}: is not JSON: it is not valid Unicode") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON: {str(error).splitlines()[0][:200]}") from None
    if not isinstance(obj, dict):
        raise UsageError(f"{path}: holds no JSON object")
    return obj


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """A regular file's bytes. OSError where it is another kind (a pipe would be waited for), or larger than `most`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "is no regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(0, f"is larger than {most >> 20} MiB")
    return data


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is out of range")
    return number


def _short(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError(f"{text[:40]} is out of range")
    return int(text)
