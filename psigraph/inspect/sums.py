"""What lies in a compiled folder, by name and content, in the form of sha256sum: `SHA256SUMS`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..ir.errors import ModelFileError

SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """List every file of a new folder. Raises OSError."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_sha256(path.read_bytes())}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def first_foreign(folder: Path) -> str | None:
    """The first file in a folder that is not as `write_sums` listed it; None if all are. Raises OSError."""
    listed = _listed(folder)
    if not listed:  # not one of ours, however large it is
        return next((path.name for path in folder.iterdir()), None)
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            return name
        if path.is_dir():
            known = name in folders
        else:
            known = name == SUMS or (path.is_file() and listed.get(name) == _sha256(path.read_bytes()))
        if not known:
            return name
    return None


class Compiled:
    """A folder that `psigraph compile` wrote, read back: every file as it was written, or ModelFileError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed = _listed(folder)
        if not self._listed:
            other = (folder / "program.json").exists()
            raise ModelFileError(
                f"holds no {SUMS}; compile the model again"
                if other
                else "is neither a model file nor a folder that psigraph compile wrote",
                str(folder),
            )

    @property
    def names(self) -> list[str]:
        """Files, relative to the folder."""
        return list(self._listed)

    def text(self, name: str) -> str:
        """A file's text; ModelFileError where it is missing or another one than was written."""
        path = self.folder / name
        try:
            if not path.is_file():
                raise ModelFileError("is missing; compile the model again", str(path))
            data = path.read_bytes()
            text = data.decode()
        except OSError as error:
            raise ModelFileError(f"cannot be read: {error.strerror}; compile the model again", str(path)) from None
        except UnicodeDecodeError:
            raise ModelFileError("is not UTF-8; compile the model again", str(path)) from None
        if self._listed.get(name) != _sha256(data):
            raise ModelFileError("is not what psigraph compile wrote; compile the model again", str(path))
        return text


def _listed(folder: Path) -> dict[str, str]:
    """Name -> digest; none where there is no such list."""
    path = folder / SUMS
    try:
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError):
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
