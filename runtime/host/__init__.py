"""What lets generated kernel texts compile and run on a CPU, without a GPU.

`compile_kernel` is the host's NVRTC, `activate` its driver. The rest is for tests: `inject` lets a driver call
fail, `calls`, `live` and `violations` tell what was done, and `check` watches one kernel (runtime/host/check.py).
"""

from .compile import allow_compilers, compile_kernel, compiler_version, stop_compilers
from .driver import activate, calls, forget, inject, is_active, live, message, set_order, violations

__all__ = [
    "activate",
    "allow_compilers",
    "calls",
    "compile_kernel",
    "compiler_version",
    "forget",
    "inject",
    "is_active",
    "live",
    "message",
    "set_order",
    "stop_compilers",
    "violations",
]
