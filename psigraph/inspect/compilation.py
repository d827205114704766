"""A model, or only its shapes, through every stage to machine code: what `psigraph compile` writes to a folder.

ir/NN-<pass>.txt          the graph after every pass, 00-input before the first
fused.txt, .dot, .json    the graph that kernels are made of
prefill/                  the same of the step that takes a prompt's tokens in, many at once
kernels/<kernel>.cu       texts, with the device headers (.cuh), for the first architecture
cubins/<arch>/            machine code, for every architecture
program.json              launches in order, buffers, passes, resources, for the first architecture
kernels/<arch>/, program.<arch>.json   the same for every further architecture: grids and texts differ
SHA256SUMS                what was written (`sha256sum -c`): nothing else is replaced or read back
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..build import find_spec, fuse, open_model
from ..codegen.lower import PREFILL_ROWS, lower
from ..codegen.target import GPU_ARCHES, Target, target_for
from ..ir.errors import OutputError, UnsupportedModelError, UsageError
from ..ir.graph import Graph, TensorType
from ..ir.program import DECODE, PREFILL, Program
from ..ir.regime import Regime
from ..ir.spec.model import Binding, ModelSpec
from ..ir.text import print_graph
from ..ir.types import CACHE_DTYPES
from ..passes.pipeline import PassReport
from ..printable import one_line
from ..runtime.cuda.compiler import CompiledKernel, compile_program
from ..runtime.cuda.kernel_cache import KernelCache, default_cache_dir
from ..runtime.synth.model import synth_model
from ..runtime.whole_files import remove_stale, replace_folder, scratch_folder
from .export import to_dot, to_json
from .sums import first_foreign, write_sums

DEFAULT_ARCH = "sm_90a"
PROGRAM_FILE = "program.json"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """What is compiled: a file's header or a published size. name: for people."""

    name: str
    spec: ModelSpec
    binding: Binding

    def graph(self, step: str = DECODE) -> Graph:
        """A step, unfused."""
        return self.spec.graph(self.binding, (), PREFILL_ROWS if step == PREFILL else 1)


@dataclass(frozen=True)
class Stages:
    """Every stage of a step. graphs: (name, graph) for "input" and after each pass, in order."""

    graphs: tuple[tuple[str, Graph], ...]
    passes: tuple[PassReport, ...]

    @property
    def fused(self) -> Graph:
        """The graph that kernels are made of."""
        return self.graphs[-1][1]


@dataclass(frozen=True)
class Staged:
    """The stages of both steps of a model. name: for people."""

    name: str
    decode: Stages
    prefill: Stages


@dataclass(frozen=True)
class Built:
    """A Program for one architecture and its machine code by kernel."""

    arch: str
    program: Program
    compiled: dict[str, CompiledKernel]


@dataclass(frozen=True)
class Compilation:
    """Stages, and one or more programs; the first is the one that is shown."""

    stages: Staged
    built: tuple[Built, ...]


def source_of_file(path: str | os.PathLike[str], ctx: int | None = None, kv_type: str = CACHE_DTYPES[0]) -> Source:
    """The header of a model file; raises what `build.open_model` raises."""
    with open_model(path, ctx, kv_type=kv_type) as model:
        name = one_line(str(model.file.metadata.get("general.name") or Path(path).name))
        return Source(name, model.spec, model.binding)


def source_of_size(
    size: str,
    quant: str,
    ctx: int | None = None,
    untied: bool = False,
    layers: int | None = None,
    kv_type: str = CACHE_DTYPES[0],
) -> Source:
    """The shapes of a published size, such as "1.7b", in a block mix, such as "q4_k_m"; needs no file."""
    metadata, tensors = synth_model(size, quant, untied, layers)
    spec = find_spec(metadata)
    types = {name: TensorType(dtype, shape) for name, (dtype, shape) in tensors.items()}
    return Source(str(metadata["general.name"]), spec, spec.bind(metadata, types, ctx, kv_type))


def stages_of(source: Source, disable: Sequence[str] = (), step: str = DECODE) -> Stages:
    """A step's graph after every pass."""
    graphs: list[tuple[str, Graph]] = []
    regime = Regime.MANY if step == PREFILL else Regime.STEP
    _, reports = fuse(source.graph(step), disable, lambda name, graph: graphs.append((name, graph)), regime)
    return Stages(tuple(graphs), reports)


def staged(source: Source, disable: Sequence[str] = ()) -> Staged:
    """Both steps of a model."""
    return Staged(source.name, stages_of(source, disable), stages_of(source, disable, PREFILL))


def program_of(stages: Staged, target: Target) -> Program:
    """The Program of both steps, a prompt's by own kernels; where it has none, `notes["prefill"]` says why."""
    program = lower(stages.decode.fused, target)
    try:
        return lower(stages.prefill.fused, target, regime=Regime.MANY, name=PREFILL, beside=program)
    except UnsupportedModelError as error:
        return replace(program, notes={**program.notes, "prefill": f"token by token: {error}"})


def gpu_target(arch: str) -> Target:
    """The row of a GPU architecture; UsageError lists the known ones."""
    if arch not in GPU_ARCHES:
        raise UsageError(f"--arch {arch}: unknown architecture; known are {', '.join(GPU_ARCHES)}")
    return target_for(arch)


def default_target() -> Target:
    """That of this machine's first GPU; sm_90a where there is none."""
    from ..gpu_choice import present_target

    return present_target() or target_for(DEFAULT_ARCH)


def compile_stages(stages: Staged, targets: Sequence[Target], progress: Progress | None = None) -> Compilation:
    """Machine code for every target, through the kernel cache. progress(kernels compiled, kernels in all)."""
    programs = [program_of(stages, target) for target in targets]
    total = sum(len(program.kernels) for program in programs)
    cache = KernelCache(default_cache_dir())
    built: list[Built] = []
    done = 0
    for target, program in zip(targets, programs, strict=True):

        def advance(count: int, _: int, before: int = done) -> None:
            if progress:
                progress(before + count, total)

        built.append(Built(target.arch, program, compile_program(program, target.arch, cache, advance)))
        done += len(program.kernels)
    return Compilation(stages, tuple(built))


def program_record(stages: Staged, built: Built) -> dict[str, Any]:
    """The content of program.json."""
    record: dict[str, Any] = json.loads(built.program.to_json())
    return {
        **record,
        "model": stages.name,
        "arch": built.arch,
        "passes": [asdict(report) for report in stages.decode.passes],
        "prefill_passes": [asdict(report) for report in stages.prefill.passes],
        "resources": {name: asdict(kernel.resources) for name, kernel in built.compiled.items()},
    }


def write_compilation(compilation: Compilation, out: str | os.PathLike[str]) -> None:
    """Write the folder `out`, whole or not at all; one that an earlier compilation wrote is replaced.

    Raises OutputError where it cannot be written, or where anything else lies there.
    """
    out = Path(out)
    check_folder(out)
    try:
        remove_stale(out.parent, out.name)
        with scratch_folder(out.parent, out.name) as scratch:
            new = scratch / "new"
            _write_all(compilation, new)
            write_sums(new)
            check_folder(out)  # a file may have been put there meanwhile
            replace_folder(new, out)
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def check_folder(out: Path) -> None:
    """OutputError unless a compilation can be written to `out`: asked before the work, not after it."""
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise OutputError(f"--out {out}: is no folder; choose another name")
        if out.is_dir() and (foreign := first_foreign(out)):
            raise OutputError(
                f"--out {out}: holds {foreign}, which psigraph compile did not write; choose another folder"
            )
        if not out.parent.is_dir():
            raise OutputError(f"--out {out}: cannot be written: {out.parent}: there is no such folder; make it first")
        with scratch_folder(out.parent, out.name):
            pass
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _write_all(compilation: Compilation, folder: Path) -> None:
    stages = compilation.stages
    for place, step in ((folder, stages.decode), (folder / PREFILL, stages.prefill)):
        (place / "ir").mkdir(parents=True)
        for number, (name, graph) in enumerate(step.graphs):
            _write(place / "ir" / f"{number:02}-{name}.txt", print_graph(graph))
        _write(place / "fused.txt", print_graph(step.fused))
        _write(place / "fused.dot", to_dot(step.fused))
        _write(place / "fused.json", to_json(step.fused))
    for index, built in enumerate(compilation.built):
        kernels = folder / "kernels" if index == 0 else folder / "kernels" / built.arch
        kernels.mkdir(parents=True)
        for name, text in built.program.headers.items():
            _write(kernels / name, text)
        for kernel in built.program.kernels:
            _write(kernels / f"{kernel.name}.cu", kernel.text)
        cubins = folder / "cubins" / built.arch
        cubins.mkdir(parents=True)
        for name, compiled in built.compiled.items():
            (cubins / f"{name}.cubin").write_bytes(compiled.image)
        record = folder / (PROGRAM_FILE if index == 0 else f"program.{built.arch}.json")
        _write(record, json.dumps(program_record(stages, built), indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
