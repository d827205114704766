"""A Program on the device: whatever fails while one is loaded, what was there before stays and runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from nano import write_nano

from psigraph.build import build_program, open_model, with_prefill
from psigraph.codegen.lower import PREFILL_ROWS
from psigraph.codegen.target import target_for
from psigraph.ir.errors import DeviceError, OutOfMemoryError, UsageError
from psigraph.ir.program import DECODE, PREFILL, Program
from psigraph.runtime import host
from psigraph.runtime.cuda.compiler import CompiledKernel, compile_program
from psigraph.runtime.cuda.kernel_cache import KernelCache
from psigraph.runtime.program import LoadedProgram
from psigraph.runtime.stream import Stream
from psigraph.runtime.upload import upload_weights

OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700
TARGET = target_for("host", 4)


@dataclass(frozen=True)
class Made:
    """The step of a token of a model of one layer, and the same with a prompt's beside it."""

    path: Path
    decode: Program
    both: Program
    compiled: Mapping[str, CompiledKernel]

    @property
    def decode_kernels(self) -> dict[str, CompiledKernel]:
        return {kernel.name: self.compiled[kernel.name] for kernel in self.decode.kernels}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = write_nano(tmp_path_factory.mktemp("nano"))
    with open_model(path) as model:
        decode = build_program(model, TARGET)
        both = with_prefill(decode, model.graph((), False, PREFILL_ROWS), TARGET)
    shown: list[tuple[int, int]] = []
    compiled = compile_program(both, "host", KernelCache(None), lambda done, total: shown.append((done, total)))
    # Before the first kernel too, which takes g++ seconds.
    assert shown == [(done, len(both.kernels)) for done in range(len(both.kernels) + 1)]
    return Made(path, decode, both, compiled)


@pytest.fixture(params=[True, False], ids=["replayed", "launched"])
def loaded(request: pytest.FixtureRequest, made: Made, stream: Stream) -> Iterator[LoadedProgram]:
    """With the decode step alone, ready to run."""
    found = LoadedProgram(stream, graph=request.param)
    found.load(made.decode, made.decode_kernels, "the step")
    found.memory.set_constant("end_tokens", np.full(8, -1, np.int32))
    with open_model(made.path) as model:
        upload_weights(found, made.decode, model, None)
    found.capture(DECODE)
    yield found
    stream.settle()
    found.close()


def tokens(loaded: LoadedProgram) -> list[int]:
    """What four steps from position 0 on choose."""
    for state in ("tokens", "positions", "stop"):
        loaded.memory.clear(state)
    for _ in range(4):
        loaded.run(DECODE)
    return loaded.memory.read("log").view(np.int32)[:4].tolist()


def test_a_second_step_comes_beside_the_first(loaded: LoadedProgram, made: Made) -> None:
    want, where = tokens(loaded), {buffer.name: loaded.memory.address(buffer.name) for buffer in made.decode.buffers}
    functions = loaded.functions
    loaded.load(made.both, made.compiled, "both")
    loaded.capture(PREFILL)
    assert {name: loaded.memory.address(name) for name in where} == where
    assert {name: loaded.functions[name] for name in functions} == functions, "what is loaded is not loaded again"
    assert tokens(loaded) == want
    loaded.run(PREFILL)
    loaded.stream.synchronize()
    loaded.forget(PREFILL)
    loaded.load(made.decode, made.decode_kernels, "")
    assert set(loaded.functions) == set(functions)
    assert tokens(loaded) == want


@pytest.mark.parametrize("code", [OUT_OF_MEMORY, ILLEGAL_ADDRESS])
def test_a_load_that_fails_leaves_what_was_there(code: int, loaded: LoadedProgram, made: Made) -> None:
    """Every driver call of it fails once."""
    want, functions, nbytes, objects = tokens(loaded), loaded.functions, loaded.memory.nbytes, host.live()
    kinds: set[type[DeviceError]] = set()
    for nth in range(1, 1000):
        host.inject(nth, code)
        try:
            loaded.load(made.both, made.compiled, "both")
        except DeviceError as error:
            kinds.add(type(error))
            host.forget()
            loaded.stream.failed = ""  # here the error is gone for good, which nobody else may trust
        else:
            break
        assert loaded.program == made.decode
        assert (loaded.functions, loaded.memory.nbytes, host.live()) == (functions, nbytes, objects)
    host.forget()
    assert kinds == {OutOfMemoryError if code == OUT_OF_MEMORY else DeviceError}
    assert nth > len(made.both.kernels) - len(made.decode.kernels)
    assert loaded.program == made.both
    assert tokens(loaded) == want


def test_a_kernel_with_another_image_takes_the_place_of_the_old_one(loaded: LoadedProgram, made: Made) -> None:
    want, functions, objects = tokens(loaded), loaded.functions, host.live()
    name = made.decode.step().kernels[0].kernel
    kernel = made.compiled[name]
    loaded.forget(DECODE)
    loaded.load(made.decode, {**made.decode_kernels, name: replace(kernel, image=kernel.image + b"\0")}, "another")
    loaded.capture(DECODE)
    assert {key for key, function in loaded.functions.items() if function != functions[key]} == {name}
    assert tokens(loaded) == want
    assert host.live() == objects


def test_a_launch_that_fails_is_the_last_one(loaded: LoadedProgram, made: Made) -> None:
    """Memory that is short in the middle of a step too: half a step is no state to go on from."""
    launch = made.decode.step().kernels[0]
    host.inject(1, OUT_OF_MEMORY)
    with pytest.raises(OutOfMemoryError):
        loaded.launch(launch)
    with pytest.raises(DeviceError, match="the GPU failed earlier in this process"):
        loaded.launch(launch)


def test_a_library_that_is_needed_and_not_there(loaded: LoadedProgram, made: Made) -> None:
    with open_model(made.path) as model:
        both = with_prefill(made.decode, model.graph((), False, PREFILL_ROWS), TARGET, library=True)
    loaded.load(both, compile_program(both, "host", KernelCache(None), known=made.compiled), "both")
    with pytest.raises(UsageError, match="the program needs a library for its products"):
        loaded.launch_all(both.step(PREFILL))
