"""The launches of a model's step with what lay in their buffers, to run each kernel alone under checks.

One image holds all kernels of a program (`many`): most of what g++ does, and more so with a sanitizer, it does for
the header that they share.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from psigraph.build import Model, build_program, open_model
from psigraph.codegen.device import device_headers
from psigraph.codegen.packing import pack
from psigraph.codegen.probe import PROBE_THREADS, probe_kernel
from psigraph.codegen.repack import REPACK_THREADS, repack_grid, repack_kernel
from psigraph.codegen.target import target_for
from psigraph.codegen.weight_types import WEIGHT_TYPES
from psigraph.ir.program import Kernel, Launch, Program
from psigraph.passes.use_sampler import SAMPLER
from psigraph.runtime import host
from psigraph.runtime.cuda.compiler import CompiledKernel
from psigraph.runtime.cuda.driver import Driver
from psigraph.runtime.cuda.nvrtc import KernelResources
from psigraph.runtime.engine import Engine
from psigraph.runtime.host.check import KernelCall
from psigraph.text.sampler import SamplerSettings

CONTEXT = 64
PROMPT = (7, 300, 41, 5, 1021)
POSITION = 45  # of the last of them, so that all splits of the attention have work
MOST_ARGUMENTS = 24
SMS = 4
ANY_ORDER = ("scratch.candidates",)  # a list to which blocks append; what is made of it does not depend on its order
SETTINGS = SamplerSettings(
    temperature=0.9, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, logit_bias={7: 0.5}, seed=1
)

# Calls one of several kernels, so that one image holds them all. Host only: a GPU's kernels are loaded one by one.
_MANY = """
template <class... A, size_t... I> static void call(void (*kernel)(A...), const u64* args, std::index_sequence<I...>) {{
    kernel((A)args[I]...);
}}
template <class... A> static void call(void (*kernel)(A...), const u64* args) {{
    call(kernel, args, std::index_sequence_for<A...>());
}}
extern "C" __global__ void many(int which, {parameters}) {{
    const u64 args[] = {{{names}}};
    switch (which) {{
{cases}
    }}
}}
"""


@dataclass(frozen=True)
class Step:
    """A program's kernels in one text, and one launch of each. after: what the step left in what it wrote."""

    program: Program
    source: str
    names: tuple[str, ...]
    calls: dict[str, KernelCall]
    after: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    def changed(self, changes: Sequence[tuple[str, str, str]]) -> list[KernelCall]:
        """Launches of kernels of which a piece of text was replaced: (kernel, old, new); one text holds them all."""
        kernels = []
        for index, (name, old, new) in enumerate(changes):
            text = self.program.kernel(name).text
            assert old in text, f"{name} has no {old}"
            kernels.append(
                Kernel(f"changed_{index}", text.replace(old, new).replace(f" {name}(", f" changed_{index}("))
            )
        source = bundle(tuple(kernels))
        calls = [self.calls[name] for name, _, _ in changes]
        return [replace(call, source=source, args=[np.int32(i), *call.args[1:]]) for i, call in enumerate(calls)]


def bundle(kernels: tuple[Kernel, ...]) -> str:
    """The kernels, and `many`, whose first argument says which one runs."""
    places = range(MOST_ARGUMENTS)
    many = _MANY.format(
        parameters=", ".join(f"u64 a{i}" for i in places),
        names=", ".join(f"a{i}" for i in places),
        cases="\n".join(f"        case {i}: return call(&{kernel.name}, args);" for i, kernel in enumerate(kernels)),
    )
    return "\n".join([*(kernel.text for kernel in kernels), many])


class _Watched(Engine):
    """Remembers, for the last launch of every kernel in a step, what it found and what it left."""

    def __post_init__(self) -> None:
        self.watching = False
        self.before: dict[str, dict[str, np.ndarray]] = {}
        self.left: dict[str, dict[str, np.ndarray]] = {}
        self._last = {launch.kernel: index for index, launch in enumerate(self.program.launches)}
        super().__post_init__()

    def launch(self, launch: Launch) -> None:
        chosen = self.watching and self.program.launches[self._last[launch.kernel]] is launch
        if chosen:
            self.before[launch.kernel] = self._contents(launch)
        super().launch(launch)
        if chosen:
            self.left[launch.kernel] = self._contents(launch)

    def jump(self, position: int) -> None:
        """Go on at a later position: the caches are zero in between."""
        self._write("position", np.array([position], np.int32))

    def _contents(self, launch: Launch) -> dict[str, np.ndarray]:
        return {arg: self.read(arg) for arg in launch.args if isinstance(arg, str)}


def texts_of(path: Path, disable: tuple[str, ...]) -> frozenset[str]:
    """The texts of a program's kernels."""
    with open_model(path, CONTEXT) as model:
        program = build_program(model, target_for("host", SMS), ("logits",), disable)
    return frozenset(kernel.text for kernel in program.kernels)


def step_of(
    path: Path,
    disable: tuple[str, ...] = (),
    sampling: bool = False,
    known: frozenset[str] = frozenset(),
    kv_type: str = "f16",
) -> Step:
    """A step of a model's program on the stand-in driver, kernel after kernel, at position POSITION.

    known: texts of kernels to leave out of what it gives.
    """
    host.activate(sms=SMS)
    with open_model(path, CONTEXT, kv_type=kv_type) as model, Driver(0) as driver:
        program = build_program(model, target_for("host", SMS), ("logits",), disable, sampling=sampling)
        return _watch(program, model, driver, known)


def _watch(program: Program, model: Model, driver: Driver, known: frozenset[str]) -> Step:
    names = dict.fromkeys(launch.kernel for launch in program.launches)
    used = tuple(name for name in names if program.kernel(name).text not in known)
    compiled = {
        kernel.name: CompiledKernel(
            kernel.name,
            host.compile_kernel(kernel.text, kernel.name, program.headers),
            KernelResources(0, 0, 0, 0),
            True,
        )
        for kernel in program.kernels
    }
    constants = {SAMPLER: SETTINGS.words()}
    with _Watched(driver, program, compiled, model, graph=False, constants=constants) as engine:
        engine.feed(PROMPT[:-1])
        engine.jump(POSITION)
        engine.watching = True
        engine.feed(PROMPT[-1:])
        before, left = engine.before, engine.left
    source = bundle(tuple(program.kernel(name) for name in used))
    step = Step(program, source, used, {}, {})
    written: set[str] = set()
    last = {launch.kernel: index for index, launch in enumerate(program.launches)}
    for index, launch in enumerate(program.launches):
        writes = written_places(program.kernel(launch.kernel))
        if launch.kernel in used and last[launch.kernel] == index:
            name = launch.kernel
            step.calls[name] = _call(step, launch, before[name], writes, written)
            step.after[name] = {1 + i: left[name][arg] for i in writes if (arg := str(launch.args[i])) not in ANY_ORDER}
        written |= {str(launch.args[place]) for place in writes}
    return step


def _call(
    step: Step, launch: Launch, before: dict[str, np.ndarray], writes: list[int], written: set[str]
) -> KernelCall:
    args: list[Any] = [np.int32(step.names.index(launch.kernel))]
    args += [before[arg] if isinstance(arg, str) else np.uint64(arg) for arg in launch.args]
    args += [np.uint64(0)] * (1 + MOST_ARGUMENTS - len(args))
    return KernelCall(
        step.source,
        "many",
        launch.grid,
        launch.block,
        launch.shared_bytes,
        args,
        # Written by an earlier kernel of this step; what earlier steps wrote may be read before the wait.
        produced=tuple(1 + place for place, arg in enumerate(launch.args) if arg in written),
        writes=tuple(1 + place for place in writes),
        programmatic=launch.programmatic,
        together=launch.cluster,
        headers=device_headers(),
    )


def written_places(kernel: Kernel) -> list[int]:
    """Places of the parameters through which a kernel may write: pointers to what is not const."""
    found = re.search(
        rf'extern "C" __global__ void (?:THREADS|REGISTERS)\([\d, ]+\) {kernel.name}\(([^)]*) STAMP_PARAMETERS\)',
        kernel.text,
    )
    assert found, kernel.name
    parameters = [" ".join(parameter.split()) for parameter in found[1].split(",")]
    return [i for i, parameter in enumerate(parameters) if "*" in parameter and not parameter.startswith("const ")]


def layout_launches(rows: int, columns: int) -> dict[str, tuple[KernelCall, np.ndarray]]:
    """Weight type -> launch of the kernel that lays such a matrix out, and what must come out."""
    kernels = tuple(repack_kernel(dtype) for dtype in WEIGHT_TYPES)
    source = bundle(kernels)
    calls = {}
    for index, (dtype, row) in enumerate(WEIGHT_TYPES.items()):
        raw = np.random.default_rng(index).integers(0, 256, row.file_bytes(rows, columns), np.uint8)
        wanted = pack(raw, dtype, rows, columns)
        args = [np.int32(index), raw, np.full_like(wanted, 0xFF), np.uint64(rows), np.uint64(columns)]
        args += [np.uint64(0)] * (1 + MOST_ARGUMENTS - len(args))
        call = KernelCall(
            source, "many", repack_grid(rows, columns), REPACK_THREADS, 0, args, writes=(2,), headers=device_headers()
        )
        calls[dtype] = (call, wanted)
    return calls


def bandwidth_launch() -> KernelCall:
    """The kernel that measures what a GPU can read, over a number of words that fits nothing."""
    data = np.arange(4 * 100_003, dtype=np.uint32)
    args = [data, np.uint64(data.size // 4), 2, np.zeros(1, np.uint32)]  # read twice
    kernel = probe_kernel()
    return KernelCall(kernel.text, kernel.name, 2 * SMS, PROBE_THREADS, 0, args, writes=(3,), headers=device_headers())
