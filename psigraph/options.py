"""How a model is opened: the options that everything which opens a session hands on as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .build import Model
    from .gpu_start import GpuStart
    from .rope_scaling import RopeScaling
    from .runtime.gguf.file import GgufFile

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Filling:
    """Words for a request that does not fit into the context: what fills it, and what the user can do."""

    what: str = "prompt and new tokens"
    advice: str = "shorten the prompt or lower --max-new-tokens"


@dataclass(frozen=True)
class SessionOptions:
    """How `psigraph.session.open_session` opens a model; it raises UsageError for options that cannot work.

    backend      "cuda", "host" (generated kernels on this machine's CPU), "cpu" (numpy), or "auto": a GPU if one
                 works, else numpy.
    device       number of the GPU; the stand-in driver has one.
    ctx          positions that the caches hold; None: 4096, or `positions` if that is more, as far as the model allows.
    kv_type      "f16", or "q8": about half the memory of the KV cache, its keys and values rounded to 8 bits.
    rope         how positions are stretched, in place of what the file says; None: as the file says.
    cache_dtype  "f16", or "f32": a cache that is not rounded, in numpy only.
    outputs      ("logits",) to read logits back.
    sampling     draw tokens as `Session.set_sampler` says (at first: the likeliest); costs a kernel more a step.
    graph        replay a captured CUDA graph; False launches kernel after kernel.
    disable      passes to leave out.
    shapes       launch shapes, see `codegen.lower.lower`; None: those that `psigraph tune` kept for this GPU.
    prefill      how prompts go in, see `Session.prefill`: "own" kernels by chunks, a "library"'s products, "off": token
                 by token, "auto": the library on a GPU that has one, else own kernels, else, and always in numpy, token
                 by token. "own" and "library" are errors where they cannot be done.

    Of one opening:
    positions    how many positions the caller is going to fill, or a function that says so for the opened model.
    filling      how errors speak of `positions`.
    admit        called with the open file before anything else is asked of it, check: with the model before any
                 weight is read; both may raise.
    start        the driver of GPU `device`, on its way already; the session owns it then.
    on_load      (bytes read, bytes in all); on_compile: (kernels compiled, kernels in all).
    """

    backend: str = "auto"
    device: int = 0
    ctx: int | None = None
    kv_type: str = "f16"
    cache_dtype: str = "f16"
    outputs: Sequence[str] = ()
    sampling: bool = False
    graph: bool = True
    disable: Sequence[str] = ()
    shapes: dict[str, dict[str, int]] | None = None
    prefill: str = "auto"
    positions: int | Callable[[Model], int] | None = None
    filling: Filling = Filling()
    admit: Callable[[GgufFile], None] | None = None
    check: Callable[[Model], None] | None = None
    start: GpuStart | None = None
    on_load: Progress | None = None
    on_compile: Progress | None = None
    rope: RopeScaling | None = None


DEFAULTS = SessionOptions()
