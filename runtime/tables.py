"""Tables and constants that kernels read and the host computes once, tables in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..ir.errors import UnsupportedModelError, UsageError
from ..ir.program import Buffer

END_TOKEN_SLOTS = 8


def table_values(buffer: Buffer) -> np.ndarray:
    """The contents of a `table` buffer, in the dtype that kernels read."""
    if buffer.layout == "rope":
        attrs = dict(buffer.attrs)
        head_dim = int(attrs.pop("head_dim"))
        return rope_table(buffer.nbytes // (head_dim * 4), head_dim, attrs)
    raise UnsupportedModelError(f"{buffer.name}: no rule fills a table of kind {buffer.layout}")


def rope_table(positions: int, head_dim: int, attrs: Mapping[str, object]) -> np.ndarray:
    """Cosine and sine of every angle of RoPE (Su et al. 2021), NeoX order, stretched as the attributes say.

    Returns float32 [positions, head_dim / 2, 2]: pair (i, i + head_dim / 2) turns by position * `rope_speeds`.
    Angles are float64, so that late positions are exact.
    """
    speeds, magnitude = rope_speeds(head_dim, attrs)
    angles = np.arange(positions)[:, None] * speeds
    return np.stack([magnitude * np.cos(angles), magnitude * np.sin(angles)], axis=-1).astype(np.float32)


def rope_speeds(head_dim: int, attrs: Mapping[str, object]) -> tuple[np.ndarray, float]:
    """(radians a position of each pair, float64[head_dim / 2]; what cosine and sine are multiplied with).

    theta alone: theta^(-2 i / head_dim) and 1. With factor and attn_factor: the speeds divided by the one, the other.
    With original, beta_fast and beta_slow besides: YaRN (Peng et al. 2023), as ggml's rope_yarn blends it.
    UnsupportedModelError for another attribute.
    """
    unknown = set(attrs) - {"theta", "factor", "attn_factor", "original", "beta_fast", "beta_slow"}
    if unknown:
        raise UnsupportedModelError(f"rope attributes {', '.join(sorted(unknown))} have no kernel")
    given: dict[str, float] = {name: float(value) for name, value in attrs.items()}  # type: ignore[arg-type]
    theta, factor, magnitude = given["theta"], given.get("factor", 1.0), given.get("attn_factor", 1.0)
    pairs = np.arange(head_dim // 2)
    speeds = theta ** (-2.0 * pairs / head_dim)
    if "original" not in given:
        return speeds / factor, magnitude
    # The pairs that make beta_fast turns and beta_slow turns within the original context are the ends of the ramp.
    turns = np.array([given["beta_fast"], given["beta_slow"]])
    ends = head_dim * np.log(given["original"] / (2 * np.pi * turns)) / (2 * np.log(theta))
    low, high = max(0.0, float(np.floor(ends[0]))), min(head_dim - 1.0, float(np.ceil(ends[1])))
    ramp = np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)
    return speeds * (1 - ramp + ramp / factor), magnitude * (1 + 0.1 * float(np.log(factor)))


def end_token_slots(end_tokens: Sequence[int]) -> np.ndarray:
    """The constant `end_tokens`: int32[8], padded with -1; UsageError if there are more."""
    if len(end_tokens) > END_TOKEN_SLOTS:
        raise UsageError(f"{len(end_tokens)} end tokens; at most {END_TOKEN_SLOTS} are supported")
    slots = np.full(END_TOKEN_SLOTS, -1, np.int32)
    slots[: len(end_tokens)] = list(end_tokens)
    return slots
