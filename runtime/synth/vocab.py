"""The vocabulary of synthetic models: as large as Qwen3's, with its special tokens, without its text.

Byte tokens and merges are real (any text can be encoded and decoded), but the merges are letters counted up, not
learned: `aa`, `ab`, ... `zz`, `aaa`, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from string import ascii_lowercase
from typing import NamedTuple

from ..tokenizer.byte_letters import BYTE_LETTERS

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# Qwen3's, in its order; control tokens are llama.cpp's "special", the rest it treats as text with a fixed id.
_SPECIAL = (
    ("<|endoftext|>", CONTROL), ("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL),
    ("<|object_ref_start|>", CONTROL), ("<|object_ref_end|>", CONTROL), ("<|box_start|>", CONTROL),
    ("<|box_end|>", CONTROL), ("<|quad_start|>", CONTROL), ("<|quad_end|>", CONTROL),
    ("<|vision_start|>", CONTROL), ("<|vision_end|>", CONTROL), ("<|vision_pad|>", CONTROL),
    ("<|image_pad|>", CONTROL), ("<|video_pad|>", CONTROL), ("<tool_call>", USER_DEFINED),
    ("</tool_call>", USER_DEFINED), ("<|fim_prefix|>", USER_DEFINED), ("<|fim_middle|>", USER_DEFINED),
    ("<|fim_suffix|>", USER_DEFINED), ("<|fim_pad|>", USER_DEFINED), ("<|repo_name|>", USER_DEFINED),
    ("<|file_sep|>", USER_DEFINED), ("<tool_response>", USER_DEFINED), ("</tool_response>", USER_DEFINED),
    ("<think>", USER_DEFINED), ("</think>", USER_DEFINED),
)  # fmt: skip
QWEN3_SIZE = 151_936
_QWEN3_UNUSED = 267  # ids that the embedding has and the tokenizer does not
SMALLEST = len(BYTE_LETTERS) + len(_SPECIAL)


class Vocabulary(NamedTuple):
    """tokens, merges and token types as a GGUF file stores them, and the id of the first special token."""

    tokens: list[str]
    merges: list[str]
    types: list[int]
    first_special: int


def synthetic_vocabulary(size: int = QWEN3_SIZE) -> Vocabulary:
    """A vocabulary of `size` tokens, at least SMALLEST; Qwen3's size gives Qwen3's ids of the special tokens."""
    unused = _QWEN3_UNUSED if size == QWEN3_SIZE else 0
    first_special = size - unused - len(_SPECIAL)
    pairs = list(islice(_words(), first_special - len(BYTE_LETTERS)))
    tokens = [*BYTE_LETTERS, *(head + tail for head, tail in pairs), *(text for text, _ in _SPECIAL)]
    types = [NORMAL] * first_special + [kind for _, kind in _SPECIAL] + [UNUSED] * unused
    tokens += [f"[PAD{index}]" for index in range(len(tokens), size)]
    return Vocabulary(tokens, [f"{head} {tail}" for head, tail in pairs], types, first_special)


def _words() -> Iterator[tuple[str, str]]:
    """All words of two letters, then three, and so on, each as (the word before its last letter, that letter)."""
    length = 1
    while True:
        for head in product(ascii_lowercase, repeat=length):
            for tail in ascii_lowercase:
                yield "".join(head), tail
        length += 1
