"""The launches of a model's step with what lay in their buffers, to run each kernel alone under checks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from one_image import ENTRY, MOST_ARGUMENTS, one_image
from packing import pack
from signature import written

from psigraph.build import Model, build_program, open_model
from psigraph.codegen.device import device_headers
from psigraph.codegen.probe import PROBE_THREADS, probe_kernel
from psigraph.codegen.repack import REPACK_THREADS, repack_grid, repack_kernel
from psigraph.codegen.target import target_for
from psigraph.codegen.weight_types import WEIGHT_TYPES
from psigraph.ir.program import Launch, Program
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
SMS = 4
ANY_ORDER = ("scratch.candidates",)  # a list to which blocks append; what is made of it does not depend on its order
SETTINGS = SamplerSettings(
    temperature=0.9, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, logit_bias={7: 0.5}, seed=1
)


@dataclass(frozen=True)
class Step:
    """A program's kernels in one text, and one launch of each. after: what the step left in what it wrote."""

    program: Program
    source: str
    names: tuple[str, ...]
    calls: dict[str, KernelCall]
    after: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    def changed(self, name: str, old: str, new: str) -> KernelCall:
        """The launch of a kernel in which a piece of text was replaced: of its own, or of a header that it names."""
        kernel, headers = self.program.kernel(name), dict(self.program.headers)
        if old in kernel.text:
            kernel = replace(kernel, text=kernel.text.replace(old, new))
        else:
            included = re.findall(r'#include "([\w.]+)"', kernel.text)
            header = next((header for header in included if old in headers[header]), None)
            assert header, f"{name} has no {old}"
            headers[header] = headers[header].replace(old, new)
        call = self.calls[name]
        return replace(call, source=one_image([kernel]), args=[np.int32(0), *call.args[1:]], headers=headers)


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
    names = dict.fromkeys(launch.kernel for launch in program.step().kernels)
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
    before: dict[str, dict[str, np.ndarray]] = {}
    left: dict[str, dict[str, np.ndarray]] = {}
    launches = program.step().kernels
    last = {launch.kernel: index for index, launch in enumerate(launches)}
    with Engine(driver, program, compiled, model, graph=False, constants=constants) as engine:
        engine.feed(PROMPT[:-1])
        memory = engine._loaded.memory
        engine.synchronize()
        memory.write("tokens", np.array(PROMPT[-1:], np.int32))
        memory.write("positions", np.array([POSITION], np.int32))  # the caches are zero in between

        def contents(launch: Launch) -> dict[str, np.ndarray]:
            return {arg: memory.read(arg) for arg in launch.args if isinstance(arg, str)}

        for index, launch in enumerate(launches):
            watching = last[launch.kernel] == index
            if watching:
                before[launch.kernel] = contents(launch)
            engine.launch(launch)
            if watching:
                left[launch.kernel] = contents(launch)
    source = one_image(tuple(program.kernel(name) for name in used))
    step = Step(program, source, used, {}, {})
    changed: set[str] = set()
    for index, launch in enumerate(launches):
        writes = written(program.kernel(launch.kernel))
        if launch.kernel in used and last[launch.kernel] == index:
            name = launch.kernel
            step.calls[name] = _call(step, launch, before[name], writes, changed)
            step.after[name] = {1 + i: left[name][arg] for i in writes if (arg := str(launch.args[i])) not in ANY_ORDER}
        changed |= {str(launch.args[place]) for place in writes}
    return step


def _call(
    step: Step, launch: Launch, before: dict[str, np.ndarray], writes: list[int], changed: set[str]
) -> KernelCall:
    args: list[Any] = [np.int32(step.names.index(launch.kernel))]
    args += [before[arg] if isinstance(arg, str) else np.uint64(arg) for arg in launch.args]
    args += [np.uint64(0)] * (1 + MOST_ARGUMENTS - len(args))
    return KernelCall(
        step.source,
        ENTRY,
        launch.grid,
        launch.block,
        launch.shared_bytes,
        args,
        # Written by an earlier kernel of this step; what earlier steps wrote may be read before the wait.
        produced=tuple(1 + place for place, arg in enumerate(launch.args) if arg in changed),
        writes=tuple(1 + place for place in writes),
        programmatic=launch.programmatic,
        together=launch.cluster,
        headers=device_headers(),
    )


def layout_launches(rows: int, columns: int) -> dict[str, tuple[KernelCall, np.ndarray]]:
    """Weight type -> launch of the kernel that lays such a matrix out, and what must come out."""
    kernels = tuple(repack_kernel(dtype) for dtype in WEIGHT_TYPES)
    source = one_image(kernels)
    calls = {}
    for index, (dtype, row) in enumerate(WEIGHT_TYPES.items()):
        raw = np.random.default_rng(index).integers(0, 256, row.file_bytes(rows, columns), np.uint8)
        wanted = pack(raw, dtype, rows, columns)
        args = [np.int32(index), raw, np.full_like(wanted, 0xFF), np.uint64(rows), np.uint64(columns)]
        args += [np.uint64(0)] * (1 + MOST_ARGUMENTS - len(args))
        call = KernelCall(
            source, ENTRY, repack_grid(rows, columns), REPACK_THREADS, 0, args, writes=(2,), headers=device_headers()
        )
        calls[dtype] = (call, wanted)
    return calls


def bandwidth_launch() -> KernelCall:
    """The kernel that measures what a GPU can read, over a number of words that fits nothing."""
    data = np.arange(4 * 100_003, dtype=np.uint32)
    args = [data, np.uint64(data.size // 4), 2, np.zeros(1, np.uint32)]  # read twice
    kernel = probe_kernel()
    return KernelCall(kernel.text, kernel.name, 2 * SMS, PROBE_THREADS, 0, args, writes=(3,), headers=device_headers())
