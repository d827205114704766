"""Text to token ids and back, from the vocabulary that a model file carries.

Byte-level BPE as Qwen uses it: the text is cut at special tokens (`special_tokens`), and what lies between goes by
pieces (`splits`) to Hugging Face `tokenizers`, built here from the file's keys (`vocabulary`): it splits by the file's
rule (words, single digits, runs of punctuation and space), writes bytes as letters, and merges letters in the order of
the file's merges. Nothing is guessed from names.

Unicode normalization: none, as in llama.cpp and as the file says nothing about it. Hugging Face's own Qwen tokenizer
composes characters first (NFC), so `e` + U+0301 gives other ids there; decoding our ids gives back exactly the text
that was given.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import numpy as np

from ...ir.errors import UsageError
from ..gguf.file import GgufFile
from .byte_letters import BYTE_OF_LETTER
from .end_tokens import CONTROL, PREFIX, broken, end_tokens, token_id
from .panics import as_error
from .special_tokens import SpecialTokens
from .splits import PIECE, pieces
from .vocabulary import build, read_kinds, read_tokens, require_kind


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
        require_kind(file)
        self._tokens = read_tokens(file)
        self.vocab_size = len(self._tokens)
        kinds = read_kinds(file, self.vocab_size)
        self.special_tokens = frozenset(np.flatnonzero(kinds == CONTROL).tolist())
        self.end_tokens = end_tokens(file)
        self._start = _start_token(file, self.vocab_size)
        self._encoder, literal, self.longest_token = build(file, self._tokens, kinds)
        self._literal = frozenset(literal.values())
        self._specials = SpecialTokens(literal)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Ids of the text; special tokens written in it become theirs.

        The token that begins every text, where the file asks for one, stands there once, whether the text writes it
        or not: chat templates do.
        most: ids that anybody has room for; a long text is not read far beyond them.

        UsageError where the text is not valid Unicode, cannot be split, or is longer than `most` in its first part.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode at character {error.start}; give UTF-8 text") from None
        ids = self._ids(text, most if len(text) > PIECE else None)
        return ids if self._start is None or ids[:1] == [self._start] else [self._start, *ids]

    def writes_start(self, text: str) -> str:
        """The token that begins every text by itself, where the text writes it too; else nothing."""
        start = "" if self._start is None else self._tokens[self._start]
        return start if start and text.startswith(start) else ""

    def control_ids(self, texts: Iterable[str]) -> frozenset[int]:
        """Those of the control tokens that have one of these texts."""
        wanted = frozenset(texts)
        return frozenset(index for index in self.special_tokens if self._tokens[index] in wanted)

    def _ids(self, text: str, most: int | None) -> list[int]:
        ids: list[int] = []
        done = 0
        for part in self._specials.split(text):
            if isinstance(part, int):
                ids.append(part)
                done += len(self._tokens[part])
                continue
            for piece in pieces(part):
                if most is not None and len(ids) > most:
                    raise UsageError(
                        f"the text is too long for a context of {most:,} tokens: its first {done:,} of "
                        f"{len(text):,} characters have {len(ids):,}; shorten it"
                    )
                with as_error(_not_split):
                    ids += self._encoder.encode(piece, add_special_tokens=False).ids
                done += len(piece)
        return ids

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


def _not_split(what: str) -> UsageError:
    return UsageError(f"the text cannot be made into tokens: {what}")


def _start_token(file: GgufFile, count: int) -> int | None:
    """The id that begins every text, where the file asks for one (Qwen does not)."""
    key = f"{PREFIX}add_bos_token"
    asked = file.metadata.get(key, False)
    if not isinstance(asked, bool):
        raise broken(file, key, "must be a bool")
    return token_id(file, "bos", count) if asked else None
