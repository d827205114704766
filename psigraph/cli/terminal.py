"""What the terminal can show, and whether somebody looks at it."""

from __future__ import annotations

import os
import sys

from .notes import is_quiet


def is_dumb() -> bool:
    """Whether the terminal knows no escape sequences (TERM)."""
    return os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")


def is_plain() -> bool:
    """Whether nothing may be coloured: NO_COLOR (no-color.org) or a terminal without escape sequences."""
    return bool(os.environ.get("NO_COLOR")) or is_dumb()


def is_watched() -> bool:
    """Whether somebody sees stderr as it is written, and wants to."""
    return sys.stderr is not None and sys.stderr.isatty() and not is_quiet()
