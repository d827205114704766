"""How a text is split before its letters are merged: one rule a row, by `tokenizer.ggml.pre`.

Source: llama.cpp's src/llama-vocab.cpp, and the tokenizer.json files that it quotes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterator

from ...ir.errors import UnsupportedModelError, UsageError
from ..gguf.file import GgufFile
from .end_tokens import PREFIX, broken

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Marks, such as the vowels of Devanagari, belong to their word.
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp gives the first and the last name the same rule.
SPLITS = {"qwen2": _QWEN2, "qwen35": _QWEN35, "deepseek-r1-qwen": _QWEN2}
_NEAREST = "qwen2"
_UNTOLD = (None, "default")  # what converters write that did not know the vocabulary
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # every Qwen vocabulary has them

PIECE = 1 << 16
"""Characters that are split and merged at once, or a few more: the library takes 250 bytes for each."""
LONGEST_RUN = 1 << 20
"""Characters without a place to cut; its regular expressions give up, by a panic, at some millions."""
# Where every rule of the table splits, whatever stands around: behind a digit, and behind a letter that is followed by
# what is neither letter nor mark. A rule looks ahead from white space alone, so nothing else changes by a cut here.
_CUT = re.compile("(?<=[A-Za-z\u3041-\u3096\u4e00-\u9fa5])(?=[\\x00-\\x40\u3001\u3002\uff0c])|(?<=[0-9])")


def split_rule(file: GgufFile, vocabulary: Container[str]) -> str:
    """The regular expression of the file's rule; a Qwen vocabulary without one gets the nearest, with a warning.

    ModelFileError where the key is no text, UnsupportedModelError for a rule that is not in the table.
    """
    key = f"{PREFIX}pre"
    name = file.metadata.get(key)
    if name is not None and not isinstance(name, str):
        raise broken(file, key, "must be a text")
    if name in SPLITS:
        return SPLITS[name]
    found = "is missing" if name is None else f"is {ascii(name)[:80]}"
    if name in _UNTOLD and all(token in vocabulary for token in _QWEN_TOKENS):
        warnings.warn(f"{key} {found}: texts are split as Qwen2's are, which is near", stacklevel=2)
        return SPLITS[_NEAREST]
    works = f"the split rules {', '.join(map(repr, SPLITS))} are supported"
    raise UnsupportedModelError(f"{key} {found}; {works}. Token ids (--prompt-token-ids) work without a tokenizer")


def pieces(text: str) -> Iterator[str]:
    """The text in pieces that can be split one by one; UsageError for a run of characters that is too long."""
    begin = 0
    while len(text) - begin > PIECE:
        found = _CUT.search(text, begin + PIECE, begin + LONGEST_RUN)
        if found is None:
            break
        yield text[begin : found.start()]
        begin = found.start()
    if len(text) - begin > LONGEST_RUN:
        raise UsageError(
            f"the text has a run of more than {LONGEST_RUN:,} characters without a word's end or a digit; "
            "break it up, by words or numbers for example"
        )
    yield text[begin:]
