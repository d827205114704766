"""Compiled kernels on disk: one file an entry, whole or not at all.

`cuda.core.utils.FileStreamProgramCache` was tried first: it writes atomically but keeps no
hash of what it wrote, so a flipped bit on disk would reach the GPU, and it does not check
who owns the folder. Here an entry is a line with the hash of all that follows: a JSON line (full key, the assembler's
resources) and the machine code; anything odd about it means: compile again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from dataclasses import asdict
from pathlib import Path

from ..private_cache import make_private, prune, read_private, user_cache_dir
from ..whole_files import write_whole
from .nvrtc import KernelResources

MAGIC = "psigraph kernel 2"
_NAMES = re.compile(r"[0-9a-f]{64}\.kernel|\.writing-\w+")  # the second of versions before this


def default_cache_dir() -> Path:
    """`$PSIGRAPH_CACHE_DIR`, or `psigraph` in the user's cache folder."""
    named = os.environ.get("PSIGRAPH_CACHE_DIR")
    return Path(named) if named else user_cache_dir()


class KernelCache:
    """A folder of compiled kernels; `folder=None` keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = self._usable(folder) if folder is not None else None
        self._pruned = False

    def get(self, key: dict[str, str]) -> tuple[bytes, KernelResources] | None:
        """The entry of a key, or None if there is none that is whole."""
        if self._folder is None:
            return None
        try:
            digest, _, rest = read_private(self._folder / self._name(key)).partition(b"\n")
            if digest != hashlib.sha256(rest).hexdigest().encode():
                return None
            head, _, payload = rest.partition(b"\n")
            record = json.loads(head)
            if record["magic"] == MAGIC and record["key"] == key:
                return payload, KernelResources(**record["resources"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        return None

    def put(self, key: dict[str, str], payload: bytes, resources: KernelResources) -> None:
        """Write an entry; a full or read-only disk costs a warning and nothing else."""
        if self._folder is None:
            return
        record = {"magic": MAGIC, "key": key, "resources": asdict(resources)}
        rest = json.dumps(record).encode() + b"\n" + payload
        try:
            write_whole(self._folder / self._name(key), hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
        except OSError as error:
            warnings.warn(f"kernel cache {self._folder}: {error.strerror}; running without it", stacklevel=2)
            self._folder = None
        else:
            if not self._pruned:
                self._pruned = True
                prune(self._folder, _NAMES)

    @staticmethod
    def _name(key: dict[str, str]) -> str:
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest() + ".kernel"

    @staticmethod
    def _usable(folder: Path) -> Path | None:
        """The folder if it is ours alone (machine code is read from it), else None with a warning."""
        try:
            make_private(folder)
        except OSError as error:
            warnings.warn(f"kernel cache {folder}: {error.strerror}; running without it", stacklevel=3)
            return None
        return folder
