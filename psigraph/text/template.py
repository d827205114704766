"""Chat templates: a conversation becomes a prompt as the model file says.

A template is a program in Jinja out of a file that nobody vouches for, so it runs in an immutable sandbox, and since a
sandbox bounds no work, in a process of its own with limits on time and memory (template_child.py, template_jail.py).
It writes what Hugging Face transformers writes (scripts/template_reference.py).

    template = ChatTemplate.of_file(file)
    prompt = template.render([{"role": "user", "content": "Hello"}], thinking=False)
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from ..ir.errors import ModelFileError, OutputError, UnsupportedModelError, UsageError
from ..runtime.gguf.cursor import quoted
from ..runtime.gguf.file import GgufFile
from ..runtime.gguf.strings import StringArray
from . import template_child, template_jail
from .messages import Message, checked, is_unicode, plain

KEY = "tokenizer.chat_template"
CPU_SECONDS = 2
MEMORY_BYTES = 256 << 20
# The limit is on processor time, which a busy machine does not use up; this only ends what will never answer.
PATIENCE_SECONDS = 300.0
OUTPUT_CHARACTERS = 16 << 20
_MOST_SOURCE_BYTES = 4 << 20
# Tokens that templates name: variable -> key of the file.
_NAMED_TOKENS = {
    "bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown", "sep_token": "seperator",
    "mask_token": "mask",
}  # fmt: skip
_GIVEN = ("messages", "add_generation_prompt")  # what a conversation is: no variable of the user's
_END_OF_WORDS = "psigraph-ends-here"
_PROBE = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": _END_OF_WORDS},
    {"role": "user", "content": "b"},
]


class TooLongError(UsageError):
    """A conversation that the context cannot hold, whatever the tokenizer makes of it."""


class ChatTemplate:
    """A template and the special tokens that it may name. Safe to use from several threads."""

    def __init__(
        self, source: str, tokens: Mapping[str, str] | None = None, with_tools: str | None = None, named: str = KEY
    ) -> None:
        """source: Jinja text; tokens: such as {"bos_token": "<|endoftext|>"}; with_tools: the text for conversations
        with tools, where it is another; named: where it comes from, for errors."""
        self.source = source
        self._with_tools = source if with_tools is None else with_tools
        self.tokens = dict(tokens or {})
        self._named = named
        self._turn_end: str | None = None

    @property
    def sources(self) -> str:
        """All of its text."""
        return self.source if self._with_tools == self.source else self.source + self._with_tools

    @classmethod
    def of_file(cls, file: GgufFile, chosen: str | None = None) -> ChatTemplate:
        """The template of a model file; UnsupportedModelError where it has none.

        chosen: the name of one of the file's (`tokenizer.chat_template.NAME`), or a text to take in their place;
        None: the file's default, and its `tool_use` for conversations with tools. UsageError where it is neither.
        """
        tokens = _named_tokens(file)
        if chosen is not None and ("{" in chosen or "\n" in chosen):
            return cls(chosen, tokens, named="--chat-template")
        names = _templates(file)
        if chosen is not None:
            if chosen not in names:
                known = f"those of the model: {_listed(names)}" if names else "the model has none"
                raise UsageError(
                    f"--chat-template {chosen[:60]}: is no file, and no chat template of this name ({known})"
                )
            return cls(names[chosen], tokens, named=KEY if chosen == "default" else f"{KEY}.{chosen}")
        if "default" not in names:
            others = f"; --chat-template takes one by name: {_listed(names)}" if names else ""
            what = "is empty" if KEY in file.metadata else "is missing"
            raise UnsupportedModelError(
                f"{KEY} {what}, so nobody can say how a conversation is written{others}; "
                "`psigraph generate` without --chat continues plain text, --chat-template gives another"
            )
        return cls(names["default"], tokens, names.get("tool_use"))

    def render(
        self,
        messages: Sequence[Message],
        thinking: bool | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        most_characters: int = OUTPUT_CHARACTERS,
    ) -> str:
        """The prompt for the assistant's next turn. Takes about 0.2 s, and never more than 2 s of processor time.

        messages         see `messages.checked`.
        thinking         what the template calls enable_thinking; None leaves it to the template.
        tools            functions that the model may call, as JSON schemas.
        variables        further ones of the template, by name.
        most_characters  what the context can hold.

        Raises UsageError for messages that are wrong, that the template refuses, or that are too long, and for
        `thinking`, `tools` and variables of which the template knows nothing; ModelFileError for a template that is
        broken, or needs more than it may have; OutputError where its process cannot run.
        """
        most_characters = min(most_characters, OUTPUT_CHARACTERS)
        request = self.request(messages, thinking, tools, variables, most_characters)
        answer = _ask(request, self._named)
        text = answer.get("text")
        if not isinstance(text, str):
            raise self._error(answer, most_characters)
        if not is_unicode(text):
            raise ModelFileError("it writes text that is not valid Unicode", self._named)
        self._turn_end = str(answer.get("probed", "")).partition(_END_OF_WORDS)[2]
        return text

    def turn_end(self) -> str:
        """What the template writes between an assistant's words and the next turn's; "" where it refuses to say."""
        if self._turn_end is None:
            try:
                self.render(_PROBE)
            except (ModelFileError, UsageError):
                self._turn_end = ""
        return self._turn_end or ""

    def request(
        self,
        messages: Sequence[Message],
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        most_characters: int = OUTPUT_CHARACTERS,
    ) -> dict[str, Any]:
        """What template_child.py is asked for by `render`, which documents it."""
        source = self.source if tools is None else self._with_tools
        given = _variables(source, thinking, variables)
        if tools is not None:
            if "tools" not in source:
                raise UsageError("tools: the model's chat template knows none; leave them out")
            if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
                raise UsageError("tools: give a list of JSON schemas, dicts")
            given["tools"] = plain(tools, "tools")
        return {
            "source": source,
            "variables": {"tools": None, "documents": None, **self.tokens, **given, "add_generation_prompt": True},
            "messages": checked(messages),
            "probe": _PROBE,
            "cpu_seconds": CPU_SECONDS,
            "memory_bytes": MEMORY_BYTES,
            "output_characters": most_characters,
        }

    def _error(self, answer: Mapping[str, Any], most_characters: int) -> ModelFileError | UsageError:
        error = " ".join(str(answer.get("error", "")).split())[:200].rstrip(".")
        match answer.get("kind"):
            case "refused":
                return UsageError(f"the model's chat template refuses this conversation: {error}")
            case "long":
                return TooLongError(
                    f"the chat template writes more than {most_characters:,} characters of this conversation, and the "
                    "context cannot hold them; shorten it, or take a larger --ctx"
                )
            case "memory":
                return _over_memory(self._named)
        return ModelFileError(f"it cannot be rendered: {error}", self._named)


def given_template(value: str | os.PathLike[str]) -> str:
    """A template that a user gives, for `ChatTemplate.of_file`: what a file of this path holds, else the value itself,
    a text or a name. UsageError as `read_template`."""
    if isinstance(value, os.PathLike):
        return read_template(value)
    if not value.strip():
        raise UsageError("--chat-template: the name is empty; give a file, or the name of one of the model's templates")
    is_text = "{" in value or "\n" in value
    return value if is_text or not (os.path.lexists(value) or os.sep in value) else read_template(value)


def read_template(path: str | os.PathLike[str]) -> str:
    """A chat template out of a file; UsageError where it cannot be read, is no UTF-8 or empty, or is no template."""
    try:
        with open(path, "rb") as stream:
            text = stream.read(_MOST_SOURCE_BYTES + 1).decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8; a chat template is text") from None
    if not text.strip() or len(text) > _MOST_SOURCE_BYTES:
        what = "is empty" if not text.strip() else f"is longer than {_MOST_SOURCE_BYTES >> 20} MiB"
        raise UsageError(f"{path}: {what}; a chat template is a text in Jinja")
    return text


def _listed(names: Iterable[str]) -> str:
    """The first names, which are a stranger's, for an error of one line."""
    first = [quoted(name, 40) for name in islice(names, 4)]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def _templates(file: GgufFile) -> dict[str, str]:
    """The file's templates by name; what is empty is not there."""
    found = {
        "default" if key == KEY else key.removeprefix(f"{KEY}."): value
        for key, value in file.metadata.items()
        if key == KEY or key.startswith(f"{KEY}.")
    }
    return {name: value for name, value in found.items() if isinstance(value, str) and value.strip()}


def _named_tokens(file: GgufFile) -> dict[str, str]:
    words = file.metadata.get("tokenizer.ggml.tokens")
    tokens = {}
    for variable, name in _NAMED_TOKENS.items():
        index = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(words, (StringArray, list)) and type(index) is int and 0 <= index < len(words):
            tokens[variable] = words[index]
    return tokens


def _variables(source: str, thinking: bool | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The template's variables that a user sets; UsageError for those of which it knows nothing."""
    found: dict[str, Any] = {}
    for name, value in (given or {}).items():
        if not isinstance(name, str) or not name.isidentifier() or name in _GIVEN:
            raise UsageError(f"--template-var {str(name)[:40]!r}: is no variable that can be set")
        if not re.search(rf"(?<![\w.]){name}\b", source):  # a word of it, not a part of one
            raise UsageError(f"--template-var {name[:40]}: the model's chat template knows no such variable")
        found[name] = plain(value, f"--template-var {name}")
    if thinking is not None:
        option = f"--thinking {'on' if thinking else 'off'}"
        if not re.search(r"\benable_thinking\b", source):
            raise UsageError(f"{option}: the model's chat template cannot switch thinking; leave the option out")
        if "enable_thinking" in found:
            raise UsageError(f"{option}: --template-var sets enable_thinking too; give one of them")
        found["enable_thinking"] = thinking
    return found


def _over_memory(named: str) -> ModelFileError:
    return ModelFileError(f"rendering needs more than {MEMORY_BYTES >> 20} MiB, so it was stopped", named)


def _over_time(named: str) -> ModelFileError:
    return ModelFileError(f"rendering takes more than {CPU_SECONDS} s, so it was stopped", named)


def _ask(request: Mapping[str, Any], named: str) -> dict[str, Any]:
    """The child's answer to a request."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    # As a script, it starts without importing psigraph; what it needs beside itself it finds in these folders.
    folders = [str(Path(template_jail.__file__).parent), *_folders()]
    command = [sys.executable, "-I", "-S", template_child.__file__, *folders]
    environment = {"LC_ALL": "C.UTF-8", **{name: os.environ[name] for name in ("TZ",) if name in os.environ}}
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C in a chat is for the chat
        )
    except OSError as error:
        raise OutputError(f"the process that renders the chat template cannot start: {error.strerror}") from None
    with child:
        try:
            most = 24 * request["output_characters"] + (1 << 16)  # JSON escapes a character in up to 12 bytes
            data = _exchange(child, json.dumps(request).encode("ascii"), deadline, most)
        finally:
            child.kill()
    if data is None:
        raise OutputError(
            f"the process that renders the chat template gave no answer in {PATIENCE_SECONDS:.0f} s: it was stopped "
            "from outside, or this machine is too busy; try again"
        )
    try:
        answer = json.loads(data)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        return answer
    code = child.returncode
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        raise _over_time(named)
    # Out of memory, Python cannot always say so.
    if code in (-signal.SIGSEGV, -signal.SIGABRT, 1):
        raise _over_memory(named)
    raise ModelFileError(f"its process ended with code {code} and gave no text", named)


def _exchange(child: subprocess.Popen[bytes], request: bytes, deadline: float, most: int) -> bytes | None:
    """Everything that the child writes, or None where the deadline passed or it writes without end."""
    assert child.stdin is not None
    assert child.stdout is not None
    parts: list[bytes] = []
    rest, read = memoryview(request), 0
    with selectors.DefaultSelector() as selector:
        os.set_blocking(child.stdin.fileno(), False)
        selector.register(child.stdin, selectors.EVENT_WRITE)
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            ready = selector.select(left) if left > 0 else []
            if not ready:
                return None
            for key, _ in ready:
                if key.fileobj is child.stdout:
                    part = os.read(key.fd, 1 << 16)
                    if not part:
                        # Its end of the pipe is closed: let it end by itself, so that its exit code tells why.
                        try:
                            child.wait(max(0.0, deadline - time.monotonic()))
                        except subprocess.TimeoutExpired:
                            return None
                        return b"".join(parts)
                    parts.append(part)
                    read += len(part)
                    if read > most:
                        return None
                    continue
                try:
                    rest = rest[os.write(key.fd, rest[: 1 << 16]) :]
                except BrokenPipeError:
                    rest = rest[:0]
                if not rest:
                    selector.unregister(child.stdin)
                    child.stdin.close()


def _folders() -> list[str]:
    """Where jinja2 and markupsafe lie; ModuleNotFoundError where they do not."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        folders.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(folders))
