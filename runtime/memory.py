"""Where a Program's buffers lie on the device, and what is in them before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..ir.errors import UsageError
from ..ir.program import Buffer
from .cuda.driver import HostMemory
from .stream import Stream
from .tables import table_values

ALIGNMENT = 256
ELEMENTS = {"i32": np.int32, "f32": np.float32, "f16": np.float16}


class Memory:
    """Buffers by name, placed once and kept until `close`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffers: dict[str, Buffer] = {}
        self._address: dict[str, int] = {}
        self._arenas: dict[int, dict[str, tuple[Buffer, int] | None]] = {}  # -> names, and where they lay before
        self._staged: dict[str, tuple[HostMemory, Any]] = {}
        self.nbytes = 0

    def address(self, name: str) -> int:
        """Where a buffer lies."""
        return self._address[name]

    def buffer(self, name: str) -> Buffer:
        return self._buffers[name]

    def place(self, buffers: Iterable[Buffer], what: str) -> int | None:
        """Device memory for those that have none yet, zeroed or filled from their table; an arena for `give_back`, None
        if all had a place.

        what: for whom, if memory is short. UsageError if a buffer that holds something is there in another form;
        scratch memory may change. Whatever fails, all lies where it lay before.
        """
        new, offset = [], 0
        for buffer in buffers:
            known = self._buffers.get(buffer.name)
            if known == buffer:
                continue
            if known is not None and buffer.kind != "scratch":
                raise UsageError(f"the other program keeps {buffer.name} differently; open a new engine")
            new.append((buffer, offset))
            offset += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
        if not new:
            return None
        driver, stream = self._stream.driver, self._stream.handle
        arena = driver.allocate(offset, what)
        self._arenas[arena] = {}
        self.nbytes += offset
        for buffer, at in new:
            old = self._buffers.get(buffer.name)
            self._arenas[arena][buffer.name] = None if old is None else (old, self._address[buffer.name])
            self._buffers[buffer.name], self._address[buffer.name] = buffer, arena + at
        try:
            for buffer, at in new:
                if buffer.zeroed or buffer.kind in ("scratch", "input"):
                    driver.call("cuMemsetD8Async", arena + at, 0, buffer.nbytes, stream)
            driver.call("cuStreamSynchronize", stream)
            for buffer, _ in new:
                if buffer.kind == "table":
                    self.write(buffer.name, table_values(buffer))
        except BaseException:
            self.give_back(arena)
            raise
        return arena

    def give_back(self, arena: int) -> None:
        """Free an arena that nothing uses; its buffers lie where they lay before it, if anywhere."""
        for name, before in self._arenas.pop(arena).items():
            self.nbytes -= -(-self._buffers[name].nbytes // ALIGNMENT) * ALIGNMENT
            del self._buffers[name], self._address[name]
            if before is not None:
                self._buffers[name], self._address[name] = before
        self._stream.driver.give_back("cuMemFree", arena)

    def write(self, name: str, values: np.ndarray) -> None:
        """Fill a buffer now; nothing queued may read it."""
        data = np.ascontiguousarray(values)
        self._stream.call("cuMemcpyHtoD", self._address[name], data.ctypes.data, data.nbytes)

    def read(self, name: str) -> np.ndarray:
        """The bytes of a buffer, uint8; waits for everything queued."""
        out = np.empty(self._buffers[name].nbytes, np.uint8)
        self._stream.synchronize()
        self._stream.call("cuMemcpyDtoH", out.ctypes.data, self._address[name], out.nbytes)
        return out

    def clear(self, name: str) -> None:
        """Zero a buffer, in order with the steps."""
        nbytes = self._buffers[name].nbytes
        self._stream.call("cuMemsetD8Async", self._address[name], 0, nbytes, self._stream.handle)

    def set_constant(self, name: str, values: np.ndarray) -> None:
        """Queue new contents of a constant: steps queued before this see the old ones, later steps the new.

        UsageError for a name that is no constant, another shape or another element type.
        """
        constants = {buffer.source: buffer for buffer in self._buffers.values() if buffer.kind == "constant"}
        if name not in constants:
            raise UsageError(f"there is no constant {name}; there are {', '.join(constants)}")
        buffer, data = constants[name], np.ascontiguousarray(values)
        wanted = np.dtype(ELEMENTS[buffer.dtype])
        if data.shape != buffer.shape or data.dtype != wanted:
            raise UsageError(f"the constant {name} is {wanted}{list(buffer.shape)}, not {data.dtype}{list(data.shape)}")
        stream = self._stream
        if name not in self._staged:
            self._staged[name] = (stream.pinned(buffer.nbytes), stream.event())
        memory, copied = self._staged[name]
        stream.call("cuEventSynchronize", copied)  # the copy of the contents before may still be under way
        memory.view[:] = data.tobytes()
        stream.call("cuMemcpyHtoDAsync", self._address[buffer.name], memory.address, buffer.nbytes, stream.handle)
        stream.call("cuEventRecord", copied, stream.handle)

    def close(self) -> None:
        """Free everything; nothing may be running."""
        for arena in self._arenas:
            self._stream.driver.give_back("cuMemFree", arena)
        self._arenas, self._buffers, self._address = {}, {}, {}
