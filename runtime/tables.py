"""Tables that kernels read and the host computes once, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..ir.errors import UnsupportedModelError
from ..ir.program import Buffer


def table_values(buffer: Buffer) -> np.ndarray:
    """The contents of a `table` buffer, in the dtype that kernels read."""
    if buffer.layout == "rope":
        attrs = dict(buffer.attrs)
        head_dim = int(attrs.pop("head_dim"))
        return rope_table(buffer.nbytes // (head_dim * 4), head_dim, attrs)
    raise UnsupportedModelError(f"{buffer.name}: no rule fills a table of kind {buffer.layout}")


def rope_table(positions: int, head_dim: int, attrs: Mapping[str, object]) -> np.ndarray:
    """Cosine and sine of every angle of RoPE (Su et al. 2021), NeoX order.

    Returns float32 [positions, head_dim / 2, 2]: pair (i, i + head_dim / 2) turns by
    position * theta^(-2 i / head_dim). Angles are float64, so that late positions are exact.
    """
    unknown = set(attrs) - {"theta"}
    if unknown:
        raise UnsupportedModelError(f"rope attributes {', '.join(sorted(unknown))} have no kernel")
    theta = float(attrs["theta"])  # type: ignore[arg-type]
    frequencies = theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    angles = np.arange(positions)[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
