"""psigraph: YAML model block -> IR -> fused CUDA kernels -> one CUDA graph replayed per token.

import psigraph

with psigraph.load("model.gguf") as session:      # a GPU if one works, else numpy
    session.feed([151644])
    for tokens in session.decode(64):
        print(tokens)

psigraph.compile("model.gguf", "compiled", arches=["sm_89", "sm_90a"])      # needs no GPU
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from .compilation import Compilation
    from .session import Session

try:
    __version__ = version("psigraph")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", "compile", "load"]


def load(path: str | os.PathLike[str], backend: str = "auto", **options: Any) -> Session:
    """A model, ready to decode: see `psigraph.session.Session`, and `open_session` there for options and errors."""
    # Imported here, so that `psigraph --version` and `--help` need not wait for numpy.
    from .session import open_session

    return open_session(path, backend, **options)


def compile(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    arches: Sequence[str] = (),
    disable: Sequence[str] = (),
    ctx: int | None = None,
) -> Compilation:
    """A model file through every stage to machine code, and into the folder `out` if one is named.

    arches: such as "sm_90a"; none: this machine's GPU, or sm_90a. disable: passes to leave out. ctx: positions that
    the KV cache holds. Errors are those of `psigraph.ir.errors`.
    """
    from .compilation import (
        compile_stages,
        default_target,
        gpu_target,
        source_of_file,
        stages_of,
        write_compilation,
    )

    targets = [gpu_target(arch) for arch in arches] or [default_target()]
    compilation = compile_stages(stages_of(source_of_file(path, ctx), disable), targets)
    if out is not None:
        write_compilation(compilation, out)
    return compilation
