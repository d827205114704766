"""All kernels of a Program -> machine code, through the cache, several at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import MappingProxyType

from ...ir.program import Program
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
    program: Program,
    arch: str,
    cache: KernelCache,
    progress: Progress | None = None,
    known: Mapping[str, CompiledKernel] = MappingProxyType({}),
) -> dict[str, CompiledKernel]:
    """Every kernel by name. arch: as NVRTC names it, or `host` for the CPU target. known: kernels of the program that
    are compiled already."""
    compiler, version, stop = _compiler(program, arch)
    headers = hashlib.sha256(json.dumps(dict(program.headers), sort_keys=True).encode()).hexdigest()

    def one(name: str) -> CompiledKernel:
        source = program.kernel(name).text
        key = {
            "source": hashlib.sha256(source.encode()).hexdigest(),
            "headers": headers,
            "defines": " ".join(program.defines),
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

    compiled = dict(known)
    futures: list[Future[CompiledKernel]] = []
    if progress:  # g++ takes seconds for the first one
        progress(len(compiled), len(program.kernels))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        try:
            futures.extend(pool.submit(one, kernel.name) for kernel in program.kernels if kernel.name not in known)
            for future in futures:
                # In short waits: a Ctrl-C whose signal another thread took is only seen by a main thread that wakes up.
                while not future.done():
                    wait((future,), timeout=0.1)
                kernel = future.result()
                compiled[kernel.name] = kernel
                if progress:
                    progress(len(compiled), len(program.kernels))
        except BaseException:  # Ctrl-C must not wait for compilers, which the pool does
            stop()  # also what a thread is about to start: Ctrl-C may have come before its future was in the list
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                stop()
                wait(futures, timeout=0.02)
            raise
    return compiled


def _compiler(
    program: Program, arch: str
) -> tuple[Callable[[str, str], tuple[bytes, KernelResources]], str, Callable[[], None]]:
    """(compile, version, stop what is under way)."""
    if arch == "host":
        from .. import host

        def compile_for_host(source: str, name: str) -> tuple[bytes, KernelResources]:
            image = host.compile_kernel(source, name, program.headers, program.defines)
            return image, KernelResources(0, 0, 0, 0)

        host.allow_compilers()
        return compile_for_host, host.compiler_version(), host.stop_compilers
    options = " ".join(nvrtc.OPTIONS)
    version = f"nvrtc {nvrtc.nvrtc_version()} {options}"  # a kernel takes it a quarter of a second: nothing to stop
    return (
        lambda source, name: nvrtc.compile_kernel(source, program.headers, name, arch, program.defines),
        version,
        lambda: None,
    )
