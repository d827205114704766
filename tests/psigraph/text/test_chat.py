"""Conversations and their settings, without a terminal and mostly without a model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_model import Q4

from psigraph.api import LanguageModel
from psigraph.ir.errors import OutputError, PolicyRefusal, UsageError
from psigraph.options import SessionOptions
from psigraph.text.chat import CHAT_SAMPLER, ChatSettings, Conversation
from psigraph.text.sampler import SamplerSettings


class Parrot:
    """A model that says what it was asked with."""

    def __init__(self) -> None:
        self.session = SimpleNamespace(model=SimpleNamespace(file=SimpleNamespace(path=Path("parrot.gguf"))))
        self.asked: list[Any] = []

    def chat(self, messages: Any, *args: Any, **options: Any) -> str:
        self.asked.append((messages, args, options))
        return "ok"

    def ask_guard(self, messages: Any) -> None:
        if any("dose" in message["content"] for message in messages):
            raise PolicyRefusal("no doses")


def conversation(**options: Any) -> tuple[Conversation, Parrot]:
    model: Any = Parrot()
    return Conversation(model, **options), model


def test_a_question_goes_with_what_was_kept_before_it() -> None:
    talk, model = conversation(system="Be brief.")
    talk.ask("A")
    talk.keep("A", "B")
    talk.ask("C")
    roles = [[(one["role"], one["content"]) for one in messages] for messages, _, _ in model.asked]
    assert roles == [
        [("system", "Be brief."), ("user", "A")],
        [("system", "Be brief."), ("user", "A"), ("assistant", "B"), ("user", "C")],
    ]
    talk.reset()
    assert talk.messages() == [{"role": "system", "content": "Be brief."}]


def test_settings_reach_the_model() -> None:
    settings = ChatSettings(replace(CHAT_SAMPLER, seed=5), 7, False, ("x",))
    talk, model = conversation(settings=settings)
    talk.ask("A")
    _, args, options = model.asked[0]
    assert args == (7,)
    assert (options.pop("thinking"), options.pop("stop"), options.pop("cancelled")) == (False, ("x",), None)
    assert SamplerSettings(**options) == settings.sampler
    talk.settings = talk.settings.with_value("temperature", "0")
    talk.ask("A")
    assert model.asked[1][2]["temperature"] == 0  # said too: what is left out is as the file asks


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("temperature", "1", 1.0),
        ("top_k", "3", 3),
        ("seed", "18446744073709551615", 2**64 - 1),
        ("logit_bias", '{"42": -5, "7": "-inf"}', {42: -5.0, 7: -math.inf}),
        ("logit_bias", "none", {}),
        ("max_new_tokens", "9", 9),
        ("max_new_tokens", "none", None),
        ("thinking", "off", False),
        ("thinking", "default", None),
        ("stop", "a b", ("a b",)),
        ("stop", "none", ()),
    ],
)
def test_a_setting_is_read_from_what_was_typed(name: str, text: str, value: Any) -> None:
    settings = ChatSettings().with_value(name, text)
    assert settings.record()[name] == value
    assert {key: old for key, old in settings.record().items() if key != name} == {
        key: old for key, old in ChatSettings().record().items() if key != name
    }


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("heat", "1", "there is no setting 'heat'; the settings are temperature, "),
        ("temperature", "warm", "temperature is 'warm'; give a number"),
        ("temperature", "nan", "temperature is nan"),
        ("temperature", "101", "from 0 to 100"),
        ("top_k", "1.5", "top_k is '1.5'; give a whole number"),
        ("max_new_tokens", "0", "at least 1"),
        ("thinking", "perhaps", "give on, off or default"),
        ("stop", "", "stop string is empty"),
        ("logit_bias", "5", "give token ids and biases as"),
        ("logit_bias", '{"a": 1}', "give token ids and biases as"),
    ],
)
def test_a_setting_that_cannot_be(name: str, text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        ChatSettings().with_value(name, text)


def test_a_conversation_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    sampler = SamplerSettings(temperature=0.5, logit_bias={3: -math.inf, 4: 1.5}, seed=9)
    talk, _ = conversation(settings=ChatSettings(sampler, 5, True, ("a", "b")), system="Sei knapp ☃.")
    talk.keep("Frage", "Antwort\n", "Gedanke")
    talk.keep("Und?", "So.")
    talk.save(tmp_path / "chat.json")
    other, _ = conversation()
    other.load(tmp_path / "chat.json")
    assert (other.system, other.turns, other.settings) == (talk.system, talk.turns, talk.settings)
    assert other.turns[1] == {"role": "assistant", "content": "Antwort\n", "reasoning_content": "Gedanke"}
    assert other.turns[3] == {"role": "assistant", "content": "So."}
    with pytest.raises(OutputError):
        talk.save(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "other"}, "is no saved chat; /save writes them"),
        ({"messages": "x"}, "holds no messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "message 0: role 'king'"),
        ({"messages": [3]}, "message 0: give a role and a content"),
        ({"system": 3}, "holds no messages"),
        ({"settings": {}}, "its settings are not those of a chat"),
        ({"settings": [1]}, "its settings are not those of a chat"),
        ({"settings": {"stop": [1]}}, "its settings are not those of a chat"),
        ({"settings": {"stop": "abc"}}, "its settings are not those of a chat"),
        ({"settings": {"max_new_tokens": 0}}, "its settings are not those of a chat"),
        ({"settings": {"top_p": 7}}, "top_p is 7"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    talk, _ = conversation(system="S")
    talk.keep("A", "B")
    talk.save(path)
    record = json.loads(path.read_text())
    settings = change.get("settings")
    if isinstance(settings, dict) and settings:
        change = {"settings": {**record["settings"], **settings}}
    path.write_text(json.dumps({**record, **change}))
    before = (talk.system, list(talk.turns), talk.settings)
    with pytest.raises(UsageError, match=named):
        talk.load(path)
    assert (talk.system, talk.turns, talk.settings) == before


def test_the_guard_reads_what_is_loaded(tmp_path: Path) -> None:
    talk, _ = conversation()
    talk.keep("What dose?", "x")
    talk.save(tmp_path / "chat.json")
    talk.reset()
    with pytest.raises(PolicyRefusal):
        talk.load(tmp_path / "chat.json")
    assert talk.turns == []


def test_a_conversation_that_outgrows_the_context_says_so() -> None:
    said: list[str] = []
    with LanguageModel(Q4, SessionOptions("cpu", ctx=24), warn=said.append) as model:
        talk = Conversation(model, ChatSettings(SamplerSettings(temperature=0)))
        run = talk.ask("The state of the Union.")
        answer = "".join(run)
        assert run.reason in ("context", "end")
        talk.keep("The state of the Union.", answer)
        with pytest.raises(UsageError, match=r"conversation has \d+ tokens, the context holds 24: begin anew"):
            talk.ask("And the whale?")
    assert not said  # the policy has no word for a file that is not MedPsy
