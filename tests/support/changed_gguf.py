"""Model files that differ from a sound one in a few keys and tensors; everything else stays byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from psigraph.runtime.gguf.file import GgufFile, open_gguf
from psigraph.runtime.gguf.write import header, padded

Tensor = tuple[str, tuple[int, ...], bytes]


def changed_gguf(
    source: Path,
    target: Path,
    pairs: Mapping[str, bytes | None] | None = None,
    tensors: Mapping[str, Tensor | None] | None = None,
) -> Path:
    """Writes `target`. pairs: key -> the whole pair (`runtime.gguf.write.pair`), tensors: name -> (ggml type, row-major
    shape, bytes); None removes one, a new name adds one."""
    with open_gguf(source) as file:
        raw = source.read_bytes()
        old_pairs: dict[str, bytes | None] = dict(_pairs(file, raw))
        old_tensors: dict[str, Tensor | None] = {
            name: (info.dtype, info.shape, raw[info.offset : info.offset + info.nbytes])
            for name, info in file.tensors.items()
        }
    kept = [value for value in (old_pairs | dict(pairs or {})).values() if value is not None]
    placed = {name: value for name, value in (old_tensors | dict(tensors or {})).items() if value is not None}
    with target.open("wb") as out:
        out.write(header(kept, [(name, dtype, shape) for name, (dtype, shape, _) in placed.items()]))
        for _, _, data in placed.values():
            out.write(data.ljust(padded(len(data)), b"\0"))
    return target


def _pairs(file: GgufFile, raw: bytes) -> dict[str, bytes]:
    """Every pair as it lies in the file."""
    begins = {key: at - 8 - len(key.encode()) for key, at in file.value_offsets.items()}
    entries = sum(8 + len(name) + 4 + 8 * len(info.shape) + 12 for name, info in file.tensors.items())
    ends = [*list(begins.values())[1:], file.header_end - entries]
    return {key: raw[begin:end] for (key, begin), end in zip(begins.items(), ends, strict=True)}
