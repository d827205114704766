"""A YAML document as nodes that know their file and line. Used by `loader` alone."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import SpecError
from ..graph import Origin


@dataclass(frozen=True)
class Item:
    """One node of a YAML document, read strictly: what is asked for must be there."""

    node: yaml.Node
    file: str
    what: str

    @property
    def origin(self) -> Origin:
        return Origin(self.file, self.node.start_mark.line + 1)

    def error(self, message: str) -> SpecError:
        return SpecError(f"{self.origin}: {self.what}: {message}")

    def text(self) -> str:
        """A scalar as it is written."""
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.error("wanted a single value")
        return str(self.node.value)

    def scalar(self) -> int | float | str:
        """A scalar as a number if it looks like one."""
        text = self.text()
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    def block(self) -> tuple[str, int]:
        """A literal block (`|`) and the line of the file that it begins on."""
        if not isinstance(self.node, yaml.ScalarNode) or self.node.style != "|":
            raise self.error("wanted op lines in a literal block, begun with |")
        return self.node.value, self.node.start_mark.line + 2

    def items(self) -> list[Item]:
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.error("wanted a list in [ ]")
        return [Item(node, self.file, self.what) for node in self.node.value]

    def mapping(self) -> dict[str, Item]:
        """Keys to items, in order; a key that stands twice is an error."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error("wanted `key: value` lines")
        found: dict[str, Item] = {}
        for key, value in self.node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.error("wanted plain keys")
            item = Item(value, self.file, str(key.value))
            if item.what in found:
                raise item.error("stands twice")
            found[item.what] = item
        return found


def read_document(path: Path) -> Item:
    """The document of a YAML file; SpecError if it cannot be read or is not YAML."""
    try:
        node = _compose(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as problem:
        raise SpecError(f"{path}: cannot be read: {problem}") from None
    except yaml.MarkedYAMLError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        raise SpecError(f"{path.name}:{line}: {problem.problem}") from None
    if node is None:
        raise SpecError(f"{path.name}: the file is empty")
    return Item(node, path.name, "the document")


def _compose(text: str) -> yaml.Node | None:
    """The text's nodes. libyaml is twenty times as fast; where it fails or is missing PyYAML itself has the word,
    so that errors read the same everywhere."""
    if yaml.__with_libyaml__:
        with suppress(yaml.YAMLError):
            return yaml.compose(text, Loader=yaml.CSafeLoader)
    return yaml.compose(text, Loader=yaml.SafeLoader)
