"""Where an answer ends and what in it is thinking: as the file and its chat template mark it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from ..ir.errors import PsigraphError
from ..runtime.gguf.file import GgufFile
from ..runtime.tokenizer.bpe import Tokenizer
from ..runtime.tokenizer.end_tokens import EndToken, named_end_tokens
from .template import ChatTemplate

# Where thinking begins and ends, as families write it: Qwen and DeepSeek, Mistral, Seed, Command.
PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
_CLOSING = re.compile(r"</[\w:.-]+>|\[/\w+\]|<\|END_\w+\|>")


@dataclass(frozen=True)
class Thinking:
    """How a template marks thinking. begun: its prompt opens it already, so that the answer begins inside."""

    opening: str
    closing: str
    begun: bool = False

    def split(self, text: str) -> tuple[str, str]:
        """(what was thought, the answer) of a model's text; thinking without an end is all of it.

        As Qwen's template splits it: without the line breaks around either. A marker further on, where an answer only
        speaks of it, splits nothing.
        """
        inside = text.lstrip()
        opened = inside.startswith(self.opening)
        if not opened and not self.begun:
            return "", text
        thought, _, answer = (inside.removeprefix(self.opening) if opened else text).partition(self.closing)
        return thought.strip("\n"), answer.lstrip("\n")


def thinking_of(source: str, prompt: str = "") -> Thinking | None:
    """How a template (its text) marks thinking; prompt: what it wrote. None for one that knows none."""
    for opening, closing in PAIRS:
        if closing in source:
            return Thinking(opening, closing, prompt.rstrip().endswith(opening))
    return None


def markers_of(source: str) -> frozenset[str]:
    """A template's own markers: what it writes as an opening and a closing, such as <think> and </tool_call>.

    A vocabulary may hold them as control tokens, and an answer without them could not be taken apart.
    """
    closings = set(_CLOSING.findall(source)) - {"</s>"}  # an end of text, whose pair is its beginning
    return frozenset(closings | {closing.replace("/", "", 1).replace("|END_", "|START_") for closing in closings})


@dataclass(frozen=True)
class Marks:
    """What in a model's tokens is not simply text.

    ends      the tokens after which it is over, and why.
    shown     control tokens that are shown all the same: the template's own markers.
    thinking  how thinking is marked; None: nothing is.
    """

    ends: tuple[EndToken, ...] = ()
    shown: frozenset[int] = frozenset()
    thinking: Thinking | None = None

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids of `ends`."""
        return frozenset(end.id for end in self.ends)


NO_MARKS = Marks()


def marks_of_text(file: GgufFile, tokenizer: Tokenizer) -> Marks:
    """Those of a plain text."""
    try:
        source = ChatTemplate.of_file(file).sources
    except PsigraphError:
        source = ""
    return Marks(named_end_tokens(file), tokenizer.control_ids(markers_of(source)))


def marks_of_chat(file: GgufFile, tokenizer: Tokenizer, template: ChatTemplate, prompt: str) -> Marks:
    """Those of the answer to a prompt that the template wrote."""
    return Marks(
        named_end_tokens(file, template.turn_end()),
        tokenizer.control_ids(markers_of(template.sources)),
        thinking_of(template.sources, prompt),
    )


def ends_of_file(file: GgufFile) -> tuple[EndToken, ...]:
    """All end tokens of a file, those of its chat template too. ModelFileError for an id that there is not."""
    try:
        template = ChatTemplate.of_file(file)
    except PsigraphError:
        return named_end_tokens(file)
    return named_end_tokens(file, _turn_end(template.source, tuple(template.tokens.items())))


@lru_cache(maxsize=8)
def _turn_end(source: str, tokens: tuple[tuple[str, str], ...]) -> str:
    try:
        return ChatTemplate(source, dict(tokens)).turn_end()
    except PsigraphError:
        return ""
