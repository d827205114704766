"""Launch shapes that `psigraph tune` found, kept in the cache folder, one file a GPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..json_file import write_json_atomically
from ..runtime.cuda.driver import DeviceFacts
from ..runtime.cuda.kernel_cache import default_cache_dir

SCHEMA = "psigraph.tuned.v1"
KEYS = ("column_warps", "tile_warps", "ring_limit")
Shapes = dict[str, dict[str, int]]


def tuned_path(facts: DeviceFacts) -> Path:
    """Where the shapes for a GPU are kept: one file for a name, SM count and compute capability."""
    key = f"{facts.name} {facts.sm_count} {facts.capability[0]}.{facts.capability[1]}"
    return default_cache_dir() / "tuned" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def load_tuned(facts: DeviceFacts) -> Shapes:
    """The shapes kept for a GPU; none if there are none or the file is odd."""
    try:
        record = json.loads(tuned_path(facts).read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            return {}
        return {
            str(name): {str(key): int(value) for key, value in shape.items() if key in KEYS and int(value) > 0}
            for name, shape in record["shapes"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save_tuned(facts: DeviceFacts, shapes: Shapes) -> Path:
    """Keep shapes for a GPU beside those of other models; OutputError if that cannot be written."""
    path = tuned_path(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "gpu": facts.name,
        "sm_count": facts.sm_count,
        "shapes": {**load_tuned(facts), **shapes},
    }
    write_json_atomically(path, record)
    return path
