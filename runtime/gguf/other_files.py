"""What a file is that does not begin like GGUF."""

from __future__ import annotations

import re

# First bytes -> what a file is that is not GGUF at all.
_BEGINNINGS = (
    (rb"version https://git-lfs", "a Git LFS pointer, which stands for the file; fetch that (git lfs pull)"),
    (rb"\s*(?i:<!doctype|<html|<\?xml|<head)", "a web page, not the file; take the link of the download itself"),
    (rb".{8}\{", "a safetensors file; convert it to GGUF (llama.cpp's convert_hf_to_gguf.py)"),
    (rb"PK\x03\x04", "a zip archive, as PyTorch writes; convert the model to GGUF"),
    (rb"\x80[\x02-\x05]", "a pickle, as PyTorch writes; convert the model to GGUF"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "compressed; unpack it first"),
    (rb"lmgg|fmgg|tjgg|algg", "a file from before GGUF; convert the model again"),
    (rb".{8}(?:blk\.|output|token_embd)", "an importance matrix (imatrix), not a model"),
    (rb"\s*\{", "JSON, not a model"),
)
BEGINNING = 64  # bytes that `foreign_kind` wants


def foreign_kind(begin: bytes) -> str:
    """What a file is that begins like this and not like GGUF; "" where nobody can tell."""
    return next((what for form, what in _BEGINNINGS if re.match(form, begin, re.DOTALL)), "")
