"""A stream refuses everything after a failure, and gives back what belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from psigraph.ir.errors import DeviceError, OutOfMemoryError, UsageError
from psigraph.runtime import host
from psigraph.runtime.stream import Stream

OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700
USES: dict[str, Callable[[Stream], Any]] = {
    "check": lambda stream: stream.check(),
    "call": lambda stream: stream.call("cuCtxSynchronize"),
    "guarded": lambda stream: stream.guarded(lambda: None),
    "pinned": lambda stream: stream.pinned(4),
    "event": lambda stream: stream.event(),
    "synchronize": lambda stream: stream.synchronize(),
}


@pytest.mark.parametrize("use", USES)
def test_after_a_failure_everything_is_refused_and_the_driver_not_asked(use: str, stream: Stream) -> None:
    host.inject(1, ILLEGAL_ADDRESS)
    with pytest.raises(DeviceError, match="cuStreamSynchronize failed"):
        stream.synchronize()
    assert "cuStreamSynchronize failed" in stream.failed
    host.forget()
    with pytest.raises(DeviceError, match="the GPU failed earlier in this process: cuStreamSynchronize failed"):
        USES[use](stream)
    assert host.calls() == []


def test_the_first_failure_is_the_one_that_is_told(stream: Stream) -> None:
    stream.give_up(DeviceError("the first"))
    stream.give_up(DeviceError("the second"))
    with pytest.raises(DeviceError, match=r"process: the first$"):
        stream.check()


def test_memory_that_is_short_is_no_failure(stream: Stream) -> None:
    host.inject(1, OUT_OF_MEMORY)
    with pytest.raises(OutOfMemoryError):
        stream.pinned(4)
    assert not stream.failed
    stream.pinned(4).view[:] = b"abcd"


@pytest.mark.parametrize("use", USES)
def test_a_closed_stream_says_so(use: str, stream: Stream) -> None:
    stream.event()
    stream.pinned(4)
    stream.close()
    with pytest.raises(UsageError, match="this engine is closed"):
        USES[use](stream)
    stream.settle()
    stream.close()
