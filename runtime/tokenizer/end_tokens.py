"""The ids that end a text, and single ids, from a file's keys alone: no tokenizer need be built or even imported."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...ir.errors import ModelFileError
from ..gguf.file import GgufFile
from ..gguf.strings import StringArray

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of tokens in `tokenizer.ggml.token_type`

# Control tokens of these texts end a text or a turn, whatever key names them. A fine-tune of a base model often names
# one (<|endoftext|>) and ends its turns with another (<|im_end|>).
END_TEXTS = frozenset(
    {
        "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_turn|>",
        "<end_of_turn>", "<end_of_utterance>", "<turn|>", "<EOT>", "[EOT]", "[EOS]", "</s>", "<eos>",
        "<｜end▁of▁sentence｜>", "[e~[",
    }
)  # fmt: skip
_OTHER_END_KEYS = ("eot", "eom")  # beside eos, which a file must have right
_UNUSED_KEYS = ("padding", "bos")  # end nothing; what is wrong with them is said
_ALL_ENDS = f"{PREFIX}eos_token_ids"
BY_TEMPLATE = "the chat template ends turns with it"
BY_TEXT = "its text"


@dataclass(frozen=True)
class EndToken:
    """An id after which a text is over, and why: the file's keys that name it, its text, the chat template."""

    id: int
    text: str
    sources: tuple[str, ...]

    def record(self) -> dict[str, object]:
        """For a report."""
        return {"id": self.id, "text": self.text, "from": list(self.sources)}


def token_id(file: GgufFile, name: str, count: int) -> int | None:
    """The id that `tokenizer.ggml.<name>_token_id` names, None without one; ModelFileError unless 0 <= id < count."""
    key = f"{PREFIX}{name}_token_id"
    value = file.metadata.get(key)
    return None if value is None else _checked(file, key, value, count)


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
    return tuple(end.id for end in named_end_tokens(file))


def named_end_tokens(file: GgufFile, turn_end: str = "") -> tuple[EndToken, ...]:
    """`end_tokens` with why each is one: first those that keys name, then by text, then the chat template's.

    turn_end: what the template writes after an assistant's words (`ChatTemplate.turn_end`); the special token that it
    begins with, if it does, ends a turn.
    """
    tokens = _tokens(file)
    sources: dict[int, list[str]] = {}
    for index, source in (*_by_key(file, len(tokens) or 2**31), *_by_text(file, tokens)):
        sources.setdefault(index, []).append(source)
    closing = opening_token(file, turn_end)
    if closing is not None:
        sources.setdefault(closing, []).append(BY_TEMPLATE)
    return tuple(
        EndToken(index, tokens[index] if index < len(tokens) else "", tuple(dict.fromkeys(found)))
        for index, found in sources.items()
    )


def opening_token(file: GgufFile, text: str) -> int | None:
    """The special token with which a text begins, spaces aside; of several the longest. None where it has none."""
    text = text.lstrip()
    tokens = _tokens(file)
    if not text:
        return None
    found = [index for index in _of_kind(file, tokens, (CONTROL, USER_DEFINED)) if _begins(text, tokens[index])]
    return max(found, key=lambda index: len(tokens[index]), default=None)


def _begins(text: str, token: str) -> bool:
    return bool(token) and text.startswith(token)


def _by_key(file: GgufFile, count: int) -> Iterator[tuple[int, str]]:
    found = {"eos": token_id(file, "eos", count)}
    found |= {name: optional_token_id(file, name, count) for name in _OTHER_END_KEYS}
    for name in _UNUSED_KEYS:
        optional_token_id(file, name, count)
    for name, index in found.items():
        if index is not None:
            yield index, f"{PREFIX}{name}_token_id"
    several = file.metadata.get(_ALL_ENDS)
    if several is None:
        return
    values = several.tolist() if isinstance(several, np.ndarray) else several
    if not isinstance(values, list):
        raise broken(file, _ALL_ENDS, "must be an array of token ids")
    for value in values:
        yield _checked(file, _ALL_ENDS, value, count), _ALL_ENDS


def _by_text(file: GgufFile, tokens: Sequence[str]) -> Iterator[tuple[int, str]]:
    return ((index, BY_TEXT) for index in _of_kind(file, tokens, (CONTROL,)) if tokens[index] in END_TEXTS)


def _of_kind(file: GgufFile, tokens: Sequence[str], kinds: Sequence[int]) -> Sequence[int]:
    """Ids of these kinds; all of them where the file tells no kinds."""
    found = file.metadata.get(f"{PREFIX}token_type")
    if not isinstance(found, np.ndarray) or len(found) != len(tokens):
        return range(len(tokens))
    return [int(index) for index in np.flatnonzero(np.isin(found, kinds))]


def _tokens(file: GgufFile) -> Sequence[str]:
    tokens = file.metadata.get(f"{PREFIX}tokens")
    return tokens if isinstance(tokens, (StringArray, list)) else []


def _checked(file: GgufFile, key: str, value: object, count: int) -> int:
    if type(value) is not int or not 0 <= value < count:
        raise broken(file, key, f"{ascii(value)[:40]} is no token id; ids are 0 to {count - 1}")
    return value


def broken(file: GgufFile, key: str, what: str) -> ModelFileError:
    """An error that names the key and the byte of its value."""
    return ModelFileError(what, key, file.value_offsets.get(key))
