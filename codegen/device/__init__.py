"""The device headers: CUDA C text that generated kernels stand on."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def device_header() -> str:
    """`psigraph_device.cuh` and, behind it, `psigraph_cache.cuh`: every instruction, weight type and cache that kernels
    use."""
    parts = (files(__package__) / name for name in ("psigraph_device.cuh", "psigraph_cache.cuh"))
    return "\n".join(part.read_text(encoding="utf-8") for part in parts)


@cache
def sampling_header() -> str:
    """`psigraph_sampling.cuh`: a token by chance."""
    return (files(__package__) / "psigraph_sampling.cuh").read_text(encoding="utf-8")


@cache
def prefill_header() -> str:
    """`psigraph_prefill.cuh`: many tokens at once, on the tensor cores."""
    return (files(__package__) / "psigraph_prefill.cuh").read_text(encoding="utf-8")


@cache
def repack_header() -> str:
    """`psigraph_repack.cuh`: where the model file keeps each value."""
    return (files(__package__) / "psigraph_repack.cuh").read_text(encoding="utf-8")
