"""Tokens on their way to the host while steps are replayed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.errors import ModelFileError
from .cuda.driver import HostMemory
from .stream import Stream

AHEAD = 3  # chunks of tokens that are under way at once


@dataclass
class _Chunk:
    """Tokens on their way to the host."""

    first: int
    count: int
    event: Any
    memory: HostMemory


Spare = list[tuple[Any, HostMemory]]


def checked(tokens: list[int], position: int) -> Iterator[list[int]]:
    """The tokens that steps from a position on chose, as far as there was one to choose.

    ModelFileError where the logits were not finite numbers: such a step leaves -1 in the log (`ir/ops/choice.py`).
    """
    there = tokens.index(-1) if -1 in tokens else len(tokens)
    if there:
        yield tokens[:there]
    if there < len(tokens):
        raise ModelFileError(
            f"no token can be chosen at position {position + there}: from there on the logits are not finite numbers; "
            "the file's weights are damaged, or too large for the arithmetic"
        )


def replayed(
    stream: Stream, step: Callable[[], None], log: int, position: int, count: int, chunk: int, spare: Spare
) -> Iterator[list[int]]:
    """`count` tokens in chunks, the first of them chosen by the step that is queued already; see `Engine.decode`.

    step: queues one more. log: where it lies. position: of the step that chose the first token. spare: events and
    page-locked memory of chunks of this size that are not in use, kept from call to call: what the stream makes lives
    as long as it does.
    """
    waiting: deque[_Chunk] = deque()
    queued, steps = 0, 0
    try:
        while queued < count or waiting:
            while queued < count and len(waiting) < AHEAD:
                size = min(chunk, count - queued)
                while steps < queued + size - 1:
                    step()
                    steps += 1
                event, memory = spare.pop() if spare else (stream.event(), stream.pinned(chunk * 4))
                stream.call("cuMemcpyDtoHAsync", memory.address, log + 4 * (position + queued), size * 4, stream.handle)
                stream.call("cuEventRecord", event, stream.handle)
                waiting.append(_Chunk(queued, size, event, memory))
                queued += size
            ready = waiting.popleft()
            stream.call("cuEventSynchronize", ready.event)
            tokens = np.frombuffer(ready.memory.view, dtype=np.int32)[: ready.count].tolist()
            spare.append((ready.event, ready.memory))
            yield from checked(tokens, position + ready.first)
    finally:
        if waiting:  # the consumer left early: nothing may write to freed memory
            stream.settle()
            spare += [(left.event, left.memory) for left in waiting]
