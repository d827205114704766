"""What an engine's work is timed by: clocks while it is made, events between the things that it queues."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..ir.program import Program
from .program import LoadedProgram
from .stream import Stream

PROBE = "read_bandwidth"
PROBE_BYTES = 8 << 30  # that one launch reads, going over the weights several times


@dataclass
class Timings:
    """Seconds of what happened before the first token, and milliseconds around it."""

    load_s: float = 0.0
    modules_s: float = 0.0
    capture_s: float = 0.0
    bytes_loaded: int = 0


def read_bandwidth(loaded: LoadedProgram, program: Program, repeats: int) -> float:
    """See `Engine.read_bandwidth`."""
    stream, memory = loaded.stream, loaded.memory
    weights = [b for b in program.buffers if b.kind == "weight"]
    start = min(memory.address(b.name) for b in weights)
    end = max(memory.address(b.name) + b.nbytes for b in weights)
    count = (end - start) // 16
    passes = 1 if program.notes["arch"] == "host" else max(1, PROBE_BYTES // (end - start))
    begin, done = stream.event(), stream.event()
    scratch = next(b.name for b in program.buffers if b.kind == "scratch")
    seconds = []
    for _ in range(repeats + 1):
        stream.call("cuEventRecord", begin, stream.handle)
        args = (
            (start, ctypes.c_void_p),
            (count, ctypes.c_ulonglong),
            (passes, ctypes.c_int),
            (memory.address(scratch), ctypes.c_void_p),
        )
        stream.driver.launch(loaded.function(PROBE), 4 * program.sm_count, 512, 0, stream.handle, args)
        stream.call("cuEventRecord", done, stream.handle)
        stream.call("cuEventSynchronize", done)
        seconds.append(float(stream.call("cuEventElapsedTime", begin, done)) / 1e3)
    return count * 16 * passes / float(np.median(seconds[1:]))


def step_times(stream: Stream, step: Callable[[], None], count: int) -> np.ndarray:
    """See `Engine.step_times`."""
    events = [stream.event() for _ in range(count + 1)]
    stream.call("cuEventRecord", events[0], stream.handle)
    for event in events[1:]:
        step()
        stream.call("cuEventRecord", event, stream.handle)
    stream.synchronize()
    return np.array([float(stream.call("cuEventElapsedTime", a, b)) * 1e3 for a, b in itertools.pairwise(events)])
