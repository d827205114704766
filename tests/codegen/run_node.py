"""Runs the kernels of a small graph on the host target, without an engine or a model file.

`Step(graph, target)` lowers a graph and compiles all its kernels as one translation unit (g++ spends most of its time
on what kernels share); `run` gives every result of the graph after one step. Memory that nobody promised to be zero is
filled with NaN first, so that a kernel that reads what it should not shows it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import half_memory
import numpy as np

from psigraph.codegen.digits import BLOCK_BYTES, copy_bytes
from psigraph.codegen.lower import lower
from psigraph.codegen.packing import pack
from psigraph.codegen.target import Target
from psigraph.ir.graph import Graph
from psigraph.ir.program import LIBRARY_PRODUCT, Buffer, Launch, Program
from psigraph.ir.types import I8X2_GROUP
from psigraph.runtime import host
from psigraph.runtime.cuda.driver import Driver
from psigraph.runtime.tables import table_values

Arrays = dict[str, np.ndarray]
MOST_ARGUMENTS = 24
DTYPES = {"f32": np.float32, "i32": np.int32, "f16": np.float16}

# Calls one of several kernels, so that one image holds them all. Host only: a GPU's kernels are loaded one by one.
DISPATCH = """
template <class... A, size_t... I> static void call(void (*kernel)(A...), const u64* args, std::index_sequence<I...>) {{
    kernel((A)args[I]...);
}}
template <class... A> static void call(void (*kernel)(A...), const u64* args) {{
    call(kernel, args, std::index_sequence_for<A...>());
}}
extern "C" __global__ void many(int which, {parameters}) {{
    const u64 args[] = {{{names}}};
    switch (which) {{
{cases}
    }}
}}
"""


@functools.cache
def driver() -> Driver:
    """The stand-in driver of this process, in libcuda's place."""
    host.activate(sms=4)
    return Driver(0)


@dataclass(frozen=True)
class Digits:
    """An i8x2 vector as it lies in memory.

    high, low: int8[padded / 16, 16]; scale, bias: f32[padded / 16]. `size` values count.
    """

    size: int
    high: np.ndarray
    low: np.ndarray
    scale: np.ndarray
    bias: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """254 * high + low, float64[groups, 16]."""
        return 254.0 * self.high + self.low

    @property
    def values(self) -> np.ndarray:
        """float64[size]."""
        return (self.whole * self.scale.astype(np.float64)[:, None]).ravel()[: self.size]


def decode_digits(data: np.ndarray, size: int) -> Digits:
    """data: uint8, the whole buffer: equal copies of blocks for 256 columns (psigraph.codegen.digits)."""
    copies = data.reshape(-1, copy_bytes(size))
    assert (copies == copies[0]).all(), "the copies of a vector differ"
    blocks = copies[0].reshape(-1, BLOCK_BYTES)
    # [block][group of the chunk][digit][column / 4][chunk][column % 4] -> [block, chunk, group][digit][column]
    digits = blocks[:, :512].view(np.int8).reshape(-1, 4, 2, 4, 4, 4).transpose(0, 4, 1, 2, 3, 5)
    planes = digits.reshape(-1, 2, I8X2_GROUP)
    factors = blocks[:, 512:].copy().view(np.float32).reshape(-1, 4, 4, 2).transpose(0, 2, 1, 3).reshape(-1, 2)
    return Digits(size, planes[:, 0], planes[:, 1], factors[:, 0], factors[:, 1])


class Step:
    """A graph's kernels, compiled for the host target, and their memory.

    graph: lowered as it is (no pass runs), or program: already lowered; what a test wants to see must be among its
    results. weights: raw bytes
    (uint8) of matrices as a file has them, float32 of vectors.
    """

    def __init__(
        self,
        graph: Graph,
        target: Target,
        weights: Mapping[str, np.ndarray],
        shapes: dict[str, dict[str, int]] | None = None,
        program: Program | None = None,
    ) -> None:
        self.graph = graph
        self.program: Program = program or lower(graph, target, shapes)
        self.driver = driver()
        launched = dict.fromkeys(launch.kernel for launch in self.program.launches)
        self.names = [name for name in launched if name != LIBRARY_PRODUCT]
        image = host.compile_kernel(self._source(), "many", self.program.headers)
        shared = max((launch.shared_bytes for launch in self.program.launches), default=0)
        self.module, self.function = self.driver.load_kernel(image, "many", shared)
        self.address: dict[str, int] = {}
        for buffer in self.program.buffers:
            self.address[buffer.name] = self.driver.allocate(buffer.nbytes, buffer.name)
            if buffer.kind == "weight":
                self._write(buffer, self._packed(buffer, weights[buffer.source]))
            elif buffer.kind == "table":
                self._write(buffer, table_values(buffer))

    def close(self) -> None:
        api = self.driver.api
        api.cuCtxSynchronize()
        for address in self.address.values():
            api.cuMemFree(address)
        api.cuModuleUnload(self.module)
        self.address.clear()

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, states: Mapping[str, np.ndarray], order: str = "forward") -> dict[str, np.ndarray | Digits]:
        """Results by name after one step. states: arrays of states and constants; those not given are zero.

        A q8 cache is given and got as it lies in memory (`q8_memory`), uint8[bytes].
        """
        for buffer in self.program.buffers:
            if buffer.layout == "f16 tiles":
                self._write(buffer, half_memory.pack(states.get(buffer.name, np.zeros(buffer.shape, np.float16))))
            elif buffer.layout == "q8 tiles":
                self._write(buffer, states.get(buffer.name, np.zeros(buffer.nbytes, np.uint8)))
            elif buffer.kind in ("state", "constant"):
                given = states.get(buffer.name, np.zeros(buffer.shape))
                self._write(buffer, np.asarray(given, DTYPES[buffer.dtype]).reshape(buffer.shape))
            elif buffer.kind == "scratch":
                self.driver.call("cuMemsetD8", self.address[buffer.name], 0 if buffer.zeroed else 0xFF, buffer.nbytes)
        host.set_order(order)
        try:
            for launch in self.program.launches:
                self.launch(launch)
            self.driver.call("cuCtxSynchronize")
        finally:
            host.set_order("forward")
        assert host.violations() == []
        return {name: self._result(self.program.buffer(buffer)) for name, buffer in self.program.results}

    def launch(self, launch: Launch) -> None:
        values = [self.address[arg] if isinstance(arg, str) else arg for arg in launch.args]
        args: list[tuple[int, Any]] = [(self.names.index(launch.kernel), ctypes.c_int)]
        args += [(value, ctypes.c_uint64) for value in values + [0] * (MOST_ARGUMENTS - len(values))]
        self.driver.launch(
            self.function, launch.grid, launch.block, launch.shared_bytes, 0, args, launch.programmatic, launch.cluster
        )

    def scratch(self, name: str) -> np.ndarray:
        """The bytes of a scratch buffer."""
        return self._read(self.program.buffer(name))

    def _source(self) -> str:
        texts = [self.program.kernel(name).text for name in self.names]
        numbers = range(MOST_ARGUMENTS)
        cases = [f"        case {index}: return call(&{name}, args);" for index, name in enumerate(self.names)]
        dispatch = DISPATCH.format(
            parameters=", ".join(f"u64 a{i}" for i in numbers),
            names=", ".join(f"a{i}" for i in numbers),
            cases="\n".join(cases),
        )
        return "\n".join([*texts, dispatch])

    def _packed(self, buffer: Buffer, data: np.ndarray) -> np.ndarray:
        if buffer.layout == "tiles":
            return pack(data, buffer.dtype, *buffer.shape)
        return np.asarray(data, np.float32)

    def _write(self, buffer: Buffer, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values)
        assert data.nbytes == buffer.nbytes, (buffer, data.nbytes)
        self.driver.call("cuMemcpyHtoD", self.address[buffer.name], data.ctypes.data, data.nbytes)

    def _read(self, buffer: Buffer) -> np.ndarray:
        data = np.empty(buffer.nbytes, np.uint8)
        self.driver.call("cuMemcpyDtoH", data.ctypes.data, self.address[buffer.name], data.nbytes)
        return data

    def _result(self, buffer: Buffer) -> np.ndarray | Digits:
        data = self._read(buffer)
        if buffer.layout == "i8x2":
            return decode_digits(data, buffer.shape[0])
        if buffer.layout == "q8 tiles":
            return data
        if buffer.layout == "f16 tiles":
            return half_memory.unpack(data, *buffer.shape)
        if buffer.layout == "halves":
            padded = data.view(np.float16).reshape(buffer.shape[0], -1)
            assert not padded[:, buffer.shape[1] :].any(), "padding is not zero"
            return padded[:, : buffer.shape[1]].copy()
        return data.view(DTYPES[buffer.dtype]).reshape(buffer.shape)


def same_bits(left: np.ndarray | Digits, right: np.ndarray | Digits) -> bool:
    """Whether two results are equal to the last bit."""
    if isinstance(left, Digits):
        assert isinstance(right, Digits)
        pairs = [(left.high, right.high), (left.low, right.low), (left.scale, right.scale), (left.bias, right.bias)]
        return all(a.tobytes() == b.tobytes() for a, b in pairs)
    assert isinstance(right, np.ndarray)
    return left.tobytes() == right.tobytes()
