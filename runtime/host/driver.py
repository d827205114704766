"""The stand-in driver: putting it in libcuda's place, and what tests ask of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

from ...ir.errors import DeviceError
from .compile import HERE, build_library
from .variables import ORDERS, check_variables

SONAME = "libcuda.so.1"
LIVE = (
    "device memory",
    "host memory",
    "modules",
    "streams",
    "events",
    "graphs",
    "executable graphs",
    "primary context",
)

_library: ctypes.CDLL | None = None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, result, arguments in (
        ("configure", None, [ctypes.c_int, ctypes.c_ulonglong]),
        ("inject", None, [ctypes.c_long, ctypes.c_int]),
        ("call_count", ctypes.c_long, []),
        ("call", ctypes.c_char_p, [ctypes.c_long]),
        ("order", None, [ctypes.c_int]),
        ("live", ctypes.c_long, [ctypes.c_int]),
        ("violation_count", ctypes.c_long, []),
        ("violation", ctypes.c_char_p, [ctypes.c_long]),
        ("message", ctypes.c_char_p, []),
        ("forget", None, []),
        ("marker", ctypes.c_char_p, []),
    ):
        function = getattr(library, f"psigraph_host_{name}")
        function.restype = result
        function.argtypes = arguments
    return library


def _loaded_driver() -> str | None:
    """Path of a libcuda that this process has loaded already, or None."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            path = line.split(maxsplit=5)[-1]
            if os.path.basename(path).startswith("libcuda.so"):
                return path
    return None


def build() -> Path:
    """Compile the stand-in driver, if the cache has none; path of its libcuda.so.1. CompileError, DeviceError."""
    options = ("-shared", "-fvisibility=hidden", f"-Wl,-soname,{SONAME}")
    return build_library(HERE / "libcuda.cpp", SONAME, options)


def activate(sms: int | None = None, memory_bytes: int | None = None) -> None:
    """Put the stand-in driver in libcuda's place for this process; a second call only changes the figures.

    sms: multiprocessors it reports (4 unless PSIGRAPH_HOST_SMS says otherwise). memory_bytes: device memory
    it lends (64 GiB unless PSIGRAPH_HOST_MEMORY says otherwise).

    It works because the loader knows a library by its soname: when cuda.bindings asks for libcuda.so.1, it
    finds ours loaded. So this comes before the first driver call of the process; DeviceError if another
    driver is loaded already, or without g++; UsageError for a variable of the environment that means nothing.
    """
    global _library
    check_variables()
    if _library is None:
        found = _loaded_driver()
        path = build()
        if found is not None and not os.path.samefile(found, path):
            raise DeviceError(
                f"the host target cannot replace a driver that is already loaded ({found}); start a new process"
            )
        if sys.platform != "linux":
            raise DeviceError("the host target needs Linux")
        try:
            _library = _declare(ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_GLOBAL))
        except OSError as error:
            raise DeviceError(
                f"the host target's driver cannot be loaded ({error}); "
                "set PSIGRAPH_HOST_CACHE to a folder that allows execution"
            ) from error
    _library.psigraph_host_configure(sms or 0, memory_bytes or 0)


def is_active() -> bool:
    """Whether this process runs on the stand-in driver."""
    return _library is not None


def _driver() -> ctypes.CDLL:
    if _library is None:
        raise DeviceError("the host target is not active in this process; call psigraph.runtime.host.activate() first")
    return _library


def inject(nth: int, code: int) -> None:
    """Let the nth driver call from now on (1: the next) fail once with this CUresult; nth 0: none. Empties the log.

    Codes that poison a context on a GPU (700, 719, ...) do so here: every later call gives them too.
    """
    _driver().psigraph_host_inject(nth, code)


def calls() -> list[str]:
    """Names of the driver calls since the last `inject` or `forget` (the first million), in order."""
    library = _driver()
    return [library.psigraph_host_call(index).decode() for index in range(library.psigraph_host_call_count())]


def live() -> dict[str, int]:
    """How many objects of each kind the process has not given back (keys: LIVE)."""
    library = _driver()
    return {name: library.psigraph_host_live(index) for index, name in enumerate(LIVE)}


def violations() -> list[str]:
    """What a real driver would not have forgiven: writes past an allocation, a graph destroyed in flight."""
    library = _driver()
    return [library.psigraph_host_violation(index).decode() for index in range(library.psigraph_host_violation_count())]


def message() -> str:
    """Why the last kernel failed ("kernel: kind: what happened"), or ""."""
    return bytes(_driver().psigraph_host_message()).decode(errors="replace")


def forget() -> None:
    """Forget errors, log and violations; objects stay. For the next test of one process."""
    _driver().psigraph_host_forget()


def set_order(order: str) -> None:
    """In which order threads and blocks run: `forward`, `reverse` or `shuffle`. Correct kernels do not show it."""
    _driver().psigraph_host_order(ORDERS.index(order))
