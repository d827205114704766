"""All kernels of a Program -> machine code, through the cache, several at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..ir.program import Program
from . import nvrtc
from .kernel_cache import KernelCache
from .nvrtc import KernelResources

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CompiledKernel:
    """A module image and its resources; `cached` tells whether the compiler ran."""

    name: str
    image: bytes
    resources: KernelResources
    cached: bool


def compile_program(
    program: Program, arch: str, cache: KernelCache, progress: Progress | None = None
) -> dict[str, CompiledKernel]:
    """Every kernel by name. arch: as NVRTC names it, or `host` for the CPU target."""
    compiler, version = _compiler(arch)
    done = 0

    def one(name: str) -> CompiledKernel:
        source = program.source(name)
        key = {
            "source": hashlib.sha256(source.encode()).hexdigest(),
            "entry": name,
            "arch": arch,
            "compiler": version,
        }
        found = cache.get(key)
        if found:
            return CompiledKernel(name, *found, cached=True)
        image, resources = compiler(source, name)
        cache.put(key, image, resources)
        return CompiledKernel(name, image, resources, cached=False)

    compiled: dict[str, CompiledKernel] = {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for kernel in pool.map(one, [kernel.name for kernel in program.kernels]):
            compiled[kernel.name] = kernel
            done += 1
            if progress:
                progress(done, len(program.kernels))
    return compiled


def _compiler(arch: str) -> tuple[Callable[[str, str], tuple[bytes, KernelResources]], str]:
    if arch == "host":
        from . import host

        def compile_for_host(source: str, name: str) -> tuple[bytes, KernelResources]:
            return host.compile_kernel(source, name), KernelResources(0, 0, 0, 0)

        return compile_for_host, host.compiler_version()
    options = " ".join(nvrtc.OPTIONS)
    return (lambda source, name: nvrtc.compile_kernel(source, name, arch)), f"nvrtc {nvrtc.nvrtc_version()} {options}"
