"""What a Tokenizer reads of a model file, changed."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any


def a_file(metadata: Mapping[str, Any], **changes: Any) -> Any:
    """A change to None removes the key `tokenizer.ggml.<name>`."""
    changed = {**metadata, **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}}
    kept = {key: value for key, value in changed.items() if value is not None}
    return SimpleNamespace(metadata=kept, value_offsets=dict.fromkeys(kept, 77))
