"""What a file is that is no model to write text with: named, before anybody asks for keys that it does not have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...ir.errors import UnsupportedModelError
from .file import GgufFile

# `general.type` of a GGUF file -> what it is, and what is needed instead. "model" is the one that runs.
_TYPES = {
    "adapter": "a LoRA adapter, which changes another model's weights; merge it into that model first",
    "mmproj": "a multimodal projector (mmproj), which goes beside a model; give the model's own file",
    "imatrix": "an importance matrix (imatrix), which is made to quantize a model; give the model's own file",
    "vocab": "a vocabulary without a model; give the model's own file",
}
# llama.cpp's pooling types: 0 is none, 4 ranks, and the others make one vector of a text.
_RANK = 4
_EMBEDDING = "an embedding model, which makes vectors of texts and writes none"
_RERANKER = "a reranker, which scores texts and writes none"


def refuse_other_kinds(file: GgufFile) -> None:
    """UnsupportedModelError that names what the file is, unless it may be a model that writes text."""
    metadata, names = file.metadata, file.tensors
    kind = metadata.get("general.type")
    if isinstance(kind, str) and kind in _TYPES:
        raise UnsupportedModelError(f"this is {_TYPES[kind]}")
    architecture = str(metadata.get("general.architecture"))  # it may be no text, which is refused later
    if "adapter.type" in metadata or any(name.endswith((".lora_a", ".lora_b")) for name in names):
        raise UnsupportedModelError(f"this is {_TYPES['adapter']}")
    if architecture == "clip" or any(name.startswith(("v.blk.", "mm.")) for name in names):
        raise UnsupportedModelError(f"this is {_TYPES['mmproj']}")
    if "imatrix.chunk_count" in metadata:
        raise UnsupportedModelError(f"this is {_TYPES['imatrix']}")
    if not names and "tokenizer.ggml.tokens" in metadata:
        raise UnsupportedModelError(f"this is {_TYPES['vocab']}")
    found = _pooled(metadata, architecture) or (_RERANKER if any(re.match(r"cls\.", name) for name in names) else "")
    if found:
        raise UnsupportedModelError(f"this is {found}")


def _pooled(metadata: Mapping[str, Any], architecture: object) -> str:
    """What a model is whose hidden states are pooled, "" for one whose are not."""
    pooling = metadata.get(f"{architecture}.pooling_type")
    if f"{architecture}.classifier.output_labels" in metadata or (type(pooling) is int and pooling == _RANK):
        return _RERANKER
    return _EMBEDDING if type(pooling) is int and pooling else ""
