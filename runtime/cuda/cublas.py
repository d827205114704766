"""Products of halves by cuBLASLt, where the machine has it: the wheel `nvidia-cublas`, or a CUDA toolkit.

Only what a prompt's products need, through ctypes: the C interface is stable across the library's versions
(https://docs.nvidia.com/cuda/cublas, "Using the cuBLASLt API"). The library works in the driver's primary context,
which is the engine's. Choosing an algorithm may allocate, so `prepare` comes before a capture; `product` only queues.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from ...ir.errors import DeviceError, UnsupportedModelError
from ..library import Library
from .driver import Driver

WORKSPACE_BYTES = 32 << 20

# Constants of cublas_api.h, cublasLt.h and library_types.h.
_R_32F, _R_16F, _COMPUTE_32F = 0, 2, 68
_TRANSPOSE_A, _MAX_WORKSPACE = 3, 1
_TRANSPOSED = 1

_FUNCTIONS = {
    "cublasLtCreate": 1,
    "cublasLtDestroy": 1,
    "cublasLtMatmulDescCreate": 3,
    "cublasLtMatmulDescSetAttribute": 4,
    "cublasLtMatmulDescDestroy": 1,
    "cublasLtMatrixLayoutCreate": 5,
    "cublasLtMatrixLayoutDestroy": 1,
    "cublasLtMatmulPreferenceCreate": 1,
    "cublasLtMatmulPreferenceSetAttribute": 4,
    "cublasLtMatmulPreferenceDestroy": 1,
    "cublasLtMatmulAlgoGetHeuristic": 10,
    "cublasLtMatmul": 16,
}
"""Name -> number of arguments, all of which this file passes as ctypes objects."""


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass
class _Shape:
    """What is kept for a product of one shape: layouts of w, x and y, and the algorithm."""

    layouts: list[ctypes.c_void_p]
    found: _Found


class Cublas:
    """`runtime.library.Library` over cuBLASLt. DeviceError if a call fails; UnsupportedModelError for a shape without
    an algorithm."""

    def __init__(self, driver: Driver, library: Any, name: str) -> None:
        self.name = name
        self._driver, self._library = driver, library
        self._handle, self._how = ctypes.c_void_p(), ctypes.c_void_p()
        self._shapes: dict[tuple[int, int, int], _Shape] = {}
        self._workspace = 0
        try:
            self._call("cublasLtCreate", ctypes.byref(self._handle))
            self._call(
                "cublasLtMatmulDescCreate", ctypes.byref(self._how), ctypes.c_int(_COMPUTE_32F), ctypes.c_int(_R_32F)
            )
            # To the library matrices lie column by column: y.T[rows, tokens] = w.T transposed @ x.T.
            transposed = ctypes.c_int32(_TRANSPOSED)
            self._call(
                "cublasLtMatmulDescSetAttribute",
                self._how,
                ctypes.c_int(_TRANSPOSE_A),
                ctypes.byref(transposed),
                ctypes.c_size_t(4),
            )
            self._workspace = driver.allocate(WORKSPACE_BYTES, "cuBLASLt's workspace")
        except BaseException:
            self.close()
            raise

    def prepare(self, rows: int, tokens: int, columns: int) -> None:
        """Choose the algorithm of a shape."""
        if (rows, tokens, columns) in self._shapes:
            return
        layouts = [
            self._layout(_R_16F, columns, rows),
            self._layout(_R_16F, columns, tokens),
            self._layout(_R_32F, rows, tokens),
        ]
        shape = _Shape(layouts, _Found())
        self._shapes[rows, tokens, columns] = shape
        preference, count = ctypes.c_void_p(), ctypes.c_int()
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        try:
            limit = ctypes.c_uint64(WORKSPACE_BYTES)
            self._call(
                "cublasLtMatmulPreferenceSetAttribute",
                preference,
                ctypes.c_int(_MAX_WORKSPACE),
                ctypes.byref(limit),
                ctypes.c_size_t(8),
            )
            w, x, y = layouts
            self._call(
                "cublasLtMatmulAlgoGetHeuristic",
                *(self._handle, self._how, w, x, y, y, preference, ctypes.c_int(1)),
                *(ctypes.byref(shape.found), ctypes.byref(count)),
            )
        finally:
            self._library.cublasLtMatmulPreferenceDestroy(preference)
        if count.value < 1 or shape.found.state:
            raise UnsupportedModelError(
                f"cuBLASLt has no algorithm for {tokens} tokens x {rows} rows x {columns} columns"
            )

    def product(
        self, w: int, x: int, c: int, y: int, rows: int, tokens: int, columns: int, add: bool, up: int, stream: Any
    ) -> None:
        """See `runtime.library.Library`."""
        shape = self._shapes[rows, tokens, columns]
        of_w, of_x, of_y = shape.layouts
        alpha, beta = ctypes.c_float(2.0**up), ctypes.c_float(1.0 if add else 0.0)
        self._call(
            "cublasLtMatmul",
            *(self._handle, self._how, ctypes.byref(alpha)),
            *(ctypes.c_void_p(w), of_w, ctypes.c_void_p(x), of_x, ctypes.byref(beta)),
            *(ctypes.c_void_p(c), of_y, ctypes.c_void_p(y), of_y, ctypes.byref(shape.found.algorithm)),
            *(ctypes.c_void_p(self._workspace), ctypes.c_size_t(WORKSPACE_BYTES), ctypes.c_void_p(int(stream))),
        )

    def close(self) -> None:
        """Give everything back; nothing may be running."""
        for shape in self._shapes.values():
            for layout in shape.layouts:
                self._library.cublasLtMatrixLayoutDestroy(layout)
        self._shapes.clear()
        if self._how:
            self._library.cublasLtMatmulDescDestroy(self._how)
        if self._handle:
            self._library.cublasLtDestroy(self._handle)
        if self._workspace:
            self._driver.give_back("cuMemFree", self._workspace)
        self._handle, self._how, self._workspace = ctypes.c_void_p(), ctypes.c_void_p(), 0

    def _layout(self, dtype: int, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        self._call(
            "cublasLtMatrixLayoutCreate",
            *(ctypes.byref(layout), ctypes.c_int(dtype), ctypes.c_uint64(rows), ctypes.c_uint64(columns)),
            ctypes.c_int64(rows),
        )
        return layout

    def _call(self, name: str, *args: Any) -> None:
        assert len(args) == _FUNCTIONS[name], name
        self._driver.enter()
        status = int(getattr(self._library, name)(*args))
        if status:
            raise DeviceError(f"{name} of {self.name} failed with status {status}; take --prefill own")


def open_cublas(driver: Driver) -> tuple[Library | None, str]:
    """(the library, ""), or (None, why there is none): it is an extra, never a must."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cublasLt").abs_path
        library = ctypes.CDLL(path)
        for name in _FUNCTIONS:
            getattr(library, name).restype = ctypes.c_int
        library.cublasLtGetVersion.restype = ctypes.c_size_t
        version = int(library.cublasLtGetVersion())
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"cuBLASLt cannot be loaded ({what:.120}); pip install 'psigraph[library]'"
    try:
        return Cublas(driver, library, f"cuBLASLt {version}"), ""
    except DeviceError as error:
        return None, str(error)
