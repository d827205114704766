"""From a model file to a Program: the wiring between the rooms, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from .codegen.lower import lower
from .codegen.target import Target
from .ir.errors import ModelFileError, UnsupportedModelError
from .ir.graph import Graph, TensorType
from .ir.program import PREFILL, Program
from .ir.regime import Regime
from .ir.spec.loader import available_specs, load_spec
from .ir.spec.model import Binding, ModelSpec, check_cache_type
from .ir.types import CACHE_DTYPES
from .passes.pipeline import PassReport, run_pipeline
from .passes.use_sampler import use_sampler
from .rope_scaling import RopeScaling, stretch_positions
from .runtime.gguf.cursor import quoted
from .runtime.gguf.file import GgufFile, open_gguf
from .runtime.gguf.ggml_types import tensor_bytes
from .runtime.gguf.kinds import refuse_other_kinds

Observe = Callable[[str, Graph], None]


@dataclass(frozen=True)
class Model:
    """A model file, the spec of its architecture, and the sizes that bind them.

    Close the file, or use the model in a `with` statement.
    """

    file: GgufFile
    spec: ModelSpec
    binding: Binding

    def graph(self, outputs: Sequence[str] = (), sampling: bool = False, rows: int = 1) -> Graph:
        """The unfused step over so many rows; `outputs` may hold "logits".

        sampling: the token is drawn, by the settings in the constant `sampler`, instead of the likeliest.
        """
        graph = self.spec.graph(self.binding, outputs, rows)
        return use_sampler(graph) if sampling else graph

    def fileno(self) -> int:
        """The open file, for `runtime.upload.WeightSource`."""
        return self.file.fileno()

    @property
    def padding(self) -> dict[str, int]:
        """Tensors with more rows than there are tokens, and how many of them are left out."""
        return {
            name: self.file.tensors[name].shape[0] - type_.shape[0]
            for name, type_ in self.binding.tensors.items()
            if self.file.tensors[name].shape != type_.shape
        }

    def place(self, name: str) -> tuple[int, int]:
        """(offset, bytes) of a tensor in the file, for `runtime.upload.WeightSource`."""
        type_ = self.binding.tensors[name]
        return self.file.tensors[name].offset, tensor_bytes(type_.dtype, type_.shape)  # without padding rows

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def tensor_types_of(file: GgufFile) -> dict[str, TensorType]:
    """Type and shape of every tensor, by name, for `ModelSpec.bind`."""
    return {name: TensorType(info.dtype, info.shape) for name, info in file.tensors.items()}


def spec_folder() -> Path:
    """Where the model specs are: `models/`."""
    return Path(str(files("psigraph.models")))


def find_spec(metadata: Mapping[str, Any]) -> ModelSpec:
    """The spec of a file's architecture; UnsupportedModelError says why there is none."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        why = "is no text" if "general.architecture" in metadata else "missing"
        raise ModelFileError(f"{why}, so nobody can tell what model this is", "general.architecture")
    specs = available_specs(spec_folder())
    if architecture in specs:
        return load_spec(specs[architecture])
    shown = quoted(architecture, 40)  # a stranger's words must not read like ours
    for path in specs.values():
        reason = load_spec(path).refused.get(architecture)
        if reason:
            raise UnsupportedModelError(f"general.architecture: {shown} is not supported: {reason}")
    raise UnsupportedModelError(
        f"general.architecture: {shown} is not supported; supported are {', '.join(sorted(specs))}"
    )


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about a model name its file: one of several may be at fault."""
    try:
        yield
    except (ModelFileError, UnsupportedModelError) as error:
        error.args = (f"{quoted(os.fspath(path), limit=4096)}: {error}",)
        raise


def open_model(
    path: str | os.PathLike[str],
    ctx: int | None = None,
    admit: Callable[[GgufFile], None] | None = None,
    kv_type: str = CACHE_DTYPES[0],
    rope: RopeScaling | None = None,
) -> Model:
    """Open a model file and check every key and tensor against its spec; reads no weights.

    ctx, kv_type: of the caches, see `ModelSpec.bind`. rope: in place of the file's own stretching of positions.
    admit: called with the open file before anything is asked of its spec, so that a policy's refusal comes first.
    """
    check_cache_type(kv_type)
    file = open_gguf(path)
    try:
        with _naming(path):
            refuse_other_kinds(file)
        if admit is not None:
            admit(file)
        with _naming(path):
            spec = find_spec(file.metadata)
            stretch_positions(file.metadata, rope)
            return Model(file, spec, spec.bind(file.metadata, tensor_types_of(file), ctx, kv_type))
    except BaseException:
        file.close()
        raise


def fuse(
    graph: Graph, disable: Sequence[str] = (), observe: Observe | None = None, regime: Regime = Regime.STEP
) -> tuple[Graph, tuple[PassReport, ...]]:
    """The graph after the passes of a regime, and what each of them did."""
    return run_pipeline(graph, tuple(disable), observe, regime)


def with_prefill(
    program: Program, graph: Graph, target: Target, disable: Sequence[str] = (), library: bool = False
) -> Program:
    """The Program of a decode step with the step of a prompt's chunk beside it.

    graph: the chunk's, unfused; library: its products are `LibraryProduct`s. UnsupportedModelError if there are no
    kernels for it: such a model takes its prompts in token by token.
    """
    fused = fuse(graph, disable, regime=Regime.MANY)[0]
    return lower(fused, target, regime=Regime.MANY, name=PREFILL, library=library, beside=program)


def build_program(
    model: Model,
    target: Target,
    outputs: Sequence[str] = (),
    disable: Sequence[str] = (),
    shapes: dict[str, dict[str, int]] | None = None,
    sampling: bool = False,
) -> Program:
    """The Program of a model on a target; the rest: see `Model.graph`, `fuse` and `lower`."""
    return lower(fuse(model.graph(outputs, sampling), disable)[0], target, shapes)
