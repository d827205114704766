"""A prompt's ids in, tokens and text out: what `generate`, `chat` and the Python API have in common."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import whole_or_none
from ..ir.errors import PsigraphError, UsageError
from ..medpsy.guard import Guard
from ..runtime.tokenizer.bpe import Tokenizer
from ..session import Session, check_ids
from .sampler import SamplerSettings
from .stop_strings import StopStrings
from .thinking import NO_MARKS, Marks
from .turns import Turns, Written

# Why a run ended.
END, LENGTH, CONTEXT, STOP, INTERRUPTED = "end", "length", "context", "stop", "interrupted"
GREEDY = SamplerSettings(temperature=0.0)
MOST_LOGPROBS = 100


@dataclass(frozen=True)
class LogProbability:
    """How likely a given token was, and which were likeliest: natural logarithms, before biases, penalties, filters
    and temperature. likeliest: (id, log probability), likeliest first, the lower id of equals."""

    token: int
    value: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Limits:
    """How a run is drawn, where it ends, and what it tells.

    max_new_tokens  None: as far as the context reaches.
    sampler         how tokens are drawn.
    ignore_end      end tokens end nothing and are given like others.
    end_tokens      further end tokens beside the file's, such as those with which a chat template ends turns.
    logprobs        how many of the likeliest tokens to tell at every step; None: no log probabilities. They need a
                    session with outputs=("logits",) and cost a copy of all logits a token.
    cancelled       asked before every token; True ends the run with the reason "interrupted".
    """

    max_new_tokens: int | None = None
    sampler: SamplerSettings = GREEDY
    ignore_end: bool = False
    end_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None
    cancelled: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        whole_or_none("max_new_tokens", self.max_new_tokens)
        whole_or_none("logprobs", self.logprobs)
        if not callable(self.cancelled):
            raise TypeError(f"cancelled is {self.cancelled!r}; give a function without parameters")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; at least 1 is needed")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UsageError(f"logprobs is {self.logprobs}; give 0 to {MOST_LOGPROBS}, or none at all")


class Decoder:
    """A session, and the ids that its caches hold: a prompt that begins with them is not fed all over again.

    One run at a time, from any thread: a run that begins while another is under way lets that be written first.
    reword: is given each error of a run before who reads it is.
    """

    def __init__(self, session: Session, reword: Callable[[PsigraphError], None] = lambda error: None) -> None:
        self.session = session
        self.turns = Turns()
        self.reword = reword
        self._held: list[int] = []

    def run(
        self, ids: Sequence[int], limits: Limits | None = None, ready: Callable[[Limits], None] | None = None
    ) -> TokenRun:
        """The tokens that follow `ids`; nothing is computed until the first is asked for.

        ready: called then, by whom has the turn: makes `session` one that can do what the limits ask for.
        UsageError for an empty prompt, an id outside the vocabulary, a prompt that the context does not hold, and
        settings that the session cannot sample by.
        """
        limits = limits or Limits()
        session = self.session
        check_ids(ids, session.vocabulary)
        if len(ids) > session.context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the context holds {session.context}; shorten it"
                f"{session.larger_context}"
            )
        if ready is None and limits.logprobs is not None and not session.engine.has_logits:
            raise UsageError('logprobs need a session that was opened with outputs=("logits",)')
        session.check_sampler(limits.sampler, may_change=ready is not None)
        return TokenRun(self, list(ids), limits, ready)

    def forget(self) -> None:
        """Feed the next prompt from its first id."""
        self._held = []

    def begin(self, ids: Sequence[int], limits: Limits) -> int:
        """Goes back to where the caches and `ids` part, and says how many ids need not be fed."""
        self.session.set_sampler(limits.sampler)
        known = min(self.session.position, len(self._held), len(ids) - 1)  # the last id's step makes the first choice
        same = next((index for index in range(known) if self._held[index] != ids[index]), known)
        self.session.rewind(same)
        self._held = list(ids)
        return same

    def holds(self, token: int) -> None:
        """A further token was chosen, and goes in next."""
        self._held.append(token)


class TokenRun(Written[int]):
    """Tokens as they are chosen; the end token is not given. When it is over, `reason` says why.

    ids            the tokens written so far.
    reason         "" while it runs; "end": the model ended the text; "length": max_new_tokens; "context": the context
                   is full; "interrupted"; "stop" is set by a `TextRun` that found a stop string.
    logprobs       one for each of `ids`, where they were asked for.
    prompt_tokens  ids of the prompt; reused_tokens: how many of them the caches held already.
    """

    def __init__(
        self, decoder: Decoder, prompt: list[int], limits: Limits, ready: Callable[[Limits], None] | None = None
    ) -> None:
        super().__init__(decoder.turns)
        self.ids: list[int] = []
        self.logprobs: list[LogProbability] = []
        self.reason = ""
        self.prompt_tokens = len(prompt)
        self.reused_tokens = 0
        self._first_s = self._last_s = 0.0
        self._decoded = 0
        self.pieces = TokenRun._generate(weakref.proxy(self), decoder, prompt, limits, ready)

    def was_ended(self) -> None:
        """Early: the reason is "interrupted", unless there is another."""
        self.reason = self.reason or INTERRUPTED

    def timings(self) -> dict[str, Any]:
        """Counts, milliseconds and the rate: tokens after the first by the time from the first to the last."""
        decode_s = self._last_s - self._first_s
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "generated_tokens": len(self.ids),
            "first_token_ms": round(1e3 * self._first_s, 3),
            "decode_ms": round(1e3 * decode_s, 3),
            "decode_tokens_per_second": round((self._decoded - 1) / decode_s, 2) if decode_s > 0 else None,
        }

    def _generate(
        self, decoder: Decoder, prompt: list[int], limits: Limits, ready: Callable[[Limits], None] | None
    ) -> Generator[int, None, None]:
        try:
            if ready is not None:
                ready(limits)
            yield from TokenRun._chosen(self, decoder, prompt, limits)
        except PsigraphError as error:
            decoder.reword(error)
            raise

    def _chosen(self, decoder: Decoder, prompt: list[int], limits: Limits) -> Generator[int, None, None]:
        began = time.perf_counter()
        self.reused_tokens = decoder.begin(prompt, limits)
        session = decoder.session
        at_once = session.fed_at_once  # ids between two looks at `cancelled`
        for first in range(self.reused_tokens, len(prompt), at_once):
            if limits.cancelled():
                self.reason = INTERRUPTED
                return
            session.feed(prompt[first : first + at_once])
        space = session.context - len(prompt) + 1  # the last token is chosen and never goes in
        count = space if limits.max_new_tokens is None else min(space, limits.max_new_tokens)
        ends = frozenset() if limits.ignore_end else limits.end_tokens.union(session.end_tokens)
        if limits.logprobs is None:
            tokens = TokenRun._decoded_tokens(self, session, count, began)
        else:
            tokens = TokenRun._told_tokens(self, session, count, began, limits.logprobs)
        for token in tokens:
            decoder.holds(token)
            if limits.cancelled():
                self.reason = INTERRUPTED
            elif token in ends:
                self.reason = END
            if self.reason:
                del self.logprobs[len(self.ids) :]
                return
            self.ids.append(token)
            if len(self.ids) == count:
                self.reason = LENGTH if count == limits.max_new_tokens else CONTEXT
            yield token

    def _decoded_tokens(self, session: Session, count: int, began: float) -> Iterator[int]:
        """`count` tokens, with the clock read as they arrive."""
        token = session.engine.chosen()  # waits for the prompt, and not for the steps that are queued after it
        self._first_s = self._last_s = time.perf_counter() - began
        self._decoded = 1
        yield token
        if count == 1:
            return
        seen = 0
        for chunk in session.decode(count):
            self._last_s = time.perf_counter() - began
            self._decoded = seen + len(chunk)
            yield from chunk[1:] if seen == 0 else chunk  # the first token is known already
            seen += len(chunk)

    def _told_tokens(self, session: Session, count: int, began: float, likeliest: int) -> Iterator[int]:
        """`count` tokens, one step at a time, since the logits of a step are gone with the next."""
        for index in range(count):
            token = session.engine.chosen()
            self.logprobs.append(log_probability(session.engine.logits_view(), token, likeliest))
            self._last_s = time.perf_counter() - began
            self._first_s = self._first_s or self._last_s
            self._decoded = index + 1
            yield token
            if index + 1 < count:
                session.feed([token])


def log_probability(logits: np.ndarray, token: int, likeliest: int) -> LogProbability:
    """Of one row of logits, float[vocabulary]."""
    exact = logits.astype(np.float64)
    values = exact - exact.max()
    values -= np.log(np.exp(values).sum())
    order = np.argsort(-values, kind="stable")[:likeliest]
    return LogProbability(token, float(values[token]), tuple((int(one), float(values[one])) for one in order))


class TextRun(Written[str]):
    """The text of a run in pieces, never half a character nor part of a stop string; control tokens are left out.

    stop      strings before which the text ends; they are looked for in control tokens too.
    guard     the medical policy's: its disclaimer comes before the text.
    marks     which control tokens are shown all the same, and what in the text is thinking.
    tokens    the run below, with its ids and timings.
    text      what the model wrote so far.
    """

    def __init__(
        self,
        tokens: TokenRun,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        guard: Guard | None = None,
        marks: Marks = NO_MARKS,
    ) -> None:
        super().__init__(tokens.turns)
        self.tokens = tokens
        self.text = ""
        self._thinking = marks.thinking
        self._tokenizer, self._hidden = tokenizer, tokenizer.special_tokens - marks.shown
        self._stream = tokenizer.stream()
        self._stops = StopStrings(stop)
        written = TextRun._generate(weakref.proxy(self))
        self.pieces = written if guard is None else guard.stream(written)

    def was_ended(self) -> None:
        """Early: see `TokenRun.was_ended`."""
        self.tokens.end()

    @property
    def reasoning(self) -> str:
        """What the model thought so far before it answered, without the markers around it."""
        return self._thinking.split(self.text)[0] if self._thinking is not None else ""

    @property
    def answer(self) -> str:
        """The text so far without the thinking before it."""
        return self._thinking.split(self.text)[1] if self._thinking is not None else self.text

    @property
    def ids(self) -> list[int]:
        """The tokens given so far; where a stop string was found, its own are among them."""
        return self.tokens.ids

    @property
    def logprobs(self) -> list[LogProbability]:
        """See `TokenRun.logprobs`."""
        return self.tokens.logprobs

    @property
    def reason(self) -> str:
        """Why it ended, "" while it runs: see `TokenRun.reason`."""
        return self.tokens.reason

    def timings(self) -> dict[str, Any]:
        """See `TokenRun.timings`."""
        return self.tokens.timings()

    def _generate(self) -> Generator[str, None, None]:
        for token in self.tokens.pieces:
            if token in self._hidden:
                piece = self._stops.push(self._tokenizer.decode([token]), hidden=True)
            else:
                piece = self._stops.push(self._stream.push(token))
            if self._kept(piece):
                yield piece
            if self._stops.found:
                self.tokens.reason = STOP  # it may have been the last token that was allowed, too
                self.tokens.end()
                return
        piece = self._stops.push(self._stream.finish())
        if self._kept(piece):
            yield piece
        if self._stops.found:
            self.tokens.reason = STOP
            return
        piece = self._stops.finish()
        if self._kept(piece):
            yield piece

    def _kept(self, piece: str) -> str:
        """The piece, which is now part of the text. No generator: one that waits would refer to what shall be free."""
        self.text += piece
        return piece
