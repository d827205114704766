"""Text to token ids and back, from the vocabulary that a model file carries.

Byte-level BPE as Qwen uses it: the text is cut at special tokens, each piece is split by a rule (words, single digits,
runs of punctuation and space), its bytes are written as letters, and letters are merged in the order of the file's
merges. The work is done by Hugging Face `tokenizers`, built here from the file's keys; nothing is guessed from names.

Unicode normalization: none, as in llama.cpp and as the file says nothing about it. Hugging Face's own Qwen tokenizer
composes characters first (NFC), so `e` + U+0301 gives other ids there; decoding our ids gives back exactly the text
that was given.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ...ir.errors import UnsupportedModelError, UsageError
from ..gguf.file import GgufFile
from ..gguf.strings import StringArray
from .byte_letters import BYTE_LETTERS, BYTE_OF_LETTER
from .end_tokens import PREFIX, broken, end_tokens, token_id

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Split rule by `tokenizer.ggml.pre`; llama.cpp gives both names the same one.
_SPLITS = {"qwen2": _QWEN2_SPLIT, "deepseek-r1-qwen": _QWEN2_SPLIT}

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


class Tokenizer:
    """Made from an open model file. Safe to use from several threads.

    vocab_size     number of tokens; ids are 0 to vocab_size - 1.
    end_tokens     ids after which a text is over: those that the file names, and control tokens whose text says so.
    special_tokens ids of control tokens (never part of a text): end of turn and the like.
    longest_token  characters of the longest token: n tokens hold at most n times as many.

    Raises UnsupportedModelError for a tokenizer of another kind, naming the key; ModelFileError for a broken one.
    """

    vocab_size: int
    end_tokens: tuple[int, ...]
    special_tokens: frozenset[int]
    longest_token: int

    def __init__(self, file: GgufFile) -> None:
        _require_kind(file)
        self._tokens = _strings(file, "tokens")
        self.vocab_size = len(self._tokens)
        kinds = _kinds(file, self.vocab_size)
        self.special_tokens = frozenset(index for index, kind in enumerate(kinds) if kind == _CONTROL)
        self._literal = frozenset(
            index for index, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
        )
        self.end_tokens = end_tokens(file)
        self.longest_token = max(map(len, self._tokens))
        self._start = _start_token(file, self.vocab_size)
        self._encoder = _encoder(file, self._tokens, kinds)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens written in it become theirs. UsageError where it is not valid Unicode.

        The token that begins every text, where the file asks for one, stands there once, whether the text writes it
        or not: chat templates do.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode at character {error.start}; give UTF-8 text") from None
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids if self._start is None or ids[:1] == [self._start] else [self._start, *ids]

    def writes_start(self, text: str) -> str:
        """The token that begins every text by itself, where the text writes it too; else nothing."""
        start = "" if self._start is None else self._tokens[self._start]
        return start if start and text.startswith(start) else ""

    def control_ids(self, texts: Iterable[str]) -> frozenset[int]:
        """Those of the control tokens that have one of these texts."""
        wanted = frozenset(texts)
        return frozenset(index for index in self.special_tokens if self._tokens[index] in wanted)

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """Exactly the bytes that the tokens stand for; they need not be whole characters.

        skip_special: leave out control tokens. UsageError for an id outside the vocabulary.
        """
        return b"".join(self._token_bytes(index, skip_special) for index in ids)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of the tokens; bytes that are no character become U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def stream(self, skip_special: bool = False) -> TextStream:
        """A decoder for tokens that come one by one."""
        return TextStream(self, skip_special)

    def _token_bytes(self, index: int, skip_special: bool) -> bytes:
        if not 0 <= index < self.vocab_size:
            raise UsageError(f"token id {index} is outside the vocabulary; ids are 0 to {self.vocab_size - 1}")
        if skip_special and index in self.special_tokens:
            return b""
        known = self._bytes.get(index)
        if known is None:
            token = self._tokens[index]
            letters = [BYTE_OF_LETTER.get(letter) for letter in token]
            # A token with a letter outside the byte alphabet was never made by merging: it stands for itself.
            plain = index in self._literal or None in letters
            known = token.encode("utf-8", "surrogateescape") if plain else bytes(b for b in letters if b is not None)
            self._bytes[index] = known
        return known


class TextStream:
    """Turns tokens into text as they come, never half a character. The pieces joined are `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that are complete with this token, perhaps none."""
        return self._decoder.decode(self._tokenizer.decode_bytes((token,), self._skip_special))

    def finish(self) -> str:
        """What is left: U+FFFD if the last character never became whole, else nothing. The stream starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _require_kind(file: GgufFile) -> None:
    """The file must say that its tokenizer is the one that is built here."""
    key = f"{PREFIX}model"
    model = file.metadata.get(key)
    if model != "gpt2":
        raise _unsupported(key, model, "byte-level BPE ('gpt2') is supported")
    key = f"{PREFIX}pre"
    split = file.metadata.get(key)
    if not isinstance(split, str) or split not in _SPLITS:
        raise _unsupported(key, split, f"the split rules {', '.join(map(repr, _SPLITS))} are supported")


def _unsupported(key: str, value: object, works: str) -> UnsupportedModelError:
    found = "is missing" if value is None else f"is {ascii(value)[:80]}"
    return UnsupportedModelError(f"{key} {found}; {works}. Token ids (--prompt-token-ids) work without a tokenizer")


def _strings(file: GgufFile, name: str) -> list[str]:
    key = PREFIX + name
    value = file.metadata.get(key)
    if value is None:
        raise _unsupported(key, None, "the file must carry its vocabulary")
    if not isinstance(value, (StringArray, list)) or not value:
        raise broken(file, key, "must be an array of strings that is not empty")
    return list(value)


def _kinds(file: GgufFile, count: int) -> list[int]:
    """Each token's kind; a file without the key has only normal tokens."""
    key = f"{PREFIX}token_type"
    value = file.metadata.get(key)
    if value is None:
        return [_NORMAL] * count
    kinds: Any = getattr(value, "tolist", lambda: None)()
    if not isinstance(kinds, list) or len(kinds) != count:
        raise broken(file, key, f"must be an array of {count} numbers, one for each token")
    return kinds


def _start_token(file: GgufFile, count: int) -> int | None:
    """The id that begins every text, where the file asks for one (Qwen does not)."""
    if file.metadata.get(f"{PREFIX}add_bos_token") is not True:
        return None
    return token_id(file, "bos", count)


def _encoder(file: GgufFile, tokens: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    key = f"{PREFIX}tokens"
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(index for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise broken(file, key, f"tokens {twice} and {vocabulary[tokens[twice]]} are the same text")
    try:
        "".join(tokens).encode("utf-8")
    except UnicodeEncodeError:
        raise broken(file, key, "a token is not UTF-8") from None
    missing = [letter for letter in BYTE_LETTERS if letter not in vocabulary]
    if missing:
        raise broken(
            file, key, f"no token for {len(missing)} of the 256 bytes, 0x{BYTE_OF_LETTER[missing[0]]:02x} first"
        )
    merges = [_merge(file, index, merge) for index, merge in enumerate(_strings(file, "merges"))]
    try:
        encoder = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises bare Exception; with the vocabulary checked, a merge is at fault
        raise broken(file, f"{PREFIX}merges", ascii(str(error))[1:121]) from None
    split = tokenizers.Regex(_SPLITS[file.metadata[f"{PREFIX}pre"]])
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.decoder = decoders.ByteLevel()
    encoder.add_tokens(_added(tokens, kinds, (_USER_DEFINED,), special=False))
    encoder.add_special_tokens(_added(tokens, kinds, (_CONTROL, _UNKNOWN), special=True))
    return encoder


def _added(tokens: list[str], kinds: list[int], wanted: tuple[int, ...], special: bool) -> list[tokenizers.AddedToken]:
    """Tokens that are found in a text before it is split; unused ones are not among them."""
    return [
        tokenizers.AddedToken(token, normalized=False, special=special)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in wanted and token
    ]


def _merge(file: GgufFile, index: int, merge: str) -> tuple[str, str]:
    head, space, tail = merge.partition(" ")
    if not (head and space and tail) or " " in tail:
        raise broken(
            file, f"{PREFIX}merges", f"merge {index} is {ascii(merge)[:60]}; two tokens with a space are needed"
        )
    return head, tail
