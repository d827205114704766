"""A model file's vocabulary, read and checked: its tokens, their kinds, and the library's encoder of its merges."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers

from ...ir.errors import ModelFileError, UnsupportedModelError
from ..gguf.file import GgufFile
from ..gguf.strings import StringArray
from .byte_letters import BYTE_LETTERS, BYTE_OF_LETTER
from .end_tokens import CONTROL, NORMAL, PREFIX, UNKNOWN, USER_DEFINED, broken
from .panics import as_error
from .special_tokens import MAX_LETTERS
from .splits import split_rule

# Qwen3 has 151,936 tokens and 151,387 merges; models that speak add tens of thousands of tokens, and no merges. With
# these bounds, reader and tokenizer together take no more than a second and 64 MB + 5x the file's metadata.
MAX_TOKENS = 1 << 18
MAX_MERGES = 3 << 16

_WITHOUT = "Token ids (--prompt-token-ids) work without a tokenizer"

LITERAL = (UNKNOWN, CONTROL, USER_DEFINED)
"""Kinds of tokens that stand for their own text, and are found in a text before it is split."""


def require_kind(file: GgufFile) -> None:
    """The file must say that its tokenizer is byte-level BPE."""
    key = f"{PREFIX}model"
    model = file.metadata.get(key)
    if model is not None and not isinstance(model, str):
        raise broken(file, key, "must be a text")
    if model != "gpt2":
        raise _unsupported(key, model, "byte-level BPE ('gpt2') is supported")


def read_tokens(file: GgufFile) -> Sequence[str]:
    """The texts of all tokens."""
    return _strings(file, "tokens", MAX_TOKENS)


def read_kinds(file: GgufFile, count: int) -> NDArray[np.integer[Any]]:
    """Each token's kind; a file without the key has only normal tokens."""
    key = f"{PREFIX}token_type"
    value = file.metadata.get(key)
    if value is None:
        return np.full(count, NORMAL)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != count:
        raise broken(file, key, f"must be an array of {count} whole numbers, one for each token")
    return value


def build(
    file: GgufFile, tokens: Sequence[str], kinds: NDArray[np.integer[Any]]
) -> tuple[tokenizers.Tokenizer, dict[str, int], int]:
    """The encoder of a text between special tokens, the special tokens (text -> id), and the longest token's length.

    ModelFileError, UnsupportedModelError: see `bpe.Tokenizer`.
    """
    texts = list(tokens)
    ids, longest = _ids(file, texts), max(map(len, texts))
    rule = split_rule(file, ids)
    literal = {texts[index]: index for index in np.flatnonzero(np.isin(kinds, LITERAL)).tolist() if texts[index]}
    for text, index in literal.items():
        if len(text) > MAX_LETTERS:
            raise UnsupportedModelError(
                f"{PREFIX}tokens: token {index} is a special one of {len(text):,} letters; up to {MAX_LETTERS} are "
                f"supported. {_WITHOUT}"
            )
    heads, tails, used = _merges(file, ids)
    if not used.all():  # no merge makes the others, so the library need not know them
        ids = {texts[index]: index for index in np.flatnonzero(used).tolist()}
    return _encoder(file, _Merges(texts, ids, heads, tails), rule), literal, longest


def _encoder(file: GgufFile, merges: _Merges, rule: str) -> tokenizers.Tokenizer:
    def at_fault(what: str) -> ModelFileError:  # with the vocabulary checked, a merge is
        return broken(file, f"{PREFIX}merges", what)

    with as_error(at_fault):
        encoder = tokenizers.Tokenizer(models.BPE(vocab=merges.ids, merges=merges))
        encoder.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(rule), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return encoder


class _Merges(Sequence[tuple[str, str]]):
    """Merges as pairs of texts, for the library: to be read once.

    Each is made when it is asked for, which saves 100 bytes for each; and the library has copied the vocabulary when
    it reads them, so texts and ids are let go when it is through, before it builds its tables: that saves as much for
    each token.
    """

    def __init__(self, texts: list[str], ids: dict[str, int], heads: array[int], tails: array[int]) -> None:
        self.ids = ids
        self._texts, self._heads, self._tails = texts, heads, tails

    def __len__(self) -> int:
        return len(self._heads)

    def __getitem__(self, index: Any) -> Any:
        return self._texts[self._heads[index]], self._texts[self._tails[index]]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        text = self._texts.__getitem__
        yield from zip(map(text, self._heads), map(text, self._tails), strict=True)
        self.ids.clear()
        self._texts.clear()


def _unsupported(key: str, value: object, works: str) -> UnsupportedModelError:
    found = "is missing" if value is None else f"is {ascii(value)[:80]}"
    return UnsupportedModelError(f"{key} {found}; {works}. {_WITHOUT}")


def _strings(file: GgufFile, name: str, most: int) -> Sequence[str]:
    key = PREFIX + name
    value = file.metadata.get(key)
    if value is None:
        raise _unsupported(key, None, "the file must carry its vocabulary")
    if not isinstance(value, (StringArray, list)) or not value:
        raise broken(file, key, "must be an array of strings that is not empty")
    if len(value) > most:
        raise UnsupportedModelError(f"{key} has {len(value):,} strings; up to {most:,} are supported. {_WITHOUT}")
    return value


def _ids(file: GgufFile, texts: list[str]) -> dict[str, int]:
    """Text -> id, for a vocabulary that has the 256 bytes and no text twice."""
    key = f"{PREFIX}tokens"
    for first in range(0, len(texts), 4096):
        try:
            "".join(texts[first : first + 4096]).encode("utf-8")
        except UnicodeEncodeError:
            raise broken(file, key, "a token is not UTF-8") from None
    ids = {text: index for index, text in enumerate(texts)}
    empty = len(texts) - sum(map(bool, texts)) if "" in ids else 0
    if len(ids) + max(0, empty - 1) != len(texts):
        twice = next(index for index, text in enumerate(texts) if text and ids[text] != index)
        raise broken(file, key, f"tokens {twice} and {ids[texts[twice]]} are the same text")
    if empty:
        warnings.warn(f"{empty} tokens have no text: no text becomes one of them", stacklevel=2)
    missing = [letter for letter in BYTE_LETTERS if letter not in ids]
    if missing:
        raise broken(
            file, key, f"no token for {len(missing)} of the 256 bytes, 0x{BYTE_OF_LETTER[missing[0]]:02x} first"
        )
    return ids


def _merges(file: GgufFile, ids: Mapping[str, int]) -> tuple[array[int], array[int], NDArray[np.bool_]]:
    """Ids of each merge's two parts, and which tokens are a byte, a part or a result.

    The library panics where a part or a result is no token.
    """
    heads, tails, results = array("i"), array("i"), array("i")
    merges, id_of = _strings(file, "merges", MAX_MERGES), ids.__getitem__
    for first in range(0, len(merges), 4096):
        some = merges[first : first + 4096]
        pairs = [merge.partition(" ") for merge in some]
        try:
            heads.extend(map(id_of, [head for head, _, _ in pairs]))
            tails.extend(map(id_of, [tail for _, _, tail in pairs]))
            results.extend(map(id_of, [head + tail for head, _, tail in pairs]))
        except KeyError:
            raise _bad_merge(file, first, some, ids) from None
    used = np.zeros(max(ids.values()) + 1, np.bool_)
    used[[ids[letter] for letter in BYTE_LETTERS]] = True
    for part in (heads, tails, results):
        used[np.frombuffer(part, np.int32)] = True
    return heads, tails, used


def _bad_merge(file: GgufFile, first: int, merges: Sequence[str], ids: Mapping[str, int]) -> ModelFileError:
    """Names the first wrong one of some merges; `first` is the number of the first of them."""
    wrong = (merge for merge in enumerate(merges, first) if not all(text in ids for text in _texts(merge[1])))
    index, merge = next(wrong)
    head, tail, both = _texts(merge)
    missing = next(text for text in (head, tail, both) if text not in ids)
    what = f"{ascii(missing)[:60]} is no token" if head and tail else "two tokens with a space are needed"
    return broken(file, f"{PREFIX}merges", f"merge {index} is {ascii(merge)[:60]}; {what}")


def _texts(merge: str) -> tuple[str, str, str]:
    """A merge's two parts and its result."""
    head, _, tail = merge.partition(" ")
    return head, tail, head + tail
