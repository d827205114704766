"""Runs the kernels of a small graph on the host target, without an engine or a model file.

`Step(graph, target)` lowers a graph and compiles all its kernels as one translation unit (g++ spends most of its time
on what kernels share); `run` gives every result of the graph after one step, as the IR says it. Memory that nobody
promised to be zero is filled with NaN first, so that a kernel that reads what it should not shows it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import half_memory
import numpy as np
from one_image import ENTRY, MOST_ARGUMENTS, one_image
from packing import pack
from prefill_graphs import multiply_in_numpy

from psigraph.codegen.activation_block import BLOCK_BYTES, copy_bytes
from psigraph.codegen.emit.rows import SWIGLU_UP
from psigraph.codegen.lower import lower
from psigraph.codegen.target import Target
from psigraph.ir.graph import Graph, Node, Value
from psigraph.ir.program import DECODE, PREFILL, Buffer, Launch, LibraryProduct, Program
from psigraph.ir.regime import Regime
from psigraph.ir.types import I8X2_GROUP
from psigraph.runtime import host
from psigraph.runtime.cuda.driver import Driver
from psigraph.runtime.tables import table_values

Arrays = dict[str, np.ndarray]
DTYPES = {"f32": np.float32, "i32": np.int32, "f16": np.float16}


@functools.cache
def driver() -> Driver:
    """The stand-in driver of this process, in libcuda's place."""
    host.activate(sms=4)
    return Driver(0)


@dataclass(frozen=True)
class ActivationBlock:
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


def decode_digits(data: np.ndarray, size: int) -> ActivationBlock:
    """data: uint8, the whole buffer: equal copies of blocks for 256 columns (psigraph.codegen.activation_block)."""
    copies = data.reshape(-1, copy_bytes(size))
    assert (copies == copies[0]).all(), "the copies of a vector differ"
    blocks = copies[0].reshape(-1, BLOCK_BYTES)
    # [block][group of the chunk][digit][column / 4][chunk][column % 4] -> [block, chunk, group][digit][column]
    digits = blocks[:, :512].view(np.int8).reshape(-1, 4, 2, 4, 4, 4).transpose(0, 4, 1, 2, 3, 5)
    planes = digits.reshape(-1, 2, I8X2_GROUP)
    factors = blocks[:, 512:].copy().view(np.float32).reshape(-1, 4, 4, 2).transpose(0, 2, 1, 3).reshape(-1, 2)
    return ActivationBlock(size, planes[:, 0], planes[:, 1], factors[:, 0], factors[:, 1])


class Step:
    """A graph's kernels, compiled for the host target, and their memory.

    graph: lowered as it is (no pass runs), or program: already lowered; what a test wants to see must be among its
    results. weights: raw bytes (uint8) of matrices as a file has them, float32 of vectors.
    regime: for how many rows; those of a prompt are lowered as the step of that name. library: products in numpy, where
    a GPU has cuBLASLt.
    """

    def __init__(
        self,
        graph: Graph,
        target: Target,
        weights: Mapping[str, np.ndarray],
        shapes: dict[str, dict[str, int]] | None = None,
        program: Program | None = None,
        regime: Regime = Regime.STEP,
        library: bool = False,
    ) -> None:
        name = PREFILL if regime is Regime.MANY else DECODE
        self.graph = graph
        self.program = program or lower(graph, target, shapes, regime=regime, name=name, library=library)
        (self.step,) = self.program.steps
        self.driver = driver()
        self.names = list(dict.fromkeys(launch.kernel for launch in self.step.kernels))
        source = one_image([self.program.kernel(name) for name in self.names])
        image = host.compile_kernel(source, ENTRY, self.program.headers)
        shared = max((launch.shared_bytes for launch in self.step.kernels), default=0)
        self.module, self.function = self.driver.load_kernel(image, ENTRY, shared)
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

    def run(self, states: Mapping[str, np.ndarray], order: str = "forward") -> dict[str, np.ndarray | ActivationBlock]:
        """Results by name after one step.

        states: arrays of states, constants and inputs by the graph's names; those not given are zero, and `count`, how
        many of the rows there are, is all of them. A q8 cache is given and got as it lies in memory (`q8_memory`),
        uint8[bytes].
        """
        states = {"count": np.array([self.step.rows]), **states}
        for buffer in self.program.buffers:
            name = buffer.name.removeprefix(f"{self.step.name}.")
            if buffer.layout == "f16 tiles":
                halves = states.get(name, np.zeros(buffer.shape)).reshape(-1, *buffer.shape[-2:])
                self._write(buffer, half_memory.pack(halves))
            elif buffer.layout == "q8 tiles":
                self._write(buffer, states.get(name, np.zeros(buffer.nbytes, np.uint8)))
            elif buffer.kind in ("state", "constant", "input"):
                given = states.get(name, np.zeros(buffer.shape))
                self._write(buffer, np.asarray(given, DTYPES[buffer.dtype]).reshape(buffer.shape))
            elif buffer.kind == "scratch":
                self.driver.call("cuMemsetD8", self.address[buffer.name], 0 if buffer.zeroed else 0xFF, buffer.nbytes)
        host.set_order(order)
        try:
            for launch in self.step.launches:
                self.launch(launch)
            self.driver.call("cuCtxSynchronize")
        finally:
            host.set_order("forward")
        assert host.violations() == []
        values = dict(self.graph.results)
        return {name: self._result(values[name], self.program.buffer(where)) for name, where in self.step.results}

    def launch(self, launch: Launch | LibraryProduct) -> None:
        if isinstance(launch, LibraryProduct):
            self.driver.call("cuCtxSynchronize")
            at = (self.address[name] for name in (launch.w, launch.x, launch.c, launch.y))
            multiply_in_numpy(*at, launch.rows, launch.tokens, launch.columns, launch.add, launch.up)
            return
        values = [self.address[arg] if isinstance(arg, str) else arg for arg in launch.args]
        args: list[tuple[int, Any]] = [(self.names.index(launch.kernel), ctypes.c_int)]
        args += [(value, ctypes.c_uint64) for value in values + [0] * (MOST_ARGUMENTS - len(values))]
        self.driver.launch(
            self.function, launch.grid, launch.block, launch.shared_bytes, 0, args, launch.programmatic, launch.cluster
        )

    def scratch(self, name: str) -> np.ndarray:
        """The bytes of a scratch buffer."""
        return self._read(self.program.buffer(name))

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

    def _result(self, value: Value, buffer: Buffer) -> np.ndarray | ActivationBlock:
        data, shape = self._read(buffer), value.type.shape
        if buffer.layout == "i8x2":
            return decode_digits(data, value.type.size)
        if buffer.layout == "q8 tiles":
            return data
        if buffer.layout == "f16 tiles":
            return half_memory.unpack(data, shape[0] * shape[1], *shape[2:]).reshape(shape)
        array = data.view(DTYPES[buffer.dtype])
        node = self.graph.producers().get(value.name)
        if buffer.layout == "square_sums":
            return finished_factor(node, array)
        if buffer.kind != "scratch":
            return array.reshape(shape)
        table = array.reshape(self.step.rows, -1)
        width, first = value.type.size // self.step.rows, 0
        if buffer.layout == "plain" and table.shape[1] > width:
            # Results of a node over many rows lie side by side in one row.
            assert node is not None
            before = node.outs[: node.outs.index(value)]
            first = sum(out.type.size for out in before) // self.step.rows
        if buffer.layout == "halves":
            assert not table[:, width:].any(), "padding is not zero"
        found = table[:, first : first + width].reshape(shape)
        if buffer.layout == "halves" and node is not None and node.op.endswith("swiglu"):
            return found.astype(np.float32) * 2**SWIGLU_UP
        return found.copy()


def finished_factor(node: Node | None, squares: np.ndarray) -> np.ndarray:
    """The RMS factor float64[1, 1] of which partial sums of squares lie in memory."""
    assert node is not None
    size = (node.ins if node.op == "rms_factor" else node.outs)[0].type.size
    return np.array([[1 / np.sqrt(squares.astype(np.float64).sum() / size + node.attr("eps"))]])


def same_bits(left: np.ndarray | ActivationBlock, right: np.ndarray | ActivationBlock) -> bool:
    """Whether two results are equal to the last bit."""
    if isinstance(left, ActivationBlock):
        assert isinstance(right, ActivationBlock)
        pairs = [(left.high, right.high), (left.low, right.low), (left.scale, right.scale), (left.bias, right.bias)]
        return all(a.tobytes() == b.tobytes() for a, b in pairs)
    assert isinstance(right, np.ndarray)
    return left.tobytes() == right.tobytes()
