"""Launch shapes that `psigraph tune` found, kept in the cache folder, one file a GPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..ir.errors import OutputError
from ..json_file import write_json_atomically
from ..runtime.cuda.driver import DeviceFacts
from ..runtime.cuda.kernel_cache import default_cache_dir
from ..runtime.private_cache import make_private, read_private

SCHEMA = "psigraph.tuned.v1"
LARGEST = {"column_warps": 24, "tile_warps": 24, "ring_limit": 256 << 10}  # what a shape may say, in warps and bytes
Shapes = dict[str, dict[str, int]]


def tuned_path(facts: DeviceFacts) -> Path:
    """Where the shapes for a GPU are kept: one file for a name, SM count and compute capability."""
    key = f"{facts.name} {facts.sm_count} {facts.capability[0]}.{facts.capability[1]}"
    return default_cache_dir() / "tuned" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def load_tuned(facts: DeviceFacts) -> Shapes:
    """The shapes kept for a GPU; none if there are none, the file is odd, or others could have written it."""
    path = tuned_path(facts)
    try:
        if path.exists():
            make_private(path.parent)
        record = json.loads(read_private(path))
        if record["schema"] != SCHEMA:
            return {}
        found = {
            str(name): {key: int(shape[key]) for key in LARGEST if key in shape}
            for name, shape in record["shapes"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return {name: shape for name, shape in found.items() if all(0 < shape[key] <= LARGEST[key] for key in shape)}


def save_tuned(facts: DeviceFacts, shapes: Shapes) -> Path:
    """Keep shapes for a GPU beside those of other models; OutputError if that cannot be written."""
    path = tuned_path(facts)
    try:
        make_private(path.parent)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be written: {error.strerror}") from None
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "gpu": facts.name,
        "sm_count": facts.sm_count,
        "shapes": {**load_tuned(facts), **shapes},
    }
    write_json_atomically(path, record)
    return path
