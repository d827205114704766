"""Machine code of kernels, from the kernel cache: NVRTC sees a text once, and again after a change of what calls it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from psigraph.ir.program import Program
from psigraph.runtime.cuda import nvrtc
from psigraph.runtime.cuda.compiler import CompiledKernel, compile_program
from psigraph.runtime.cuda.kernel_cache import KernelCache, default_cache_dir

# The cache's key knows the text, the architecture, the compiler and its options, but not how nvrtc.py asks it again
# for a kernel that spills.
ASKED = hashlib.sha256(Path(nvrtc.__file__).read_bytes()).hexdigest()[:12]


def machine_code(program: Program, arch: str, *names: str) -> dict[str, CompiledKernel]:
    """The kernels of these names, or all if none is given, by name."""
    kernels = tuple(kernel for kernel in program.kernels if not names or kernel.name in names)
    return compile_program(replace(program, kernels=kernels), arch, KernelCache(default_cache_dir() / f"tests-{ASKED}"))
