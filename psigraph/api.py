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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import Any, overload

import numpy as np

from .arguments import require, reword, texts, token_ids
from .ir.errors import PolicyRefusal, PsigraphError, UsageError
from .medpsy.artifact import admit_file
from .medpsy.guard import Guard, guard_for
from .medpsy.policy import Admission
from .options import Progress, SessionOptions
from .runtime.gguf.file import GgufFile
from .runtime.tokenizer.bpe import Tokenizer
from .session import Session, check_ids, open_session
from .text.file_sampling import published_sampling
from .text.generation import Decoder, Limits, TextRun, TokenRun
from .text.messages import Message, checked, strings_in, words_of
from .text.prompt import BackgroundTokenizer, warnings_of
from .text.sampler import sampler_settings
from .text.template import ChatTemplate, given_template
from .text.thinking import Marks, marks_of_chat, marks_of_text

LONG_PROMPT = 512
"""Tokens of the prompt that a model is made ready for."""
CLOSED = "this model is closed; load it again"

Warn = Callable[[str], None]


class LanguageModel:
    """A loaded model. Made by `psigraph.load`; close it, or use it in a `with` statement.

    session    where it runs: backend, context, facts, timings, and the steps below this class.
    admission  what the policy says about the file.
    guard      the medical policy's guard where it is active, else None: requests that it refuses raise
               PolicyRefusal with its answer, and texts begin with its disclaimer.

    It may be used from any number of threads and tasks: one text is written at a time, and a request that comes
    meanwhile waits until that text is written, whether or not anybody reads it. After `close` every call raises
    UsageError, as in a process that was forked. A model that nobody refers to any more is freed.
    """

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
        chat_template: str | os.PathLike[str] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        warn: Warn | None = None,
        on_hash: Progress | None = None,
        reword: Callable[[PsigraphError], None] = reword,
    ) -> None:
        """See `psigraph.load`. options: without admit and check. warn: gets warnings; None: Python's.
        reword: makes errors speak of parameters; a command has none, since its options are named."""
        if options.admit is not None or options.check is not None:
            raise TypeError("admit and check are the model's own")
        if expect_sha256 is not None:
            require("expect_sha256", expect_sha256, str, "64 hexadecimal digits")
        require("path", path, (str, os.PathLike), "a string or a path")
        if chat_template is not None:
            require("chat_template", chat_template, (str, os.PathLike), "a text, a name or a path")
        if template_vars is not None:
            require("template_vars", template_vars, Mapping, "a dict")
        if policy not in (None, "medpsy"):
            raise UsageError(f"policy is {policy!r}; give 'medpsy', or None")
        self._path = path
        self._tokenizer = BackgroundTokenizer()
        self._template: ChatTemplate | None = None
        self._reword = reword
        self._chat_template = None if chat_template is None else given_template(chat_template)
        self._template_vars = dict(template_vars or {})
        admitted: list[Admission] = []  # no function that is kept may refer to the model: it would keep it

        def admit(file: GgufFile) -> None:
            # The digest of a file of gigabytes takes seconds, and only an expectation needs it here.
            admitted[:] = [
                admit_file(
                    file,
                    allow_blocked=allow_blocked_quantization,
                    expect_sha256=expect_sha256,
                    policy_active=policy is not None,
                    with_digest=False,
                    on_hash=on_hash,
                )
            ]

        self._options = replace(options, admit=admit)
        try:
            session = self._opened(replace(self._options, check=self._tokenizer.start))
        except BaseException:
            self._tokenizer.close()
            raise
        self.admission = admitted[0]
        self._decoder, self._closed = Decoder(session, reword=reword), False
        self.guard = guard_for(self.admission)
        self._warn = warn or (lambda warning: warnings.warn(warning, UserWarning, stacklevel=4))
        for warning in self.admission.said:
            self._warn(warning)

    def _opened(self, options: SessionOptions) -> Session:
        session = open_session(self._path, options)
        try:
            if session.backend == "cuda":  # elsewhere kernels take longer to compile than most prompts to run
                session.expect_prompt(LONG_PROMPT)
        except BaseException:
            session.close()
            raise
        return session

    @property
    def session(self) -> Session:
        """Where it runs; UsageError once the model is closed, or in a forked child."""
        self._decoder.turns.check()
        if self._closed:
            raise UsageError(CLOSED)
        return self._decoder.session  # while it is loaded anew the one before, whose facts hold

    def _have(self, sampling: bool, logits: bool) -> None:
        """Loads the model anew, once, where a request needs what the program leaves out; by whom has the turn."""
        session, had = self.session, self._options
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
            session.close()
            try:
                self._decoder.session = self._opened(self._options)
            except BaseException:
                self._closed = True  # so that a model that cannot be loaded again says so
                raise
            self._decoder.forget()

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
        with self._asked():
            return self._tokenizer.get()

    @property
    def template(self) -> ChatTemplate:
        """The file's chat template; UnsupportedModelError if it has none."""
        with self._asked() as session:
            if self._template is None:
                self._template = ChatTemplate.of_file(session.model.file, self._chat_template)
            return self._template

    @cached_property
    def published_sampling(self) -> dict[str, Any]:
        """Options of sampling that the file asks for (its keys `general.sampling.*`): the defaults of `chat`."""
        return published_sampling(self.session.model.file.metadata)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens that it spells out become theirs."""
        require("text", text, str, "a string")
        with self._asked():
            return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        given = token_ids("ids", ids)
        with self._asked():
            return self.tokenizer.decode(given)

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
        with self._asked() as session:
            if isinstance(prompt, str):
                self.ask_guard([{"role": "user", "content": prompt}])
                tokenizer = self.tokenizer
                for warning in warnings_of(tokenizer, prompt):
                    self._warn(warning)
                marks = marks_of_text(session.model.file, tokenizer)
                return self._text(tokenizer.encode(prompt, session.context), limits, stop, marks)
            ids = token_ids("prompt", prompt, "a text, or a list of token ids")
            if stop:
                raise UsageError("stop looks for text; it does not go with token ids")
            if self.guard is not None:
                self.ask_guard([{"role": "user", "content": self.decode(ids)}])
            return self._run(ids, limits)

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        stop: Sequence[str] = (),
        cancelled: Callable[[], bool] | None = None,
        **sampling: Any,
    ) -> TextRun:
        """The assistant's next turn, in pieces. A conversation that goes on from the last one is not read again.

        messages       dicts of role ("system", "developer", "user", "assistant", "tool") and content, oldest first;
                       with tool_calls, reasoning_content, name, lists of text parts: `text.messages.checked`.
        thinking       switch the model's thinking, where its template can; None leaves it to the template.
        tools          functions that the model may call, as JSON schemas, where its template knows such.
        template_vars  further variables of the template, beside those of `psigraph.load`.
        cancelled      asked before every token; True ends the turn.
        sampling       as for `generate`, beside what the file asks for (`published_sampling`).
        The rest, and what is raised, as for `generate`; also ModelFileError for a template that is broken. The result's
        `answer` is its text without what the model thought before, which is its `reasoning`.
        """
        require("messages", messages, Sequence, "a list of messages")
        if thinking is not None:
            require("thinking", thinking, bool, "True, False or None")
        if template_vars is not None:
            require("template_vars", template_vars, Mapping, "a dict")
        limits = self._limits(max_new_tokens, {**self.published_sampling, **sampling}, cancelled)
        with self._asked() as session:
            messages = checked(messages)
            self.ask_guard(messages)
            self._ask_guard_about(tools, template_vars)
            tokenizer, template = self.tokenizer, self.template
            prompt = self.rendered(messages, thinking, tools, template_vars)
            ids = tokenizer.encode(prompt, session.context)
            if len(ids) > session.context:
                several = sum(message["role"] == "user" for message in messages) > 1
                less = "begin anew (/reset in a chat)" if several else "shorten it"
                raise UsageError(
                    f"the conversation has {len(ids):,} tokens, the context holds {session.context:,}: {less}"
                    f"{session.larger_context}"
                )
            return self._text(ids, limits, stop, marks_of_chat(session.model.file, tokenizer, template, prompt))

    def rendered(
        self,
        messages: Sequence[Message],
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that `chat` writes for the same."""
        with self._asked() as session:
            return self.template.render(
                messages,
                thinking,
                tools=tools or None,  # clients send an empty list
                variables={**self._template_vars, **(template_vars or {})},
                most_characters=session.context * self.tokenizer.longest_token,
            )

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of `ids`: float[len(ids), vocabulary], row i for the token that follows ids[i].

        float32 on a device; on the backend cpu float64 for models of up to 2**28 weights. A row of a vocabulary of
        151,936 takes 0.6 MB. The first call loads the model anew unless it was loaded with outputs=("logits",).
        UsageError for no ids, one outside the vocabulary, or more than the context holds.
        """
        given = token_ids("ids", ids)
        with self._asked() as session:
            check_ids(given, session.vocabulary)
            with self._decoder.turns.alone():
                self._have(sampling=False, logits=True)
                self._decoder.forget()
                self.session.reset()
                return self.session.forced_logits(given)

    def _limits(
        self,
        max_new_tokens: int | None,
        sampling: dict[str, Any],
        cancelled: Callable[[], bool] | None = None,
        logprobs: int | None = None,
    ) -> Limits:
        sampler = sampler_settings(sampling)
        return Limits(
            max_new_tokens, sampler, logprobs=logprobs, cancelled=(lambda: False) if cancelled is None else cancelled
        )

    @contextmanager
    def _asked(self) -> Iterator[Session]:
        """The session, for a call: open, and in words of the caller's."""
        try:
            yield self.session
        except PsigraphError as error:
            self._reword(error)
            raise

    def _run(self, ids: Sequence[int], limits: Limits) -> TokenRun:
        return self._decoder.run(ids, limits, self._ready)

    def _ready(self, limits: Limits) -> None:
        self._have(sampling=not limits.sampler.greedy, logits=limits.logprobs is not None)

    def _text(self, ids: Sequence[int], limits: Limits, stop: Sequence[str], marks: Marks) -> TextRun:
        limits = replace(limits, end_tokens=marks.end_ids)
        return TextRun(self._run(ids, limits), self.tokenizer, texts("stop", stop), self.guard, marks)

    def ask_guard(self, messages: Sequence[Message]) -> None:
        """PolicyRefusal for the first of the user's, the system's or a developer's messages that the guard refuses.

        `generate` and `chat` ask by themselves.
        """
        if self.guard is None:
            return
        previous = ""
        for message in messages:
            if message["role"] not in ("system", "developer", "user"):
                continue
            asked, words = message["role"] == "user", words_of(message)
            decision = self.guard.classify(words, previous if asked else "")
            if decision.refused:
                raise PolicyRefusal(decision.message)
            previous = words if asked else previous

    def _ask_guard_about(self, *others: object) -> None:
        """The same about what a template may write beside the messages: tools, variables."""
        written = "\n".join(strings_in((*others, self._template_vars)))
        if written:
            self.ask_guard([{"role": "system", "content": written}])

    def close(self) -> None:
        """Free everything; who reads a text that is not over hears why it ends. A second call does nothing."""
        if self._decoder.session.forked:
            return
        with self._decoder.turns.alone(finish=False) as begun:
            self._closed = True
            if begun is not None:
                begun.end(UsageError(CLOSED))
            self._tokenizer.close()
            self._decoder.session.close()

    def __enter__(self) -> LanguageModel:
        with self._asked():
            return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
