"""Greedy continuation: tokens until an end token, and their text as it becomes whole characters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from .build import Model
from .guard import guard_for
from .ir.errors import PolicyRefusal, UnsupportedModelError, UsageError
from .policy import Admission
from .runtime.tokenizer import Tokenizer
from .session import Session


def continuation(session: Session, ids: Sequence[int], max_new_tokens: int, stop: bool = True) -> Iterator[int]:
    """Feeds `ids` and gives the tokens that follow, at most `max_new_tokens`, up to the file's end tokens.

    The end token itself is not given. stop=False: end tokens end nothing and are given.
    UsageError for an empty prompt, ids outside the vocabulary, less than one token, or too small a context.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}: at least 1 is needed")
    session.feed(ids)
    for chunk in session.decode(max_new_tokens):
        for token in chunk:
            if stop and token in session.end_tokens:
                return
            yield token


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, piece by piece, never half a character; control tokens are left out."""
    stream = tokenizer.stream(skip_special=True)
    for token in tokens:
        piece = stream.push(token)
        if piece:
            yield piece
    rest = stream.finish()
    if rest:
        yield rest


class Prompt:
    """A prompt as text or as ids, made ready while the model loads.

    A vocabulary of 150,000 tokens takes a third of a second to build, so a thread does it beside the weights. Pass
    `positions` and `check` to `open_session`, then ask for `ids` and `tokenizer`. Use it in a `with` statement.
    """

    def __init__(self, text: str | None, ids: Sequence[int] | None, max_new_tokens: int) -> None:
        """Exactly one of text and ids; UsageError otherwise, and for an empty one."""
        if (text is None) == (ids is None):
            raise UsageError("the prompt: give either --prompt or --prompt-token-ids")
        if text == "" or (ids is not None and not ids):
            raise UsageError("the prompt is empty: give at least one token")
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {max_new_tokens}: at least 1 is needed")
        self._text, self._ids, self._new = text, tuple(ids) if ids is not None else None, max_new_tokens
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._building: Future[Tokenizer] | None = None

    def positions(self, model: Model) -> int:
        """Positions that prompt and answer fill, or less where the context holds them anyway."""
        self._building = self._pool.submit(Tokenizer, model.file)
        if self._text is not None:
            bound = len(self._text.encode("utf-8", "surrogatepass")) + 1 + self._new  # no token has less than a byte
            if bound <= int(model.binding.sizes["context"]):
                return 1
        return len(self.ids) + self._new - 1

    def check(self, admission: Admission) -> None:
        """PolicyRefusal with the policy's answer where the medical policy is active and refuses the request."""
        guard = guard_for(admission)
        if guard is None:
            return
        text = self._text if self._text is not None else self.tokenizer.decode(self.ids)
        decision = guard.classify(text)
        if decision.refused:
            raise PolicyRefusal(decision.message)

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt's token ids."""
        if self._ids is None:
            assert self._text is not None
            self._ids = tuple(self.tokenizer.encode(self._text))
        return self._ids

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's; UnsupportedModelError if it is of another kind."""
        assert self._building is not None, "open the model first"
        return self._building.result()

    @property
    def tokenizer_or_none(self) -> Tokenizer | None:
        """None where the file's tokenizer is of another kind: ids work without one."""
        try:
            return self.tokenizer
        except UnsupportedModelError:
            return None

    def __enter__(self) -> Prompt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
