"""The device headers: CUDA C text that generated kernels stand on."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def device_header() -> str:
    """`psigraph_device.cuh`: every instruction and weight type that kernels use."""
    return (files(__package__) / "psigraph_device.cuh").read_text(encoding="utf-8")


@cache
def sampling_header() -> str:
    """`psigraph_sampling.cuh`: a token by chance."""
    return (files(__package__) / "psigraph_sampling.cuh").read_text(encoding="utf-8")


@cache
def prefill_header() -> str:
    """`psigraph_prefill.cuh`: many tokens at once, on the tensor cores."""
    return (files(__package__) / "psigraph_prefill.cuh").read_text(encoding="utf-8")


@cache
def cache_header() -> str:
    """`psigraph_cache.cuh`: a KV cache in 8 bits; behind the prefill header also what a prompt's kernels need of it."""
    return (files(__package__) / "psigraph_cache.cuh").read_text(encoding="utf-8")


@cache
def repack_header() -> str:
    """`psigraph_repack.cuh`: where the model file keeps each value."""
    return (files(__package__) / "psigraph_repack.cuh").read_text(encoding="utf-8")
