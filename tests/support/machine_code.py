"""Machine code of kernels, from the kernel cache: NVRTC sees a text once, and again after a change of what calls it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from psigraph.codegen.target import TARGETS
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


def assert_gates(program: Program, arch: str) -> None:
    """What every kernel must be before it may ship: nothing spilled, and within what a block may have."""
    launches = {launch.kernel: launch for step in program.steps for launch in step.kernels}
    compiled = machine_code(program, arch)
    assert set(compiled) == {kernel.name for kernel in program.kernels}
    for name, kernel in compiled.items():
        resources = kernel.resources
        what = f"{name} for {arch}: {resources}"
        assert kernel.image[:4] == b"\x7fELF", what
        assert resources.spill_bytes == 0, what
        assert resources.stack_bytes == 0, what
        assert 0 < resources.registers <= 255, what
        if name in launches:
            launch = launches[name]
            assert resources.registers * launch.block <= 65536, f"{what}: {launch.block} threads have no registers"
            assert resources.shared_bytes + launch.shared_bytes <= TARGETS[arch].shared_bytes, what
