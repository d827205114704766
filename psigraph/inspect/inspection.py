"""What `psigraph inspect` looks at: the stages of a model file, computed, or of a compiled folder, read back."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..build import Model, open_model
from ..codegen.cache_types import CACHE_TYPES
from ..codegen.target import Target
from ..ir.errors import ModelFileError, UsageError
from ..ir.graph import Graph, layer_of
from ..ir.program import DECODE, PREFILL, SCHEMA
from ..ir.text import parse_graph, print_graph
from ..ir.types import CACHE_DTYPES
from ..medpsy.artifact import artifact_record, model_size, tensor_types
from ..medpsy.policy import tier_of
from ..passes.pipeline import PIPELINE
from ..printable import one_line
from .compilation import (
    PROGRAM_FILE,
    Built,
    Source,
    Staged,
    default_target,
    gpu_target,
    program_of,
    program_record,
    stages_of,
)
from .picture import identical_layers, longest_chain
from .sums import Compiled

INPUT = "input"
_RECORD_KEYS = ("arch", "model", "steps", "kernels", "passes", "prefill_passes", "notes")
_GRAPH_FILE = re.compile(r"(\d{2,})-(\w+)\.txt")


@dataclass
class Inspected:
    """Stages of a model: graphs by name in order (`input`, then every pass), the program, the kernels' texts.

    Made by `inspect_path`. Graphs, program and kernels are only computed or read when they are asked for.
    """

    name: str
    facts: dict[str, str]
    _names: tuple[str, ...]
    _graph: Callable[[str], Graph]
    _program: Callable[[], dict[str, Any]]
    _kernel: Callable[[str], str]
    passes: list[dict[str, Any]]
    _known: dict[str, Graph] = field(default_factory=dict)

    def graph(self, stage: str) -> Graph:
        """The graph after a pass, or the `input`; UsageError lists the passes."""
        if stage not in self._names:
            found = "serves another --step" if stage in {each.name for each in PIPELINE} else "does not exist"
            raise UsageError(f"the pass {stage} {found}; the passes are {', '.join(self._names[1:])}")
        if stage not in self._known:
            self._known[stage] = self._graph(stage)
        return self._known[stage]

    @property
    def fused(self) -> Graph:
        """The graph after the last pass."""
        return self.graph(self._names[-1])

    def before(self, stage: str) -> str:
        """The stage that a pass works on."""
        self.graph(stage)
        if stage == INPUT:
            raise UsageError(f"{INPUT} is what the first pass works on; the passes are {', '.join(self._names[1:])}")
        return self._names[self._names.index(stage) - 1]

    def diff(self, stage: str, layer: int | None = None) -> str:
        """What a pass changed, as a unified diff of the printed graphs; "" if it changed nothing."""
        before = self.before(stage)
        old = print_graph(self.graph(before), layer).splitlines(keepends=True)
        new = print_graph(self.graph(stage), layer).splitlines(keepends=True)
        return "".join(difflib.unified_diff(old, new, before, stage))

    def program(self) -> dict[str, Any]:
        """The content of program.json."""
        return self._program()

    def launches(self, name: str, layer: int | None = None) -> list[dict[str, Any]]:
        """The launches of a kernel, in order; UsageError if it has none in that layer."""
        steps = self.program()["steps"]
        found = [launch for step in steps for launch in step["launches"] if launch.get("kernel") == name]
        if layer is None:
            return found
        here = [launch for launch in found if launch["layer"] == layer]
        if not here:
            layers = sorted({launch["layer"] for launch in found if launch["layer"] is not None})
            where = f"in layer {', '.join(map(str, layers))}" if layers else "outside of the layers"
            raise UsageError(f"--layer {layer}: {name} is launched {where}, not there")
        return here

    def kernel(self, name: str) -> str:
        """A kernel's text; UsageError lists the kernels."""
        known = self.program()["kernels"]
        if name not in known:
            raise UsageError(f"--kernel {name}: there is no such kernel; there are {', '.join(known)}")
        return self._kernel(name)

    def check_layer(self, layer: int | None) -> None:
        """UsageError if the model has no such layer."""
        if layer is None:
            return
        last = max((found for node in self.fused.nodes if (found := layer_of(node)) is not None), default=-1)
        if layer > last:
            raise UsageError(f"--layer {layer}: the model has layers 0 to {last}")


def inspect_path(path: Path, arch: str | None = None, kv_type: str = CACHE_DTYPES[0], step: str = DECODE) -> Inspected:
    """A model file, or a folder that `psigraph compile` wrote.

    arch: for what kernels are written, or one that the folder has; None: this machine's GPU or sm_90a, or the folder's
    first. kv_type: the type of a file's KV cache. step: whose graphs and passes are looked at; the program has both.
    """
    if path.is_dir():
        return _folder(path, step, arch)
    return _file(path, gpu_target(arch) if arch is not None else None, kv_type, step)


def _file(path: Path, target: Target | None, kv_type: str, step: str) -> Inspected:
    with open_model(path, kv_type=kv_type) as model:
        source = Source(path.name, model.spec, model.binding)
        stages = stages_of(source, step=step)
        facts = _model_facts(model)
    graphs = dict(stages.graphs)
    facts["layers"] = _alike(stages.fused)
    facts["longest chain"] = f"{len(longest_chain(stages.fused))} of {len(stages.fused.nodes)} nodes"
    both: list[Staged] = []
    built: list[Built] = []

    def program() -> Built:
        if not built:
            chosen = target or default_target()
            other = stages_of(source, step=PREFILL if step == DECODE else DECODE)
            both.append(Staged(path.name, *((stages, other) if step == DECODE else (other, stages))))
            built.append(Built(chosen.arch, program_of(both[0], chosen), {}))
        return built[0]

    def record() -> dict[str, Any]:
        made = program()
        return program_record(both[0], made)

    return Inspected(
        name=path.name,
        facts=facts,
        _names=tuple(graphs),
        _graph=lambda stage: graphs[stage],
        _program=record,
        _kernel=lambda name: program().program.kernel(name).text,
        passes=[asdict(report) for report in stages.passes],
    )


def _alike(graph: Graph) -> str:
    """Which layers do the same, in words."""
    groups = identical_layers(graph)
    return "; ".join(f"{len(group)} alike: {_ranges(group)}" for group in groups) or "none"


def _ranges(numbers: tuple[int, ...]) -> str:
    """`0-3, 7, 9-11`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def cache_bytes(graph: Graph) -> int:
    """Bytes that one position takes in all of a step's caches."""
    caches = [param.type for param in graph.params if param.kind == "state" and len(param.type.shape) == 4]
    return sum(type_.shape[1] * CACHE_TYPES[type_.dtype].position_bytes(type_.shape[3]) for type_ in caches)


def _model_facts(model: Model) -> dict[str, str]:
    record = artifact_record(model)
    sizes = model.binding.sizes
    mix = ", ".join(f"{count} {kind}" for kind, count in record["quant_mix"].items())
    return {
        "model": one_line(record["name"] or record["file"]),
        "architecture": f"{record['architecture']} ({model.spec.file})",
        "size": f"{model_size(model)}, {record['parameters']:,} parameters, {record['file_bytes']:,} bytes",
        "weights": f"{tier_of(tensor_types(model.file))}: {mix}" + (", synthetic" if record["synthetic"] else ""),
        "sizes": ", ".join(f"{name} {value}" for name, value in sizes.items() if isinstance(value, int)),
        **({"padding": _padding(model)} if model.padding else {}),
        "context": f"{model.binding.context_limit} at most",
        "end tokens": _ends(record["end_tokens"]),
        "cache": f"{model.binding.kv_type}, {cache_bytes(model.graph()):,} bytes a position in all layers",
    }


def _padding(model: Model) -> str:
    """Rows without a token, in words."""
    rows = ", ".join(f"{count:,} of {name}" for name, count in model.padding.items())
    return f"{rows}: rows without a token, left out; ids end at {model.binding.sizes['vocabulary'] - 1}"


def _ends(ends: list[dict[str, Any]]) -> str:
    """`151645 '<|im_end|>' (tokenizer.ggml.eos_token_id, its text)`."""
    found = [f"{end['id']} {end['text'][:40]!a} ({', '.join(end['from'])})" for end in ends]
    return "; ".join(found) or "none: a text ends at the limit"


def _record(compiled: Compiled, name: str) -> dict[str, Any]:
    """A program.json of this version; ModelFileError where it is another's, or none."""
    again = "compile the model again"
    try:
        record = json.loads(compiled.text(name))
    except (ValueError, RecursionError):
        raise ModelFileError(f"is no JSON; {again}", str(compiled.folder / name)) from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ModelFileError(f"was compiled by another version of psigraph; {again}", str(compiled.folder))
    missing = [key for key in _RECORD_KEYS if key not in record]
    if missing:
        raise ModelFileError(f"{missing[0]} is missing; {again}", str(compiled.folder / name))
    return record


def _folder(path: Path, step: str, arch: str | None) -> Inspected:
    compiled = Compiled(path)
    programs = {
        match[1] or "": name for name in compiled.names if (match := re.fullmatch(r"program(?:\.(\w+))?\.json", name))
    }
    record = _record(compiled, PROGRAM_FILE)
    arches = [str(record["arch"]), *filter(None, programs)]
    kernels = "kernels"
    if arch is not None and arch not in arches:
        raise UsageError(f"--arch {arch}: {path} is compiled for {', '.join(arches)}")
    if arch is not None and arch != arches[0]:
        record, kernels = _record(compiled, programs[arch]), f"kernels/{arch}"
    place = "ir" if step == DECODE else f"{step}/ir"
    by_name = {
        match[2]: name
        for name in sorted(compiled.names)
        if name.startswith(f"{place}/") and (match := _GRAPH_FILE.fullmatch(name.removeprefix(f"{place}/")))
    }
    further = f"; --arch shows {', '.join(one for one in arches if one != record['arch'])}" if arches[1:] else ""
    return Inspected(
        name=path.name,
        facts={"model": one_line(str(record["model"])), "compiled for": one_line(f"{record['arch']}{further}")},
        _names=tuple(by_name),
        _graph=lambda stage: parse_graph(compiled.text(by_name[stage]), Path(by_name[stage]).name),
        _program=lambda: record,
        _kernel=lambda name: compiled.text(f"{kernels}/{name}.cu"),
        passes=record["passes" if step == DECODE else "prefill_passes"],
    )
