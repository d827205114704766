"""What a user can type in a chat beside questions: lines that begin with a slash."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..api import LanguageModel
from ..ir.errors import PsigraphError, UsageError
from ..text.chat import Conversation, Turns
from .sampling_options import new_seed


class Leave(Exception):
    """The user wants to go."""


@dataclass
class Chat:
    """What commands work on.

    reopen    the model with a context of so many tokens, in the place of the one before, which is closed by then.
    question  what is to be asked next, set by commands that ask.
    unanswered  the question that did not fit into the context, and how many of the oldest turns are in its way.
    restored  the turns that come back if that question gets no answer.
    file      where this conversation is kept: /save may write there again.
    """

    conversation: Conversation
    reopen: Callable[[int], LanguageModel]
    question: str | None = None
    unanswered: tuple[str, int] | None = None
    restored: Turns | None = None
    file: str | None = None


def run_command(line: str, chat: Chat) -> str:
    """Does what a line such as `/set temperature 0.7` says, and gives what to show. Leave for /quit.

    Raises UsageError and the errors of what was asked for; the conversation is then as it was.
    """
    name, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        known = ", ".join(f"/{one}" for one in (*COMMANDS, *ALIASES))
        raise UsageError(f"there is no command /{name}; the commands are {known}")
    return command[2](chat, rest.strip())


def _help(_: Chat, rest: str) -> str:
    shown = {name: f"/{name} {arguments}" for name, (arguments, _, _) in COMMANDS.items()}
    width = max(map(len, shown.values()))
    lines = [f"  {shown[name]:<{width}}  {what}" for name, (_, what, _) in COMMANDS.items()]
    lines += [
        f"{', '.join(f'/{alias} is /{name}' for alias, name in ALIASES.items())}.",
        "Anything else goes to the model; // begins a line with a slash. Lines that are pasted together, or stand",
        'between two rows of """, go as one. Ctrl-C stops an answer; at the prompt, twice, it leaves, as does Ctrl-D.',
    ]
    return "\n".join(lines)


def _system(chat: Chat, rest: str) -> str:
    conversation = chat.conversation
    if not rest:
        return f"system: {conversation.system}" if conversation.system else "no system message"
    if rest == "none":
        conversation.system = None
        return "no system message from here on"
    conversation.model.ask_guard([{"role": "system", "content": rest}])
    conversation.system = rest
    return "the system message holds from the next answer on"


def _set(chat: Chat, rest: str) -> str:
    name, _, value = rest.removeprefix("parameter ").strip().partition(" ")
    name, value = SETTING_ALIASES.get(name, name), value.strip()
    conversation = chat.conversation
    known = {**conversation.settings.record(), "ctx": conversation.model.context}
    if not name:
        return "\n".join(f"  {key} {_shown(found)}" for key, found in known.items())
    if not value and name in known:
        return f"{name} {_shown(known[name])}"
    if name == "ctx":
        return _set_context(chat, value)
    if value == "-1":  # what other tools call a new seed, all tokens, no limit
        value = {"seed": str(new_seed()), "top_k": "0", "max_new_tokens": "none"}.get(name, value)
    settings = conversation.settings.with_value(name, value)
    conversation.check(settings)
    conversation.settings = settings
    return f"{name} {_shown(settings.record()[name])}"


def _set_context(chat: Chat, value: str) -> str:
    conversation = chat.conversation
    before, most = conversation.model.context, conversation.model.session.model.binding.context_limit
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:9]) <= most):
        raise UsageError(f"ctx is {value[:20]!r}; give a number of tokens from 1 to {most:,}")
    conversation.model.close()
    try:
        conversation.model = chat.reopen(int(value))
    except PsigraphError as error:
        conversation.model = chat.reopen(before)
        raise UsageError(f"ctx stays {before}: {error}") from None
    return f"ctx {conversation.model.context}"


def _shown(value: object) -> str:
    if value is None or value in ((), {}):
        return "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _save(chat: Chat, rest: str) -> str:
    forced, name = rest.startswith("-f "), rest.removeprefix("-f ").strip()
    path = _file("save", name)
    if os.path.isfile(path) and not forced and os.path.realpath(path) != chat.file:
        raise UsageError(f"{path}: is there already; /save -f {name} writes over it")
    chat.conversation.save(path)
    chat.file = os.path.realpath(path)
    return f"saved: {path}"


def _load(chat: Chat, rest: str) -> str:
    path = _file("load", rest)
    conversation = chat.conversation
    loaded = replace(conversation)
    loaded.load(path)
    loaded.check(loaded.settings)
    conversation.system, conversation.turns, conversation.settings = loaded.system, loaded.turns, loaded.settings
    chat.file, chat.unanswered = os.path.realpath(path), None
    return f"loaded: {path}, {len(conversation.turns)} messages"


def _file(command: str, name: str) -> str:
    """The path, with a home for ~."""
    if not name:
        raise UsageError(f"/{command}: name a file, such as /{command} chat.json")
    path = os.path.expanduser(name)
    if path.startswith("~"):
        raise UsageError(f"/{command} {name}: there is no such home folder; ./{name} would name a file here")
    return path


def _reset(chat: Chat, _: str) -> str:
    chat.conversation.reset()
    chat.file = chat.unanswered = None
    return "the conversation begins anew"


def _undo(chat: Chat, _: str) -> str:
    chat.unanswered = None
    return f"taken back: {_quoted(chat.conversation.undo())}"


def _regen(chat: Chat, _: str) -> str:
    conversation = chat.conversation
    before = list(conversation.turns)
    chat.question, chat.restored = conversation.undo(), before
    sampler = conversation.settings.sampler
    if sampler.greedy:
        return "asked again; at temperature 0 the answer stays as it is"
    # The same seed would draw the same answer.
    conversation.settings = conversation.settings.with_value("seed", str((sampler.seed + 1) % (1 << 64)))
    return f"asked again, with seed {conversation.settings.sampler.seed}"


def _drop(chat: Chat, rest: str) -> str:
    conversation = chat.conversation
    if not conversation.questions:
        raise UsageError("/drop: there is no turn to leave out")
    if rest and not (rest.isascii() and rest.isdigit() and 1 <= int(rest[:9]) <= len(conversation.questions)):
        raise UsageError(f"/drop {rest[:20]}: give a number of turns from 1 to {len(conversation.questions)}")
    chat.question, in_the_way = chat.unanswered or (None, 0)
    dropped = conversation.drop(int(rest) if rest else in_the_way or conversation.turns_in_the_way("") or 1)
    chat.unanswered = None
    return "\n".join(f"left out: {_quoted(question)}" for question in dropped)


def offer_to_drop(chat: Chat, question: str) -> str:
    """What /drop will leave out so that the question fits; "" where that would not help."""
    conversation = chat.conversation
    count = conversation.turns_in_the_way(question)
    if not count:
        return ""
    chat.unanswered = question, count
    which = ", ".join(map(_quoted, conversation.questions[:count]))
    turns = "oldest turn" if count == 1 else f"oldest {count} turns"
    return f"/drop leaves out the {turns} of {len(conversation.questions)} ({which}) and asks again"


def _quoted(text: str) -> str:
    """The beginning of a question, for people."""
    words = " ".join(text.split())
    return f'"{words[:40]}..."' if len(words) > 43 else f'"{words}"'


def _quit(_: Chat, rest: str) -> str:
    raise Leave


Run = Callable[[Chat, str], str]
# Name -> what follows it, what it does, and how.
COMMANDS: dict[str, tuple[str, str, Run]] = {
    "help": ("", "show this", _help),
    "system": ("[TEXT|none]", "show or change the system message", _system),
    "set": ("[NAME [VALUE]]", "show or change a setting, such as /set temperature 0.7 or /set ctx 8192", _set),
    "save": ("[-f] FILE", "keep the conversation in a file; -f: in the place of another", _save),
    "load": ("FILE", "go on with a conversation that was kept", _load),
    "undo": ("", "take the last question and its answer back", _undo),
    "regen": ("", "ask the last question again, for another answer", _regen),
    "drop": ("[N]", "leave out the N oldest turns, or as many as the context has no room for", _drop),
    "reset": ("", "begin anew; system message and settings stay", _reset),
    "quit": ("", "leave", _quit),
}
# What other chats call them.
ALIASES = {"clear": "reset", "bye": "quit", "exit": "quit", "?": "help"}
SETTING_ALIASES = {
    "temp": "temperature",
    "num_ctx": "ctx",
    "num_predict": "max_new_tokens",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_window",
}
