"""A YAML document as nodes that know their file and line. Used by `loader` alone."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import SpecError
from ..graph import Origin

MOST_BYTES = 1 << 20
MOST_DEPTH = 16


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
    """The document of a YAML file; SpecError if it cannot be read, is not YAML, or is larger or deeper than a spec."""
    text = read_spec_text(path)
    try:
        _check_depth(text, path.name)
        node = _compose(text)
    except RecursionError:  # libyaml gave up before an event told the depth
        raise _too_deep(path.name, 1) from None
    except yaml.MarkedYAMLError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        raise SpecError(f"{path.name}:{line}: {problem.problem}") from None
    except yaml.YAMLError as problem:  # a character that YAML does not allow
        raise SpecError(f"{path.name}: {' '.join(str(problem).split())[:120]}") from None
    if node is None:
        raise SpecError(f"{path.name}: the file is empty")
    return Item(node, path.name, "the document")


def read_spec_text(path: Path) -> str:
    """The text of a YAML file; SpecError for what is no regular file, too large, or not UTF-8."""
    try:
        if not path.is_file():  # a FIFO would be waited for
            raise SpecError(f"{path}: cannot be read: no such file, or not a regular one")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise SpecError(f"{path}: more than {MOST_BYTES >> 10} KiB; no spec is that long")
        return data.decode("utf-8").replace("\r\n", "\n")
    except (OSError, ValueError) as problem:
        raise SpecError(f"{path}: cannot be read: {problem}") from None


def _check_depth(text: str, name: str) -> None:
    """Nodes are composed by recursion, which deep nesting would not survive; events are not. What is no YAML is left to
    who composes it."""
    with suppress(yaml.YAMLError):
        _count_depth(text, name)


def _too_deep(name: str, line: int) -> SpecError:
    return SpecError(f"{name}:{line}: more than {MOST_DEPTH} nodes in each other")


def _count_depth(text: str, name: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if event.start_mark else 1
        if depth > MOST_DEPTH:
            raise _too_deep(name, line)
        if isinstance(event, yaml.AliasEvent):
            raise SpecError(f"{name}:{line}: *{event.anchor!s:.40}: write it out; a spec has no aliases")


def _compose(text: str) -> yaml.Node | None:
    """The text's nodes. libyaml is twenty times as fast; where it fails or is missing PyYAML itself has the word,
    so that errors read the same everywhere."""
    if yaml.__with_libyaml__:
        with suppress(yaml.YAMLError):
            return yaml.compose(text, Loader=yaml.CSafeLoader)
    return yaml.compose(text, Loader=yaml.SafeLoader)
