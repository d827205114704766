"""The Python API: a model that writes text.

import psigraph

with psigraph.load("model.gguf") as model:
    for piece in model.generate("The whale", max_new_tokens=32):
        print(piece, end="")

docs/python-api.md is a worked example.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import Any, overload

import numpy as np

from .ir.errors import PolicyRefusal, UsageError
from .medpsy.artifact import admit_file
from .medpsy.guard import Guard, guard_for
from .medpsy.policy import Admission
from .options import Progress, SessionOptions
from .runtime.gguf.file import GgufFile
from .runtime.tokenizer.bpe import Tokenizer
from .session import Session, open_session
from .text.file_sampling import published_sampling
from .text.generation import GREEDY, Decoder, Limits, TextRun, TokenRun
from .text.prompt import BackgroundTokenizer
from .text.sampler import SamplerSettings
from .text.template import ChatTemplate, Message, check_messages

LONG_PROMPT = 512
"""Tokens of the prompt that a model is made ready for."""

Warn = Callable[[str], None]


class LanguageModel:
    """A loaded model. Made by `psigraph.load`; close it, or use it in a `with` statement.

    session    where it runs: backend, context, facts, timings, and the steps below this class.
    admission  what the policy says about the file.
    guard      the medical policy's guard where it is active, else None: requests that it refuses raise
               PolicyRefusal with its answer, and texts begin with its disclaimer.

    One text at a time: asking for the next ends the one before. Not to be used from several threads at once.
    """

    session: Session
    admission: Admission
    guard: Guard | None

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: SessionOptions,
        *,
        allow_blocked_quantization: bool = False,
        expect_sha256: str | None = None,
        policy: str | None = None,
        warn: Warn | None = None,
        on_hash: Progress | None = None,
    ) -> None:
        """See `psigraph.load`. options: without admit and check. warn: gets the policy's warnings; None: Python's."""
        if options.admit is not None or options.check is not None:
            raise TypeError("admit and check are the model's own")
        if policy not in (None, "medpsy"):
            raise UsageError(f"policy is {policy!r}; give 'medpsy', or None")
        self._path = path
        self._tokenizer = BackgroundTokenizer()
        self._template: ChatTemplate | None = None

        def admit(file: GgufFile) -> None:
            # The digest of a file of gigabytes takes seconds, and only an expectation needs it here.
            self.admission = admit_file(
                file,
                allow_blocked=allow_blocked_quantization,
                expect_sha256=expect_sha256,
                policy_active=policy is not None,
                with_digest=False,
                on_hash=on_hash,
            )

        self._options = replace(options, admit=admit)
        try:
            self._open(replace(self._options, check=self._tokenizer.start))
        except BaseException:
            self._tokenizer.close()
            raise
        self.guard = guard_for(self.admission)
        for warning in self.admission.said:
            if warn is None:
                warnings.warn(warning, UserWarning, stacklevel=3)
            else:
                warn(warning)

    def _open(self, options: SessionOptions) -> None:
        self.session = open_session(self._path, options)
        try:
            if self.session.backend == "cuda":  # elsewhere kernels take longer to compile than most prompts to run
                self.session.expect_prompt(LONG_PROMPT)
        except BaseException:
            self.session.close()
            raise
        self._decoder = Decoder(self.session)

    def _have(self, *, sampling: bool = False, logits: bool = False) -> None:
        """Loads the model anew, once, where a request needs what the loaded program leaves out."""
        had = self._options
        if (sampling and not had.sampling) or (logits and "logits" not in had.outputs):
            self._options = replace(
                had,
                sampling=had.sampling or sampling,
                outputs=tuple(dict.fromkeys((*had.outputs, *(("logits",) if logits else ())))),
                # The first load's driver is gone, and whoever showed its progress is done with it.
                start=None,
                on_load=None,
                on_compile=None,
            )
            self._tokenizer.wait()  # it reads the file that is about to be closed
            self.session.close()
            self._open(self._options)

    @property
    def context(self) -> int:
        """Positions that the KV cache holds: prompt and answer together."""
        return self.session.context

    @property
    def vocabulary(self) -> int:
        """Number of token ids: 0 to vocabulary - 1."""
        return self.session.vocabulary

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer; UnsupportedModelError if it is of a kind that psigraph does not know."""
        return self._tokenizer.get()

    @property
    def template(self) -> ChatTemplate:
        """The file's chat template; UnsupportedModelError if it has none."""
        if self._template is None:
            self._template = ChatTemplate.of_file(self.session.model.file)
        return self._template

    @cached_property
    def published_sampling(self) -> dict[str, Any]:
        """Options of sampling that the file asks for (its keys `general.sampling.*`): the defaults of `chat`."""
        return published_sampling(self.session.model.file.metadata)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens that it spells out become theirs."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.tokenizer.decode(ids)

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int | None = ...,
        *,
        stop: Sequence[str] = ...,
        logprobs: int | None = ...,
        **sampling: Any,
    ) -> TextRun: ...
    @overload
    def generate(
        self, prompt: Sequence[int], max_new_tokens: int | None = ..., *, logprobs: int | None = ..., **sampling: Any
    ) -> TokenRun: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int | None = 128,
        *,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        **sampling: Any,
    ) -> TextRun | TokenRun:
        """What follows a prompt: pieces of text after a text, token ids after token ids.

        max_new_tokens  None: until the model ends the text or the context is full.
        stop            strings before which a text ends; not with token ids.
        logprobs        tell each token's log probability and the so many likeliest in the result's `logprobs`; needs
                        what `logits` needs.
        sampling        fields of `psigraph.SamplerSettings`: temperature, top_k, top_p, min_p, repetition_penalty,
                        presence_penalty, frequency_penalty, penalty_window, logit_bias, seed. None of them: the
                        likeliest token each time. The first request that samples loads the model anew unless it was
                        loaded with sampling=True.

        The result's `reason` says why it ended, `timings()` how long it took. Raises UsageError for what cannot work
        (an empty prompt, one that the context does not hold, ...), PolicyRefusal where the guard refuses.
        """
        limits = self._limits(max_new_tokens, sampling, logprobs=logprobs)
        if isinstance(prompt, str):
            self.ask_guard([{"role": "user", "content": prompt}])
            return self._text(self.tokenizer.encode(prompt, self.context), limits, stop)
        if stop:
            raise UsageError("stop looks for text; it does not go with token ids")
        if self.guard is not None:
            self.ask_guard([{"role": "user", "content": self.decode(prompt)}])
        return self._decoder.run(list(prompt), limits)

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        *,
        thinking: bool | None = None,
        stop: Sequence[str] = (),
        cancelled: Callable[[], bool] | None = None,
        **sampling: Any,
    ) -> TextRun:
        """The assistant's next turn, in pieces. A conversation that goes on from the last one is not read again.

        messages   dicts of role ("system", "user", "assistant", "tool") and content, oldest first.
        thinking   switch the model's thinking, where its template can; None leaves it to the template.
        cancelled  asked before every token; True ends the turn.
        sampling   as for `generate`, beside what the file asks for (`published_sampling`).
        The rest, and what is raised, as for `generate`; also ModelFileError for a template that is broken.
        """
        check_messages(messages)
        limits = self._limits(max_new_tokens, {**self.published_sampling, **sampling}, cancelled)
        self.ask_guard(messages)
        ids = self.tokenizer.encode(self.template.render(messages, thinking), self.context)
        if len(ids) > self.context:
            raise UsageError(
                f"the conversation has {len(ids):,} tokens, the context holds {self.context:,}: begin anew "
                f"(/reset in a chat){self.session.larger_context}"
            )
        return self._text(ids, limits, stop)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of `ids`: float[len(ids), vocabulary], row i for the token that follows ids[i].

        float32 on a device; on the backend cpu float64 for models of up to 2**28 weights. A row of a vocabulary of
        151,936 takes 0.6 MB. The first call loads the model anew unless it was loaded with outputs=("logits",).
        UsageError for no ids, one outside the vocabulary, or more than the context holds.
        """
        self._have(logits=True)
        self._decoder.forget()
        self.session.reset()
        return self.session.forced_logits(list(ids))

    def _limits(
        self,
        max_new_tokens: int | None,
        sampling: dict[str, Any],
        cancelled: Callable[[], bool] | None = None,
        logprobs: int | None = None,
    ) -> Limits:
        sampler = sampler_settings(sampling)
        limits = Limits(max_new_tokens, sampler, logprobs=logprobs, cancelled=cancelled or (lambda: False))
        self._have(sampling=not sampler.greedy, logits=logprobs is not None)
        return limits

    def _text(self, ids: Sequence[int], limits: Limits, stop: Sequence[str]) -> TextRun:
        if isinstance(stop, str):
            raise UsageError("stop is one string; give a list of strings")
        return TextRun(self._decoder.run(ids, limits), self.tokenizer, stop, self.guard)

    def ask_guard(self, messages: Sequence[Message]) -> None:
        """PolicyRefusal for the first of the user's or the system's messages that the guard refuses.

        `generate` and `chat` ask by themselves.
        """
        if self.guard is None:
            return
        previous = ""
        for message in messages:
            if message["role"] not in ("system", "user"):
                continue
            asked = message["role"] == "user"
            decision = self.guard.classify(message["content"], previous if asked else "")
            if decision.refused:
                raise PolicyRefusal(decision.message)
            previous = message["content"] if asked else previous

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        self._tokenizer.close()
        self.session.close()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sampler_settings(given: dict[str, Any]) -> SamplerSettings:
    """Greedy for nothing given, else the defaults with what is given; UsageError names a field that is none."""
    if not given:
        return GREEDY
    known = SamplerSettings.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UsageError(f"{name} is no option of sampling; the options are {', '.join(known)}")
    return SamplerSettings(**given)
