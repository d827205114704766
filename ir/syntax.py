"""Reads the IR's expression syntax: whole graphs, the op lines of a model spec, and rules.

All three share one line form, `%y, %z = op(%a, %b) {key=literal}`. Types stand only in
whole graphs. In a spec `$name` is a size; in a rule it captures an attribute's value.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from .errors import SpecError
from .graph import Literal, Origin, TensorType

TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+) | (?P<newline>\n) | (?P<comment>\#[^\n]*)
      | (?P<number>[-+]?(?:inf|nan|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?![A-Za-z0-9_.]))
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<value>%[A-Za-z_][A-Za-z0-9_.]*) | (?P<size>\$[A-Za-z_][A-Za-z0-9_]*)
      | (?P<word>[A-Za-z_][A-Za-z0-9_.]*) | (?P<mark>[()\[\]{},=:])""",
    re.VERBOSE,
)

MOST_DIGITS = 40


@dataclass(frozen=True)
class Name:
    """A `$name` where a literal may stand."""

    name: str


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    line: int
    column: int


@dataclass(frozen=True)
class Statement:
    """One op line. `outs` pairs names with types (None where the text has none)."""

    outs: tuple[tuple[str, TensorType | None], ...]
    op: str
    ins: tuple[str, ...]
    attrs: tuple[tuple[str, Literal | Name], ...]
    origin: tuple[Origin, ...]
    line: int


def underlined(text: str, start: int, length: int) -> str:
    """The line of text with carets below the part at fault."""
    return f"  {text}\n  {' ' * start}{'^' * max(length, 1)}"


class Reader:
    """A token stream with one token of look-ahead. Lines count from `first_line`."""

    def __init__(self, text: str, file: str, first_line: int = 1) -> None:
        self.lines = text.split("\n")
        self.file = file
        self.first_line = first_line
        self.comments: dict[int, str] = {}
        self.tokens = self._scan(text)
        self.index = 0

    def _scan(self, text: str) -> list[Token]:
        tokens, at, line, line_start = [], 0, self.first_line, 0
        while at < len(text):
            found = TOKEN.match(text, at)
            if found is None:
                raise self.error(f"cannot read {text[at]!r}", Token("", text[at], line, at - line_start))
            kind = found.lastgroup or ""
            if kind == "newline":
                line, line_start = line + 1, found.end()
            elif kind == "comment":
                self.comments[line] = found.group()[1:].strip()
            elif kind == "number" and len(found.group()) > MOST_DIGITS:
                raise self.error("a number of too many digits", Token(kind, found.group(), line, at - line_start))
            elif kind != "space":
                tokens.append(Token(kind, found.group(), line, at - line_start))
            at = found.end()
        tokens.append(Token("end", "", line, at - line_start))
        return tokens

    def error(self, message: str, token: Token) -> SpecError:
        text = self.lines[token.line - self.first_line]
        return SpecError(f"{self.file}:{token.line}: {message}\n{underlined(text, token.column, len(token.text))}")

    @property
    def token(self) -> Token:
        return self.tokens[self.index]

    def take(self, *texts_or_kinds: str) -> Token:
        """The next token, which must be one of these texts or kinds."""
        token = self.token
        if token.text not in texts_or_kinds and token.kind not in texts_or_kinds:
            wanted = " or ".join(texts_or_kinds)
            raise self.error(f"expected {wanted}, found {token.text or 'the end of the text'}", token)
        self.index += 1
        return token

    def accept(self, text: str) -> bool:
        if self.token.text != text:
            return False
        self.index += 1
        return True

    def value(self) -> str:
        """`%name` -> name."""
        return self.take("value").text[1:]

    def type(self) -> TensorType:
        dtype = self.take("word").text
        self.take("[")
        shape = [self.integer()]
        while self.accept(","):
            shape.append(self.integer())
        self.take("]")
        return TensorType(dtype, tuple(shape))

    def integer(self) -> int:
        token = self.take("number")
        if not re.fullmatch(r"[-+]?\d+", token.text):
            raise self.error("expected a whole number", token)
        return int(token.text)

    def literal(self) -> Literal | Name:
        token = self.take("number", "string", "size", "true", "false", "(")
        if token.kind == "number":
            whole = re.fullmatch(r"[-+]?\d+", token.text)
            return int(token.text) if whole else float(token.text)
        if token.kind == "string":
            try:
                return str(json.loads(token.text))
            except ValueError:
                raise self.error("cannot read this text", token) from None
        if token.kind == "size":
            return Name(token.text[1:])
        if token.kind == "word":
            return token.text == "true"
        items: list[int] = []
        while not self.accept(")"):
            items.append(self.integer())
            if self.token.text != ")":
                self.take(",")
        return tuple(items)

    def attributes(self) -> tuple[tuple[str, Literal | Name], ...]:
        found: dict[str, Literal | Name] = {}
        if self.accept("{"):
            while True:
                key = self.take("word")
                if key.text in found:
                    raise self.error(f"{key.text} stands twice", key)
                self.take("=")
                found[key.text] = self.literal()
                if not self.accept(","):
                    break
            self.take("}")
        return tuple(found.items())

    def result(self) -> tuple[str, TensorType | None]:
        return self.value(), self.type() if self.accept(":") else None

    def statement(self) -> Statement:
        line = self.token.line
        outs = [self.result()]
        while self.accept(","):
            outs.append(self.result())
        self.take("=")
        op = self.take("word").text
        self.take("(")
        ins = [self.value()]
        while self.accept(","):
            ins.append(self.value())
        self.take(")")
        attrs = self.attributes()
        last = self.tokens[self.index - 1].line
        return Statement(tuple(outs), op, tuple(ins), attrs, parse_origin(self.comments.get(last, "")), line)

    def statements(self) -> tuple[Statement, ...]:
        """Op lines up to the end of the text."""
        found = []
        while self.token.kind != "end":
            found.append(self.statement())
        return tuple(found)


def parse_origin(comment: str) -> tuple[Origin, ...]:
    """`qwen3.yaml:12, qwen3.yaml:15` -> origins; a comment of any other form has none."""
    found = []
    for part in filter(None, (part.strip() for part in comment.split(","))):
        file, colon, line = part.rpartition(":")
        if not colon or not line.isdigit():
            return ()
        found.append(Origin(file, int(line)))
    return tuple(found)
