"""The CPU path: the fused graph, run by the IR's own interpreter in numpy.

Slow and exact: activations are not rounded to int8, so this is what the kernels' logits are held against. It has the
face of `runtime.engine.Engine`, so that a session need not know which of the two it drives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .build import Model
from .ir.errors import OutOfMemoryError, UsageError
from .ir.graph import Graph
from .ir.interpret import Interpreter

# float64 costs twice the memory traffic of float32: right for small models, where exactness is the point.
MOST_ELEMENTS_IN_FLOAT64 = 1 << 28
_ELEMENTS_AT_ONCE = 1 << 21  # dequantized at once: numpy's temporaries are several times that

Progress = Callable[[int, int], None]


@dataclass
class NumpyTimings:
    """Seconds and bytes of what happened before the first token, named as in `runtime.measuring.Timings`."""

    load_s: float = 0.0
    modules_s: float = 0.0
    capture_s: float = 0.0
    bytes_loaded: int = 0


class NumpyEngine:
    """Runs a fused decode step in numpy.

    graph       with every weight of it in the model's file.
    end_tokens  ids that set the stop flag, at most as many as the graph's constant holds.
    dtype       float64 or float32; None: float64 for at most 2**28 weights, else float32.
    cache_dtype "f16": caches are rounded as on the device, to the type that the graph gives them, or "f32": not at all.
    progress    (bytes read, bytes in all), while weights are dequantized.
    constants   arrays for the graph's constants beside `end_tokens`, by name.

    Raises OutOfMemoryError if the dequantized weights do not fit into main memory, ModelFileError for weights that
    cannot be read or are not finite.
    """

    def __init__(
        self,
        graph: Graph,
        model: Model,
        end_tokens: Sequence[int] = (),
        dtype: type[np.floating[Any]] | None = None,
        cache_dtype: str = "f16",
        progress: Progress | None = None,
        constants: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        elements = sum(param.type.size for param in graph.params if param.kind == "weight")
        self.dtype = dtype or (np.float64 if elements <= MOST_ELEMENTS_IN_FLOAT64 else np.float32)
        _require_memory(elements * np.dtype(self.dtype).itemsize)
        self.graph = graph
        self.context = graph.param("log").type.shape[1]
        self.has_logits = any(name == "logits" for name, _ in graph.results)
        self.position = 0
        self.timings = NumpyTimings()
        self._machine = Interpreter(self.dtype, cache_dtype, exact_activations=True, in_place_cache=True)
        self._end_tokens = list(end_tokens)
        self._logits: np.ndarray | None = None
        started = time.perf_counter()
        self._weights = self._load(model, progress)
        self.timings.load_s = time.perf_counter() - started
        self._state = self._machine.initial_state(graph)
        for name, values in (constants or {}).items():
            self.set_constant(name, values)
        self.reset()

    def _load(self, model: Model, progress: Progress | None) -> dict[str, np.ndarray]:
        names = [param.name for param in self.graph.params if param.kind == "weight"]
        total = sum(model.place(name)[1] for name in names)

        def one(name: str) -> tuple[str, np.ndarray]:
            return name, dequantized(model, name, self.dtype)

        weights: dict[str, np.ndarray] = {}
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            for name, array in pool.map(one, names):
                weights[name] = array
                self.timings.bytes_loaded += model.place(name)[1]
                if progress:
                    progress(self.timings.bytes_loaded, total)
        return weights

    chunked = False
    prefill_way = "token by token: numpy"

    def reset(self) -> None:
        """Back to position 0; the cache's old contents are never read again."""
        for name in ("tokens", "positions", "stop"):
            self._state[name] = np.zeros(1, np.int32)
        slots = self._state["end_tokens"]
        if len(self._end_tokens) > len(slots):
            raise UsageError(f"{len(self._end_tokens)} end tokens; at most {len(slots)} are supported")
        slots[: len(self._end_tokens)] = self._end_tokens
        self.position = 0

    def rewind(self, position: int) -> None:
        """Back to an earlier position: what the caches hold before it stays. Go on with `feed`.

        UsageError for a position that was not reached.
        """
        if not 0 <= position <= self.position:
            raise UsageError(f"position {position} was not reached; positions are 0 to {self.position}")
        self.reset()
        self._state["positions"] = np.array([position], np.int32)
        self.position = position

    def set_constant(self, name: str, values: np.ndarray) -> None:
        """New contents of a constant, from the next step on; UsageError for a name that is none, or another shape."""
        param = next((param for param in self.graph.params if param.kind == "constant" and param.name == name), None)
        if param is None or values.shape != param.type.shape:
            raise UsageError(f"the graph {self.graph.name} has no constant {name} of shape {list(values.shape)}")
        self._state[name] = values

    def step(self) -> None:
        """One decode step."""
        if self.position >= self.context:
            raise UsageError(f"the context of {self.context} tokens is full; give a larger --ctx")
        with np.errstate(all="ignore"):  # what is no number is told of by the choice, once, and not by numpy
            known = self._machine.run(self.graph, {**self._weights, **self._state})
        results = self._machine.results(self.graph, known)
        self._logits = results.pop("logits", None)
        self._state.update(results)
        self.position += 1

    def feed(self, ids: Sequence[int], on_step: Callable[[int], None] | None = None) -> None:
        """One step for each id; the last step's choice is the first generated token."""
        if self.position + len(ids) > self.context:
            raise UsageError(
                f"{len(ids)} tokens from position {self.position} exceed the context of {self.context}; "
                "give a larger --ctx"
            )
        for index, token in enumerate(ids):
            self._state["tokens"] = np.array([token], np.int32)
            self.step()
            if on_step:
                on_step(index)

    def synchronize(self) -> None:
        """Nothing is ever queued here."""

    def chosen(self) -> int:
        """The token that the last step chose."""
        return int(self._state["tokens"][0])

    def logits(self) -> np.ndarray:
        """Logits of the last step, float[vocabulary] of this engine's dtype."""
        if self._logits is None:
            raise UsageError("this engine was built without logits")
        return np.asarray(self._logits[0])

    def forced_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of `ids`, float[len(ids), vocabulary], the ids given, not chosen."""
        rows: list[np.ndarray] = []
        self.feed(ids, lambda _: rows.append(self.logits()))
        return np.stack(rows)

    def decode(self, count: int, chunk: int = 1) -> Iterator[list[int]]:
        """`count` tokens in chunks, the first of them chosen by the last step of `feed`."""
        if self.position + count - 1 > self.context:
            raise UsageError(
                f"{count} tokens after {self.position} exceed the context of {self.context}; give a larger --ctx"
            )
        for first in range(0, count, chunk):
            tokens = []
            for index in range(first, min(first + chunk, count)):
                if index:
                    self.step()
                tokens.append(self.chosen())
            yield tokens

    def step_times(self, count: int) -> np.ndarray:
        """Microseconds of `count` further steps; float64[count]."""
        times = np.empty(count)
        for index in range(count):
            started = time.perf_counter()
            self.step()
            times[index] = (time.perf_counter() - started) * 1e6
        return times

    def close(self) -> None:
        """Let the weights and caches go."""
        self._weights, self._state = {}, {}


def dequantized(model: Model, name: str, dtype: type[np.floating[Any]]) -> np.ndarray:
    """A tensor of a model file as floats, row-major in the tensor's shape.

    The float32 values of the `gguf` package, widened: what kernels and references start from.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    info = model.binding.tensors[name]
    kind = GGMLQuantizationType[info.dtype.upper()]
    raw = model.file.read(name)[: model.place(name)[1]]
    rows = raw.reshape(info.shape[0] if len(info.shape) > 1 else 1, -1)
    columns = info.shape[-1]
    out = np.empty((len(rows), columns), dtype)
    step = max(1, _ELEMENTS_AT_ONCE // columns)
    for first in range(0, len(rows), step):
        out[first : first + step] = dequantize(rows[first : first + step], kind)
    return out.reshape(info.shape)


def _require_memory(nbytes: int) -> None:
    free = _available_memory()
    if free is not None and nbytes > 0.9 * free:
        raise OutOfMemoryError(
            f"in numpy this model needs {nbytes / 2**30:.1f} GiB of main memory and {free / 2**30:.1f} GiB are "
            "available; take a smaller model, or a GPU (--backend cuda)"
        )


def _available_memory() -> int | None:
    """Bytes that can be had without swapping, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None
