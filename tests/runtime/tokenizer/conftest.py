"""The tiny model's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizer_file import a_file

from psigraph.runtime.gguf.file import open_gguf
from psigraph.runtime.tokenizer.bpe import Tokenizer

TINY = Path(__file__).parents[3] / "fixtures" / "tiny" / "tiny-qwen3-q4_k_m.gguf"


@pytest.fixture(scope="module")
def metadata():
    with open_gguf(TINY) as file:
        return file.metadata


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return Tokenizer(a_file(metadata))
