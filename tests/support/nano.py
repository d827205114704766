"""A model file of one layer, so small that its whole life on the stand-in driver takes milliseconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from psigraph.runtime.synth import model as synth
from psigraph.runtime.synth.model import SMALLEST, Size, write_synth

LAYER = Size(layers=1, hidden=256, feed_forward=256, heads=2, kv_heads=1, untied=False, context=64)
PROMPT = (1, 2)


def write_nano(folder: Path, vocab: int = SMALLEST) -> Path:
    """The file, in a folder; the same bytes every time. The smallest vocabulary has no merges, and so no tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synth.SIZES, "nano", LAYER)
        return write_synth(folder / "nano.gguf", "nano", "q4_k_m", 1, vocab=vocab)
