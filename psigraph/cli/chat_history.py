"""What was typed in earlier chats, for the arrow keys: a file of the user's own, an entry a line as JSON text."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from ..runtime.whole_files import write_whole
from .notes import warn

MOST_ENTRIES = 1000
MOST_BYTES = 1 << 20


def history_file() -> Path | None:
    """`psigraph/chat_history` in the user's state folder (XDG Base Directory); None for a user without a home."""
    try:
        folder = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return Path(folder) / "psigraph" / "chat_history"


def read_history(path: Path) -> list[str]:
    """The entries of the file, oldest first; what is no entry is left out. A long file is cut to the newest."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MOST_BYTES))
            lines = file.read(MOST_BYTES).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, str) and "\0" not in entry:
                found.append(entry)
    if len(lines) > MOST_ENTRIES:
        found = found[-MOST_ENTRIES // 2 :]
        with suppress(OSError):
            write_whole(path, b"".join(map(_line, found)))
    return found


def add_to_history(path: Path, entry: str) -> bool:
    """Append an entry. Whether that worked; a warning says why not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # What people ask is theirs alone.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW
        with open(os.open(path, flags, 0o600), "ab") as file:
            file.write(_line(entry))
    except OSError as error:
        warn(f"{path}: the history of the chat cannot be kept: {error.strerror}; --no-history leaves it out")
        return False
    return True


def _line(entry: str) -> bytes:
    return json.dumps(entry).encode() + b"\n"
