"""The token that a benchmark begins with where none is asked for."""

from __future__ import annotations

from pathlib import Path

IM_START = 151644  # <|im_start|> of Qwen: what the peers' benchmarks begin with, too


def first_token(path: Path) -> int:
    """<|im_start|> of Qwen where the file's vocabulary reaches so far, else its bos token, else 0.

    Raises what `open_gguf` raises.
    """
    from ..runtime.gguf.file import open_gguf
    from ..runtime.gguf.strings import StringArray

    with open_gguf(path) as file:
        words = file.metadata.get("tokenizer.ggml.tokens")
        count = len(words) if isinstance(words, (StringArray, list)) else 0
        bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    if count > IM_START:
        return IM_START
    return bos if type(bos) is int and 0 <= bos < count else 0
