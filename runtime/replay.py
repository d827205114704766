"""A step captured once, and tokens on their way to the host while it is replayed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .cuda.driver import Driver, HostMemory

if TYPE_CHECKING:
    from .engine import Engine

AHEAD = 3  # chunks of tokens that are under way at once


def captured(driver: Driver, stream: Any, launch_all: Callable[[], None]) -> tuple[Any, Any]:
    """What the function queues on the stream as a graph, and that graph ready for replay."""
    mode = driver.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    driver.call("cuStreamBeginCapture", stream, mode)
    try:
        launch_all()
    except BaseException:
        _, unfinished = driver.api.cuStreamEndCapture(stream)
        if unfinished:
            driver.api.cuGraphDestroy(unfinished)
        raise
    graph = driver.call("cuStreamEndCapture", stream)
    try:
        return graph, driver.call("cuGraphInstantiate", graph, 0)
    except BaseException:
        driver.api.cuGraphDestroy(graph)
        raise


@dataclass
class _Chunk:
    """Tokens on their way to the host."""

    first: int
    count: int
    event: Any
    memory: HostMemory


def replayed(engine: Engine, count: int, chunk: int) -> Iterator[list[int]]:
    """`count` tokens in chunks, the first of them chosen by the step that is queued already; see `Engine.decode`."""
    waiting: deque[_Chunk] = deque()
    spare: list[tuple[Any, HostMemory]] = []
    first = engine.position - 1  # the log entry of the first token
    queued, steps = 0, 0
    try:
        while queued < count or waiting:
            while queued < count and len(waiting) < AHEAD:
                size = min(chunk, count - queued)
                while steps < queued + size - 1:
                    engine.step()
                    steps += 1
                event, memory = spare.pop() if spare else (engine.event(), engine.pinned(chunk * 4))
                source = engine.address("log") + 4 * (first + queued)
                engine.guard("cuMemcpyDtoHAsync", memory.address, source, size * 4, engine.stream)
                engine.guard("cuEventRecord", event, engine.stream)
                waiting.append(_Chunk(queued, size, event, memory))
                queued += size
            ready = waiting.popleft()
            engine.guard("cuEventSynchronize", ready.event)
            tokens = np.frombuffer(ready.memory.view, dtype=np.int32)[: ready.count].tolist()
            spare.append((ready.event, ready.memory))
            yield tokens
    finally:
        if waiting:  # the consumer left early: nothing may write to freed memory
            engine.driver.api.cuStreamSynchronize(engine.stream)
