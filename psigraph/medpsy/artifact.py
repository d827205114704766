"""What a model file is, for reports and for admission: its size, its block types, its digests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ..build import Model
from ..ir.errors import UsageError
from ..runtime.cuda.kernel_cache import default_cache_dir
from ..runtime.gguf.file import GgufFile
from .policy import Admission, admit, load_policy, matrix_types, template_digest

Progress = Callable[[int, int], None]


def tensor_types(file: GgufFile) -> dict[str, str]:
    """Tensor name -> ggml type of every tensor in the file."""
    return {name: info.dtype for name, info in file.tensors.items()}


def parameter_count(model: Model) -> int:
    """Weights in the file, norms included; a tied head counts once."""
    return sum(type_.size for type_ in model.binding.tensors.values())


def size_label(file: GgufFile) -> str:
    """The published size that has these widths ("1.7b"), or "" for none; layers are not asked."""
    architecture = file.metadata.get("general.architecture")
    hidden, feed_forward = (
        file.metadata.get(f"{architecture}.{key}") for key in ("embedding_length", "feed_forward_length")
    )
    if not isinstance(hidden, int) or not isinstance(feed_forward, int):
        return ""
    return load_policy().size_label(hidden, feed_forward)


def model_size(model: Model) -> str:
    """What reports call the size: "1.7b"; "1.7b with 4 layers" where the number of layers is not the published one;
    "8.9m", counted, for widths of no published size."""
    label = size_label(model.file)
    if not label:
        count = parameter_count(model)
        return f"{count / 1e9:.1f}b" if count >= 1e9 else f"{count / 1e6:.1f}m"
    layers = next(row["layers"] for row in load_policy().data["sizes"] if row["label"] == label)
    found = model.binding.layers
    return label if layers == found else f"{label} with {found} layer{'s' if found != 1 else ''}"


def check_model_size(model: Model, asked: str | None) -> str:
    """The file's size; UsageError if another was asked for."""
    found = model_size(model)
    if asked is not None and asked.lower() != found:
        sizes = model.binding.sizes
        raise UsageError(
            f"--model-size {asked}: the file holds a model of size {found} "
            f"(hidden {sizes['hidden']}, {model.binding.layers} layers); give --model-size '{found}' or leave it out"
        )
    return found


def is_synthetic(model: Model) -> bool:
    """Whether the file says that its weights are random."""
    return model.file.metadata.get("psigraph.synthetic") is True


def admit_file(
    file: GgufFile,
    *,
    allow_blocked: bool = False,
    expect_sha256: str | None = None,
    policy_active: bool = False,
    with_digest: bool = True,
    on_hash: Progress | None = None,
) -> Admission:
    """The policy's word on a file, from its header and, unless `with_digest` is False, its digest.

    An expected digest is always computed. Raises as `policy.admit` does.
    """
    template = file.metadata.get("tokenizer.chat_template")
    digest = None
    if with_digest or expect_sha256 is not None:
        digest = file.sha256(on_hash, default_cache_dir())
    return admit(
        load_policy(),
        tensor_types(file),
        digest,
        template_digest(template) if isinstance(template, str) else None,
        size_label=size_label(file),
        allow_blocked=allow_blocked,
        expect_sha256=expect_sha256,
        policy_active=policy_active,
    )


def artifact_record(model: Model) -> dict[str, Any]:
    """For a report: name, parameters, block types of the matrices (tensors and bytes), synthetic or not, and the
    tokens that end a text, with why."""
    from ..text.thinking import ends_of_file

    tensors = model.file.tensors
    matrices = matrix_types(tensor_types(model.file))
    counts = Counter(matrices.values())
    return {
        "file": model.file.path.name,
        "file_bytes": model.file.size,
        "name": str(model.file.metadata.get("general.name", "")),
        "architecture": str(model.file.metadata.get("general.architecture", "")),
        "parameters": parameter_count(model),
        "layers": model.binding.layers,
        "synthetic": is_synthetic(model),
        "quant_mix": dict(sorted(counts.items())),
        "quant_bytes": {
            kind: sum(tensors[name].nbytes for name, dtype in matrices.items() if dtype == kind)
            for kind in sorted(counts)
        },
        "end_tokens": [end.record() for end in ends_of_file(model.file)],
    }
