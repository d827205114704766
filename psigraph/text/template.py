"""Chat templates: a conversation becomes a prompt as the model file says.

A template is a program in Jinja out of a file that nobody vouches for, so it runs in an immutable sandbox, and since a
sandbox bounds no work, in a process of its own with limits on time and memory (template_child.py).

    template = ChatTemplate.of_file(file)
    prompt = template.render([{"role": "user", "content": "Hello"}], thinking=False)
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..ir.errors import ModelFileError, OutputError, UnsupportedModelError, UsageError
from ..runtime.gguf.file import GgufFile
from ..runtime.gguf.strings import StringArray

KEY = "tokenizer.chat_template"
CPU_SECONDS = 2
MEMORY_BYTES = 256 << 20
WALL_SECONDS = 2.5  # with the start of the process and its end, an answer comes within 3 s
OUTPUT_CHARACTERS = 16 << 20
_ROLES = ("system", "user", "assistant", "tool")
# Tokens that templates name: variable -> key of the file.
_NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}

Message = Mapping[str, str]


class ChatTemplate:
    """A template and the special tokens that it may name. Safe to use from several threads."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        """source: Jinja text; tokens: such as {"bos_token": "<|endoftext|>"}."""
        self.source = source
        self._tokens = dict(tokens or {})

    @classmethod
    def of_file(cls, file: GgufFile) -> ChatTemplate:
        """The template of a model file; UnsupportedModelError where it has none."""
        source = file.metadata.get(KEY)
        if not isinstance(source, str):
            raise UnsupportedModelError(
                f"{KEY} is missing, so nobody can say how a conversation is written; "
                "`psigraph generate` without --chat continues plain text"
            )
        words = file.metadata.get("tokenizer.ggml.tokens")
        tokens = {}
        for variable, name in _NAMED_TOKENS.items():
            index = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
            if isinstance(words, (StringArray, list)) and type(index) is int and 0 <= index < len(words):
                tokens[variable] = words[index]
        return cls(source, tokens)

    def render(self, messages: Sequence[Message], thinking: bool | None = None) -> str:
        """The prompt for the assistant's next turn. Takes about 0.1 s, and never more than 3 s.

        messages: dicts of role ("system", "user", "assistant", "tool") and content.
        thinking: what the template calls enable_thinking; None leaves it to the template.

        Raises UsageError for messages that are wrong or that the template refuses, and for `thinking` where the
        template knows nothing of it; ModelFileError for a template that is broken, or needs more than it may have.
        """
        variables: dict[str, Any] = {**self._tokens, "messages": _checked(messages), "add_generation_prompt": True}
        if thinking is not None:
            if "enable_thinking" not in self.source:
                raise UsageError(
                    f"--thinking {'on' if thinking else 'off'}: the model's chat template cannot switch thinking; "
                    "leave the option out"
                )
            variables["enable_thinking"] = thinking
        answer = _ask(
            {
                "source": self.source,
                "variables": variables,
                "cpu_seconds": CPU_SECONDS,
                "memory_bytes": MEMORY_BYTES,
                "output_characters": OUTPUT_CHARACTERS,
            }
        )
        text = answer.get("text")
        if isinstance(text, str):
            if not _is_unicode(text):
                raise ModelFileError("it writes text that is not valid Unicode", KEY)
            return text
        error = " ".join(str(answer.get("error", "")).split())[:200].rstrip(".")
        if answer.get("kind") == "refused":
            raise UsageError(f"the model's chat template refuses this conversation: {error}")
        if answer.get("kind") == "limit":
            raise _over_memory()
        raise ModelFileError(f"it cannot be rendered: {error}", KEY)


def check_messages(messages: Sequence[Message]) -> None:
    """UsageError for messages that are no conversation, naming the first that is wrong."""
    _checked(messages)


def _checked(messages: Sequence[Message]) -> list[dict[str, str]]:
    if not messages:
        raise UsageError("the conversation is empty: give at least one message")
    found = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UsageError(f"message {index}: give a role and a content")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise UsageError(f"message {index}: role {str(role)[:40]!r}; the roles are {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise UsageError(f"message {index}: its content must be text")
        if not _is_unicode(content):
            raise UsageError(f"message {index}: its content is not valid Unicode; give UTF-8 text")
        found.append({"role": role, "content": content})
    return found


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _over_memory() -> ModelFileError:
    return ModelFileError(f"rendering needs more than {MEMORY_BYTES >> 20} MiB, so it was stopped", KEY)


def _over_time() -> ModelFileError:
    return ModelFileError(f"rendering takes more than {CPU_SECONDS} s, so it was stopped", KEY)


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """The child's answer to a request."""
    deadline = time.monotonic() + WALL_SECONDS
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("template_child.py")), *_folders()]
    environment = {"LC_ALL": "C.UTF-8"}
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
            data = _exchange(child, json.dumps(request).encode("ascii"), deadline)
        finally:
            child.kill()
    if data is None:
        raise _over_time()
    try:
        answer = json.loads(data)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        return answer
    code = child.returncode
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        raise _over_time()
    # Out of memory, Python cannot always say so.
    raise _over_memory() if code in (-signal.SIGSEGV, -signal.SIGABRT, 1) else _stopped(code)


def _stopped(code: int) -> ModelFileError:
    return ModelFileError(f"its process ended with code {code} and gave no text", KEY)


def _exchange(child: subprocess.Popen[bytes], request: bytes, deadline: float) -> bytes | None:
    """Everything that the child writes, or None where the deadline passed or it writes without end."""
    assert child.stdin is not None
    assert child.stdout is not None
    most = 8 * OUTPUT_CHARACTERS  # JSON escapes a character in up to 12 bytes, but hardly all of them
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
