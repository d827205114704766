"""The device headers: CUDA C++ that generated kernels stand on and include by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files


@cache
def device_headers() -> Mapping[str, str]:
    """Name -> text of every header of this folder."""
    found = (part for part in files(__package__).iterdir() if part.name.endswith(".cuh"))
    return {part.name: part.read_text(encoding="utf-8") for part in sorted(found, key=lambda part: part.name)}
