"""A conversation with a model: its history, its settings, and the file in which it is kept. Knows no terminal."""

from __future__ import annotations

import json
import math
import os
import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..api import LanguageModel
from ..ir.errors import UsageError
from ..json_file import read_json, write_json_atomically
from .generation import TextRun
from .messages import checked, words_of
from .sampler import SamplerSettings
from .stop_strings import StopStrings
from .template import TooLongError

FORMAT = "psigraph chat 1"
# What Qwen3's model card asks for; taking the likeliest token each time makes its thinking go round in circles.
CHAT_SAMPLER = SamplerSettings(temperature=0.6, top_k=20, top_p=0.95, min_p=0.0)
_OFF = ("none", "off", "default")

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class ChatSettings:
    """How answers are made.

    max_new_tokens  None: until the model ends its turn or the context is full.
    thinking        None: as the template does by itself.
    stop            strings before which an answer ends.
    """

    sampler: SamplerSettings = CHAT_SAMPLER
    max_new_tokens: int | None = None
    thinking: bool | None = None
    stop: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Name -> value, as `with_value` and a saved chat name them."""
        sampler = {one.name: getattr(self.sampler, one.name) for one in fields(SamplerSettings)}
        return {**sampler, "max_new_tokens": self.max_new_tokens, "thinking": self.thinking, "stop": self.stop}

    def with_value(self, name: str, text: str) -> ChatSettings:
        """The settings with one of them read from what was typed; UsageError says what the name or value may be.

        temperature 0.7; thinking on, off or default; max_new_tokens 100 or none; stop TEXT, which is added, or none;
        logit_bias {"42": -5}, or none.
        """
        if name == "thinking":
            words: dict[str, bool | None] = {"on": True, "off": False, "default": None}
            if text not in words:
                raise UsageError(f"thinking is {text!r}; give on, off or default")
            return replace(self, thinking=words[text])
        if name == "stop":
            if text == "none":
                return replace(self, stop=())
            StopStrings((text,))
            return replace(self, stop=(*self.stop, text))
        if name == "max_new_tokens":
            count = None if text in _OFF else _number(name, text, int)
            if count is not None and count < 1:
                raise UsageError(f"max_new_tokens is {count}; at least 1 is needed, or none")
            return replace(self, max_new_tokens=count)
        if name == "logit_bias":
            return replace(self, sampler=replace(self.sampler, logit_bias=_biases(text)))
        known = self.record()
        if name not in known:
            raise UsageError(f"there is no setting {name!r}; the settings are {', '.join(known)}")
        value = _number(name, text, type(known[name]))
        return replace(self, sampler=replace(self.sampler, **{name: value}))

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> ChatSettings:
        """The inverse of `record` after JSON; UsageError for what is no setting."""
        try:
            values = dict(record)
            stop, most, thinking = values.pop("stop"), values.pop("max_new_tokens"), values.pop("thinking")
            biases = {int(token): _bias(bias) for token, bias in dict(values.pop("logit_bias")).items()}
            found = cls(SamplerSettings(**values, logit_bias=biases), most, thinking, tuple(stop))
            StopStrings(found.stop)
            texts = isinstance(stop, list | tuple) and all(isinstance(one, str) for one in stop)
            switched = thinking is None or isinstance(thinking, bool)
            if not texts or not switched or (most is not None and (type(most) is not int or most < 1)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UsageError("its settings are not those of a chat") from None
        return found


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name} is {text!r}; give {what}") from None


def _biases(text: str) -> dict[int, float]:
    if text in _OFF:
        return {}
    try:
        return {int(token): _bias(bias) for token, bias in dict(json.loads(text)).items()}
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise UsageError(f'logit_bias is {text[:40]!r}; give token ids and biases as {{"42": -5}}, or none') from None


def _bias(value: Any) -> float:
    return -math.inf if value == "-inf" else float(value)


@dataclass
class Conversation:
    """The turns so far. `ask` gives an answer in pieces; `keep` makes question and answer part of the history."""

    model: LanguageModel
    settings: ChatSettings = field(default_factory=ChatSettings)
    system: str | None = None
    turns: Turns = field(default_factory=list)

    @property
    def questions(self) -> list[str]:
        """What the user said, turn by turn, oldest first."""
        return [words_of(turn) for turn in self.turns if turn["role"] == "user"]

    def check(self, settings: ChatSettings) -> None:
        """UsageError for settings that no answer of this model could be made by."""
        settings.sampler.words(self.model.vocabulary)  # says which token of a bias there is not
        if settings.thinking is not None:
            replace(self, settings=settings).rendered("Hello")

    def messages(self, question: str | None = None) -> list[dict[str, Any]]:
        """For the template: the system message, the turns, the question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [{"role": "user", "content": question}] if question is not None else []
        return [*system, *self.turns, *asked]

    def ask(self, question: str, cancelled: Callable[[], bool] | None = None) -> TextRun:
        """The model's answer; nothing is kept yet. Raises as `LanguageModel.chat`.

        UsageError where the conversation has outgrown the context: nothing of it is ever left out quietly.
        """
        settings = self.settings
        # All of them: what is left out would be the file's own.
        sampler = {one.name: getattr(settings.sampler, one.name) for one in fields(SamplerSettings)}
        return self.model.chat(
            self.messages(question),
            settings.max_new_tokens,
            thinking=settings.thinking,
            stop=settings.stop,
            cancelled=cancelled,
            **sampler,
        )

    def keep(self, question: str, answer: str, reasoning: str = "") -> None:
        """Remember a turn of each; what the model thought lies beside its answer, for the template to show or not."""
        thought = {"reasoning_content": reasoning} if reasoning else {}
        said = {"role": "assistant", "content": answer, **thought}
        self.turns += [{"role": "user", "content": question}, said]

    def rendered(self, question: str) -> str:
        """The prompt for the answer to a question."""
        return self.model.rendered(self.messages(question), self.settings.thinking)

    def undo(self) -> str:
        """Forget the last turn, and give its question; UsageError where there is none."""
        last = max((index for index, turn in enumerate(self.turns) if turn["role"] == "user"), default=None)
        if last is None:
            raise UsageError("nothing was asked yet")
        question = words_of(self.turns[last])
        self.turns = self.turns[:last]
        return question

    def drop(self, count: int) -> list[str]:
        """Leave out the `count` oldest turns, and give their questions."""
        dropped = self.questions[:count]
        self.turns = self._without(count)
        return dropped

    def turns_in_the_way(self, question: str) -> int | None:
        """How many of the oldest turns must go until the context has room for the question and an answer, the fewest;
        None where that does not help. Room for an answer: max_new_tokens, or a quarter of the context if that is less.
        """
        context, most = self.model.context, len(self.questions)
        room = min(self.settings.max_new_tokens or context, context // 4)
        fewest = bisect_left(range(most + 1), True, key=lambda count: self._tokens(count, question) <= context - room)
        if fewest <= most:
            return fewest
        return most if self._tokens(most, question) <= context else None

    def _tokens(self, dropped: int, question: str) -> int:
        """Of the prompt, without the oldest turns."""
        rest = replace(self, turns=self._without(dropped))
        try:
            return len(self.model.encode(rest.rendered(question)))
        except TooLongError:
            return sys.maxsize

    def _without(self, count: int) -> Turns:
        starts = [index for index, turn in enumerate(self.turns) if turn["role"] == "user"]
        return self.turns[starts[count] :] if count < len(starts) else []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a file, whole or not at all; OutputError where that fails."""
        settings = self.settings.record()
        biases = settings["logit_bias"].items()
        settings["logit_bias"] = {str(token): "-inf" if bias == -math.inf else bias for token, bias in biases}
        record = {
            "format": FORMAT,
            "model": self.model.session.model.file.path.name,
            "system": self.system,
            "messages": self.turns,
            "settings": settings,
        }
        write_json_atomically(path, record)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take the place of this conversation by one that was saved.

        UsageError where the file holds none, PolicyRefusal where the medical guard refuses what was asked in it; this
        conversation then stays as it was.
        """
        record = read_json(path)
        if record.get("format") != FORMAT:
            raise UsageError(f"{path}: is no saved chat; /save writes them")
        system, turns = record.get("system"), record.get("messages")
        try:
            if not isinstance(turns, list) or not isinstance(system, str | None):
                raise UsageError("it holds no messages")
            if turns:
                checked(turns)
            settings = ChatSettings.of_record(record.get("settings") or {})
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        self.model.ask_guard([*([{"role": "system", "content": system}] if system else []), *turns])
        self.system, self.turns, self.settings = system, [dict(turn) for turn in turns], settings

    def reset(self) -> None:
        """Forget all turns; the system message and the settings stay."""
        self.turns = []
