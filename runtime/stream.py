"""A CUDA stream with what belongs to it, and the failure after which nothing on it can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..ir.errors import DeviceError, OutOfMemoryError, UsageError
from .cuda.driver import Driver, HostMemory

CLOSED = "this engine is closed; open another"


class Stream:
    """Everything is queued on it. After a failure of `call` or `guarded`, or `give_up`, whatever follows is refused."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.failed = ""
        self._pinned: list[HostMemory] = []
        self._events: list[Any] = []
        self.handle: Any = driver.call("cuStreamCreate", 1)

    def check(self) -> None:
        """DeviceError after a failure, UsageError once it is closed."""
        if self.failed:
            raise DeviceError(f"the GPU failed earlier in this process: {self.failed}")
        if self.handle is None:
            raise UsageError(CLOSED)

    def give_up(self, error: DeviceError) -> None:
        """Refuse everything from here on."""
        self.failed = self.failed or str(error)

    def call(self, name: str, *args: Any) -> Any:
        """A driver call; a failure but that of memory leaves nothing that can be trusted."""
        return self.guarded(self.driver.call, name, *args)

    def guarded(self, function: Callable[..., Any], *args: Any) -> Any:
        """The same for a function that calls the driver."""
        self.check()
        try:
            return function(*args)
        except OutOfMemoryError:
            raise
        except DeviceError as error:
            self.give_up(error)
            raise

    def pinned(self, nbytes: int) -> HostMemory:
        """Page-locked memory until the stream is closed."""
        memory: HostMemory = self.guarded(self.driver.host_memory, nbytes)
        self._pinned.append(memory)
        return memory

    def event(self) -> Any:
        """An event until the stream is closed."""
        event = self.call("cuEventCreate", 0)
        self._events.append(event)
        return event

    def synchronize(self) -> None:
        """Wait for everything queued."""
        self.call("cuStreamSynchronize", self.handle)

    def settle(self) -> None:
        """Wait without asking how it went: for memory that is about to be freed."""
        if self.handle is not None:
            self.driver.give_back("cuStreamSynchronize", self.handle)

    def close(self) -> None:
        """Free everything; nothing may be running. A failure while freeing is not reported."""
        for event in self._events:
            self.driver.give_back("cuEventDestroy", event)
        for memory in self._pinned:
            memory.close()
        if self.handle is not None:
            self.driver.give_back("cuStreamDestroy", self.handle)
        self.handle, self._events, self._pinned = None, [], []
