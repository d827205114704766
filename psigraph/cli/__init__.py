"""The command line: one file a command, imported only when that command is called.

So `psigraph --help` answers at once, and a package that one command lacks does not break the others.
"""

from __future__ import annotations

from .commands import COMMANDS, main
from .shell import run

__all__ = ["COMMANDS", "main", "run"]
