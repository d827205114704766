"""The tiny real model of fixtures/tiny, its references, and files that are wrong in one way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
Q4 = TINY / "tiny-qwen3-q4_k_m.gguf"
Q8 = TINY / "tiny-qwen3-q8_0.gguf"
Q4_SHA256 = "a7d5630ab3307120c7b99f63b1c10a45d92712d93f38f484dfb8b9f042340691"


def reference_logits(path: Path) -> tuple[list[int], np.ndarray]:
    """(ids, float64 logits [64, 4096]) of the recorded text."""
    with np.load(TINY / "reference_logits.npz") as stored:
        key = path.stem.removeprefix("tiny-qwen3-")
        return stored["ids"].tolist(), stored[f"logits_{key}"].astype(np.float64)


def reference_greedy(path: Path, prompt: str) -> tuple[list[int], list[int], list[float]]:
    """(prompt ids, 64 greedy ids, gap between the two best logits at each)."""
    stored: dict[str, Any] = json.loads((TINY / "reference_greedy.json").read_text())
    found = stored["greedy"][path.stem.removeprefix("tiny-qwen3-")][prompt]
    gaps = next(value for key, value in found.items() if key != "ids")
    return stored["prompts"][prompt]["ids"], found["ids"], gaps


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of every row, in nats."""

    def log_probabilities(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    p, q = log_probabilities(reference), log_probabilities(other)
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def changed(path: Path, old: bytes, new: bytes) -> Path:
    """Writes the tiny model to `path` with the first `old` replaced by `new` of the same length."""
    assert len(old) == len(new)
    data = Q4.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    return path
