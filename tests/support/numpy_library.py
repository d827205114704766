"""Stands where a GPU has cuBLASLt: products in numpy, on the host target, whose device memory is this process's."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from psigraph.runtime.cuda.driver import Driver


class NumpyLibrary:
    """A `runtime.library.Library`. prepared: the shapes it was asked to get ready."""

    name = "numpy"

    def __init__(self, driver: Driver) -> None:
        self.driver, self.prepared, self.closed = driver, set[tuple[int, ...]](), False

    def prepare(self, rows: int, tokens: int, columns: int) -> None:
        self.prepared.add((rows, tokens, columns))

    def product(
        self, w: int, x: int, c: int, y: int, rows: int, tokens: int, columns: int, add: bool, up: int, stream: Any
    ) -> None:
        assert (rows, tokens, columns) in self.prepared
        self.driver.call("cuStreamSynchronize", stream)
        multiply_in_numpy(w, x, c, y, rows, tokens, columns, add, up)

    def close(self) -> None:
        self.closed = True


def multiply_in_numpy(w: int, x: int, c: int, y: int, rows: int, tokens: int, columns: int, add: bool, up: int) -> None:
    """What `runtime.library.Library.product` does, now."""

    def view(address: int, dtype: type[np.generic], *shape: int) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)

    x_rows, w_rows = view(x, np.float16, tokens, columns), view(w, np.float16, rows, columns)
    result = (x_rows.astype(np.float32) @ w_rows.astype(np.float32).T) * np.float32(2.0**up)
    view(y, np.float32, tokens, rows)[:] = result + view(c, np.float32, tokens, rows) if add else result
