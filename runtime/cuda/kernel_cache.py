"""Compiled kernels on disk: one file an entry, whole or not at all.

`cuda.core.utils.FileStreamProgramCache` was tried first: it writes atomically but keeps no
hash of what it wrote, so a flipped bit on disk would reach the GPU, and it does not check
who owns the folder. Here an entry is a JSON line (full key, payload hash, the assembler's
resources) followed by the machine code; anything odd about it means: compile again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

from .nvrtc import KernelResources

MAGIC = "psigraph kernel 1"


def default_cache_dir() -> Path:
    """`$PSIGRAPH_CACHE_DIR`, or `psigraph` in the user's cache folder (XDG Base Directory)."""
    named = os.environ.get("PSIGRAPH_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psigraph"


class KernelCache:
    """A folder of compiled kernels; `folder=None` keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = self._usable(folder) if folder is not None else None

    def get(self, key: dict[str, str]) -> tuple[bytes, KernelResources] | None:
        """The entry of a key, or None if there is none that is whole."""
        if self._folder is None:
            return None
        try:
            data = (self._folder / self._name(key)).read_bytes()
            head, _, payload = data.partition(b"\n")
            record = json.loads(head)
            whole = record["magic"] == MAGIC and record["key"] == key
            if whole and record["sha256"] == hashlib.sha256(payload).hexdigest():
                return payload, KernelResources(**record["resources"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        return None

    def put(self, key: dict[str, str], payload: bytes, resources: KernelResources) -> None:
        """Write an entry; a full or read-only disk costs a warning and nothing else."""
        if self._folder is None:
            return
        record = {
            "magic": MAGIC,
            "key": key,
            "sha256": hashlib.sha256(payload).hexdigest(),
            "resources": asdict(resources),
        }
        temporary = ""
        try:
            handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=".writing-")
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(record).encode() + b"\n" + payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._folder / self._name(key))
            temporary = ""
        except OSError as error:
            warnings.warn(f"kernel cache {self._folder}: {error.strerror}; running without it", stacklevel=2)
            self._folder = None
        finally:  # after Ctrl-C too
            if temporary:
                Path(temporary).unlink(missing_ok=True)

    @staticmethod
    def _name(key: dict[str, str]) -> str:
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest() + ".kernel"

    @staticmethod
    def _usable(folder: Path) -> Path | None:
        """The folder if it is ours alone (machine code is read from it), else None with a warning."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.stat(folder)
            if found.st_uid != os.getuid():
                raise OSError(0, "belongs to another user")
            if stat.S_IMODE(found.st_mode) & 0o022:
                os.chmod(folder, 0o700)
        except OSError as error:
            warnings.warn(f"kernel cache {folder}: {error.strerror}; running without it", stacklevel=3)
            return None
        return folder
