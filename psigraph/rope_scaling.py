"""Positions stretched by an option in place of the file's keys: for a context beyond the one that the file declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .ir.errors import UsageError

KINDS = ("none", "linear", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """kind: "yarn", "linear", or "none": not at all. scale: how many times the original context; 1 with "none".

    UsageError for a kind or scale that there is not.
    """

    kind: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"rope scaling {self.kind}: choose one of {', '.join(KINDS)}")
        if self.kind == "none" and self.scale != 1:
            raise UsageError("rope scaling none stretches nothing; leave the scale (--rope-scale) out")
        if self.kind != "none" and not 1 < self.scale <= 1024:
            raise UsageError(f"rope scaling {self.kind}: give a scale (--rope-scale) above 1, at most 1024")


def rope_scaling(kind: str | None, scale: float | None) -> RopeScaling | None:
    """The value of two options; UsageError for a scale alone."""
    if kind is None:
        if scale is not None:
            raise UsageError(f"--rope-scale {scale:g}: give --rope-scaling yarn or linear with it")
        return None
    return RopeScaling(kind, 1.0 if scale is None else scale)


def stretch_positions(metadata: dict[str, Any], rope: RopeScaling | None) -> None:
    """Write what was asked for over the header's own keys; the context grows with it.

    The original context is the file's own word for it, or its context.
    """
    if rope is None:
        return
    prefix = f"{metadata['general.architecture']}."
    scaling = f"{prefix}rope.scaling."
    original = metadata.get(f"{scaling}original_context_length", metadata.get(f"{prefix}context_length"))
    kept = {f"{scaling}yarn_beta_fast", f"{scaling}yarn_beta_slow"} if rope.kind == "yarn" else set()
    for key in [key for key in metadata if key.startswith(scaling) or key == f"{prefix}rope.scale_linear"]:
        if key not in kept:
            del metadata[key]
    if type(original) is int:  # of another type: the spec says so
        metadata[f"{prefix}context_length"] = int(original * rope.scale)
    metadata[f"{scaling}type"] = rope.kind
    if rope.kind != "none":
        metadata[f"{scaling}factor"] = float(rope.scale)
    if rope.kind == "yarn":
        metadata[f"{scaling}original_context_length"] = original
