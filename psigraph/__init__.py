"""psigraph: YAML model block -> IR -> fused CUDA kernels -> one CUDA graph replayed per token.

import psigraph

with psigraph.load("model.gguf") as model:      # a GPU if one works, else numpy
    for piece in model.generate("The whale", max_new_tokens=32):
        print(piece, end="")

psigraph.compile("model.gguf", "compiled", arches=["sm_89", "sm_90a"])      # needs no GPU
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from .api import LanguageModel
    from .inspect.compilation import Compilation

    __version__: str

__all__ = ["SamplerSettings", "__version__", "compile", "load"]


def __getattr__(name: str) -> Any:
    # What takes long to import is imported when it is asked for: `psigraph --help` need not wait for numpy, and a
    # command on its way to the first token not for importlib.metadata.
    if name == "__version__":
        from .version import package_version

        return package_version()
    if name == "SamplerSettings":
        from .text.sampler import SamplerSettings

        return SamplerSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(
    path: str | os.PathLike[str],
    backend: str = "auto",
    *,
    ctx: int | None = None,
    kv_type: str = "f16",
    device: int = 0,
    sampling: bool = False,
    outputs: Sequence[str] = (),
    allow_blocked_quantization: bool = False,
    expect_sha256: str | None = None,
    policy: str | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    template_vars: Mapping[str, Any] | None = None,
    **options: Any,
) -> LanguageModel:
    """A model, ready to write text: see `psigraph.api.LanguageModel` for its methods.

    path      a GGUF file.
    backend   "cuda"; "cpu": numpy, slow and exact; "host": the generated kernels on this machine's CPU; "auto": a GPU
              if one works, else "cpu".
    ctx       positions that the KV cache holds; None: 4096, or the model's limit if that is less.
    kv_type   "f16", or "q8": keys and values in 8 bits, in about half the memory; what it costs: docs/performance.md.
    device    number of the GPU.
    sampling  be ready to draw tokens by chance; without it the first request that does loads the model anew.
    outputs   ("logits",): be ready to give logits back; without it the first `logits` loads the model anew.
    allow_blocked_quantization, expect_sha256: as the command line's options of these names.
    policy    "medpsy": apply the medical policy to any model; MedPsy files bring it with them.
    chat_template  another template than the file's default: a text, a path, or the name of one of the file's.
    template_vars  further variables for it, such as {"enable_thinking": False}.
    options   further ones of `psigraph.options.SessionOptions`: prefill, graph, disable, cache_dtype, on_load, ...

    What the policy says about the file comes as UserWarning. Errors are those of `psigraph.ir.errors`: ModelFileError,
    UnsupportedModelError, PolicyRefusal, UsageError, DeviceError, OutOfMemoryError; and TypeError.
    """
    from .api import LanguageModel
    from .arguments import in_own_words, session_options

    given = session_options(
        options, backend=backend, device=device, ctx=ctx, kv_type=kv_type, sampling=sampling, outputs=outputs
    )
    with in_own_words():
        return LanguageModel(
            path,
            given,
            allow_blocked_quantization=allow_blocked_quantization,
            expect_sha256=expect_sha256,
            policy=policy,
            chat_template=chat_template,
            template_vars=template_vars,
        )


def compile(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    arches: Sequence[str] = (),
    disable: Sequence[str] = (),
    ctx: int | None = None,
    kv_type: str = "f16",
) -> Compilation:
    """A model file through every stage to machine code, and into the folder `out` if one is named.

    arches: such as "sm_90a"; none: this machine's GPU, or sm_90a. disable: passes to leave out. ctx: positions that
    the KV cache holds, kv_type: their type, "f16" or "q8". Errors are those of `psigraph.ir.errors`.
    """
    from .arguments import in_own_words, texts, whole_or_none
    from .inspect.compilation import (
        compile_stages,
        default_target,
        gpu_target,
        source_of_file,
        staged,
        write_compilation,
    )

    named, left_out, positions = texts("arches", arches), texts("disable", disable), whole_or_none("ctx", ctx)
    with in_own_words():
        targets = [gpu_target(arch) for arch in named] or [default_target()]
        compilation = compile_stages(staged(source_of_file(path, positions, kv_type), left_out), targets)
        if out is not None:
            write_compilation(compilation, out)
    return compilation
