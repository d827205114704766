"""The ids that end a text, and single ids, from a file's keys alone: no tokenizer need be built or even imported."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ...ir.errors import ModelFileError
from ..gguf.file import GgufFile
from ..gguf.strings import StringArray

PREFIX = "tokenizer.ggml."

# Texts of tokens that end a text whatever key names them; pad and bos of Qwen are one of these.
_END_TEXTS = frozenset({"<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>"})
_OTHER_END_KEYS = ("eot", "eom")  # beside eos, which a file must have right
_SOFT_END_KEYS = ("padding", "bos")


def token_id(file: GgufFile, name: str, count: int) -> int | None:
    """The id that `tokenizer.ggml.<name>_token_id` names, None without one; ModelFileError unless 0 <= id < count."""
    key = f"{PREFIX}{name}_token_id"
    value = file.metadata.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < count:
        raise broken(file, key, f"{ascii(value)[:40]} is no token id; ids are 0 to {count - 1}")
    return value


def optional_token_id(file: GgufFile, name: str, count: int) -> int | None:
    """The same for an id that nothing depends on: one outside the vocabulary is said, and as if it were absent."""
    key = f"{PREFIX}{name}_token_id"
    value = file.metadata.get(key)
    if type(value) is int and not 0 <= value < count:
        warnings.warn(f"{key} is {value}, and ids are 0 to {count - 1}: it is not used", UserWarning, stacklevel=2)
        return None
    return token_id(file, name, count)


def end_tokens(file: GgufFile) -> tuple[int, ...]:
    """Ids after which a text is over, from the file alone; needs no tokenizer of a supported kind.

    Raises ModelFileError where an id is outside the vocabulary.
    """
    tokens = file.metadata.get(f"{PREFIX}tokens")
    return ends_among(file, tokens if isinstance(tokens, (StringArray, list)) else [])


def ends_among(file: GgufFile, tokens: Sequence[str]) -> tuple[int, ...]:
    """`end_tokens`, for a vocabulary that is at hand."""
    count = len(tokens) or 2**31
    ends = [token_id(file, "eos", count), *(optional_token_id(file, name, count) for name in _OTHER_END_KEYS)]
    soft = [optional_token_id(file, name, count) for name in _SOFT_END_KEYS]
    ends += [index for index in soft if index is not None and tokens and tokens[index] in _END_TEXTS]
    return tuple(dict.fromkeys(index for index in ends if index is not None))


def broken(file: GgufFile, key: str, what: str) -> ModelFileError:
    """An error that names the key and the byte of its value."""
    return ModelFileError(what, key, file.value_offsets.get(key))
