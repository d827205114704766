"""What an engine's work is timed by: clocks while it is made, events between the things that it queues."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .engine import Engine

PROBE = "read_bandwidth"
PROBE_BYTES = 8 << 30  # that one launch reads, going over the weights several times


@dataclass
class Timings:
    """Seconds of what happened before the first token, and milliseconds around it."""

    load_s: float = 0.0
    modules_s: float = 0.0
    capture_s: float = 0.0
    bytes_loaded: int = 0


def read_bandwidth(engine: Engine, probe: Any, repeats: int) -> float:
    """See `Engine.read_bandwidth`. probe: the kernel's function."""
    program = engine.program
    weights = [b for b in program.buffers if b.kind == "weight"]
    start = min(engine.address(b.name) for b in weights)
    end = max(engine.address(b.name) + b.nbytes for b in weights)
    count = (end - start) // 16
    passes = 1 if program.notes["arch"] == "host" else max(1, PROBE_BYTES // (end - start))
    begin, done = engine.event(), engine.event()
    seconds = []
    for _ in range(repeats + 1):
        engine.guard("cuEventRecord", begin, engine.stream)
        args = (
            (start, ctypes.c_void_p),
            (count, ctypes.c_ulonglong),
            (passes, ctypes.c_int),
            (engine.address(program.buffers[-1].name), ctypes.c_void_p),
        )
        engine.driver.launch(probe, 4 * program.sm_count, 512, 0, engine.stream, args)
        engine.guard("cuEventRecord", done, engine.stream)
        engine.guard("cuEventSynchronize", done)
        seconds.append(float(engine.guard("cuEventElapsedTime", begin, done)) / 1e3)
    return count * 16 * passes / float(np.median(seconds[1:]))


def step_times(engine: Engine, count: int) -> np.ndarray:
    """See `Engine.step_times`."""
    events = [engine.event() for _ in range(count + 1)]
    engine.guard("cuEventRecord", events[0], engine.stream)
    for event in events[1:]:
        engine.step()
        engine.guard("cuEventRecord", event, engine.stream)
    engine.synchronize()
    return np.array([float(engine.guard("cuEventElapsedTime", a, b)) * 1e3 for a, b in itertools.pairwise(events)])
