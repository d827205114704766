"""A conversation's messages, checked before a template sees them, and as Hugging Face's renderer hands them on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..ir.errors import UsageError

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
# Names under which reasoning comes; templates read the first, those of gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MOST_DEPTH = 64


def checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages for a template: all keys but those whose value is None, and reasoning under both its names.

    A message is a dict of role and content: text, or a list of {"type": "text", "text": ...}. The content may be absent
    or None where an assistant calls tools or only thinks. Further keys (tool_calls, reasoning_content, name,
    tool_call_id, ...) hold what JSON can hold. UsageError names the first message that is wrong.
    """
    if not messages:
        raise UsageError("the conversation is empty: give at least one message")
    return [_message(f"message {index}", message) for index, message in enumerate(messages)]


def _message(named: str, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise UsageError(f"{named}: give a role and a content")
    role = message["role"]
    if role not in ROLES:
        raise UsageError(f"{named}: role {str(role)[:40]!r}; the roles are {', '.join(ROLES)}")
    found = {str(key): plain(value, named) for key, value in message.items() if value is not None}
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    if "content" in found:
        _check_content(named, found["content"])
    elif role != "assistant" or not (found.get("tool_calls") or reasoning):
        raise UsageError(f"{named}: give a role and a content")
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise UsageError(f"{named}: its reasoning must be text")
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found


def _check_content(named: str, content: object) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise UsageError(f"{named}: its content must be text, or a list of parts that are text")
    for index, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else None
            what = f"is of type {str(kind)[:40]!r}" if kind not in (None, "text") else "holds no text"
            raise UsageError(f"{named}: part {index} of its content {what}; this model reads text")


def plain(value: Any, named: str, depth: int = 0) -> Any:
    """What JSON makes of a value: dicts, lists, text, numbers, booleans, None; UsageError names it for other types."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        if not is_unicode(value):
            raise UsageError(f"{named}: its content is not valid Unicode; give UTF-8 text")
        return value
    if depth == _MOST_DEPTH:
        raise UsageError(f"{named}: lists or dicts lie more than {_MOST_DEPTH} deep in each other")
    if isinstance(value, Mapping):
        return {plain(str(key), named): plain(one, named, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, named, depth + 1) for one in value]
    raise UsageError(f"{named}: holds a {type(value).__name__}; give what JSON can hold: text, numbers, lists, dicts")


def words_of(message: Message) -> str:
    """The text of a message's content: its parts in lines, nothing where it has none."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content or () if isinstance(part, Mapping) and "text" in part)


def strings_in(value: object) -> Iterator[str]:
    """Every text in nested lists and dicts, names of entries aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from strings_in(one)
    elif isinstance(value, Sequence):
        for one in value:
            yield from strings_in(one)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: bytes that are none become half characters in Python."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
