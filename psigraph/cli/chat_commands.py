"""What a user can type in a chat beside questions: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable

from ..ir.errors import UsageError
from ..text.chat import Conversation


class Leave(Exception):
    """The user wants to go."""


def run_command(line: str, conversation: Conversation) -> str:
    """Does what a line such as `/set temperature 0.7` says, and gives what to show. Leave for /quit.

    Raises UsageError and the errors of what was asked for; the conversation is then as it was.
    """
    name, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise UsageError(f"there is no command /{name}; the commands are {', '.join(f'/{one}' for one in COMMANDS)}")
    return command[2](conversation, rest.strip())


def _help(_: Conversation, rest: str) -> str:
    width = max(len(f"/{name} {arguments}") for name, (arguments, _, _) in COMMANDS.items())
    lines = [f"  {f'/{name} {arguments}':<{width}}  {what}" for name, (arguments, what, _) in COMMANDS.items()]
    lines += [
        "Anything else goes to the model; // begins a line with a slash. Lines between two rows of",
        '""" go as one. Ctrl-C stops an answer; at the prompt, twice, it leaves, as does Ctrl-D.',
    ]
    return "\n".join(lines)


def _system(conversation: Conversation, rest: str) -> str:
    if not rest:
        return f"system: {conversation.system}" if conversation.system else "no system message"
    if rest == "none":
        conversation.system = None
        return "no system message from here on"
    conversation.model.ask_guard([{"role": "system", "content": rest}])
    conversation.system = rest
    return "the system message holds from the next answer on"


def _set(conversation: Conversation, rest: str) -> str:
    name, _, value = rest.partition(" ")
    if not name:
        return "\n".join(f"  {key} {_shown(found)}" for key, found in conversation.settings.record().items())
    known = conversation.settings.record()
    if not value.strip() and name in known:
        return f"{name} {_shown(known[name])}"
    settings = conversation.settings.with_value(name, value.strip())
    settings.sampler.words(conversation.model.vocabulary)  # says which token of a bias there is not
    conversation.settings = settings
    return f"{name} {_shown(settings.record()[name])}"


def _shown(value: object) -> str:
    if value is None or value in ((), {}):
        return "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _save(conversation: Conversation, rest: str) -> str:
    conversation.save(_file("save", rest))
    return f"saved: {rest}"


def _load(conversation: Conversation, rest: str) -> str:
    conversation.load(_file("load", rest))
    return f"loaded: {rest}, {len(conversation.turns)} messages"


def _file(command: str, rest: str) -> str:
    if not rest:
        raise UsageError(f"/{command}: name a file, such as /{command} chat.json")
    return rest


def _reset(conversation: Conversation, _: str) -> str:
    conversation.reset()
    return "the conversation begins anew"


def _quit(_: Conversation, rest: str) -> str:
    raise Leave


Run = Callable[[Conversation, str], str]
# Name -> what follows it, what it does, and how.
COMMANDS: dict[str, tuple[str, str, Run]] = {
    "help": ("", "show this", _help),
    "system": ("[TEXT|none]", "show or change the system message", _system),
    "set": ("[NAME [VALUE]]", "show or change a setting, such as /set temperature 0.7", _set),
    "save": ("FILE", "keep the conversation in a file", _save),
    "load": ("FILE", "go on with a conversation that was kept", _load),
    "reset": ("", "begin anew; system message and settings stay", _reset),
    "quit": ("", "leave", _quit),
}
