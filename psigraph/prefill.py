"""How prompts go in: which of the ways a machine takes, and everything that it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .build import Model, with_prefill
from .codegen.lower import PREFILL_ROWS
from .codegen.target import Target
from .ir.errors import UsageError
from .ir.program import Program
from .runtime.cuda.kernel_cache import KernelCache, default_cache_dir
from .runtime.engine import PrefillMaker, PrefillPlan
from .runtime.library import Library

if TYPE_CHECKING:
    from .runtime.cuda.compiler import CompiledKernel
    from .runtime.cuda.driver import Driver

PREFILLS = ("auto", "own", "library", "off")


EXPLICIT = ("own", "library")
"""Ways that nothing else may take the place of."""


def check_prefill(prefill: str, backend: str, why: str = "") -> None:
    """UsageError for a way that does not exist, or not on this backend. why: how it came to be this one."""
    if prefill not in PREFILLS:
        raise UsageError(f"prefill {prefill}: choose one of {', '.join(PREFILLS)}")
    if prefill in EXPLICIT and backend == "cpu":
        raise UsageError(f"prefill {prefill}: {why}numpy takes prompts in token by token; take auto or off")
    if prefill == "library" and backend not in ("cuda", "auto"):
        raise UsageError(f"prefill library: the backend {backend} has no library for products; take own or auto")


def prefill_maker(
    prefill: str, backend: str, model: Model, sampling: bool, disable: Sequence[str], target: Target, driver: Driver
) -> PrefillMaker | None:
    """What an engine calls for its first prompt, None for "off".

    UsageError, when it is called, if "library" was asked for and no library is found.
    """
    if prefill == "off":
        return None

    def make(program: Program, compiled: Mapping[str, CompiledKernel]) -> PrefillPlan:
        from .runtime.cuda.compiler import compile_program

        library = _library(driver, prefill) if backend == "cuda" and prefill in ("auto", "library") else None
        try:
            graph = model.graph((), sampling, PREFILL_ROWS)
            both = with_prefill(program, graph, target, disable, library is not None)
            cache = KernelCache(default_cache_dir())
            return PrefillPlan(both, compile_program(both, target.arch, cache, known=compiled), library)
        except BaseException:
            if library is not None:
                library.close()
            raise

    return make


def _library(driver: Driver, prefill: str) -> Library | None:
    from .runtime.cuda.cublas import open_cublas

    library, reason = open_cublas(driver)
    if library is None and prefill == "library":
        raise UsageError(f"prefill library: {reason}")
    return library
