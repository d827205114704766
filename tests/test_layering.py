"""Holds the arrows between the rooms and modules: who may import whom, no circles, and which library lives where."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

from psigraph.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]

# Room -> what it may import of psigraph (prefixes) and which packages beside the standard library.
# psigraph/ itself, the face, may import everything.
ROOMS = {
    "ir": ({"psigraph.ir"}, {"numpy"}),
    "passes": ({"psigraph.passes", "psigraph.ir"}, {"numpy"}),
    "codegen": ({"psigraph.codegen", "psigraph.ir"}, {"numpy"}),
    "runtime": (
        {"psigraph.runtime", "psigraph.ir.program", "psigraph.ir.errors"},
        {"numpy", "cuda", "gguf", "tokenizers"},
    ),
    "models": (set(), set()),
}
# A package that only one place of a room knows.
SINGLE_PLACES = {"yaml": {"ir/spec/loader.py", "ir/spec/yaml_nodes.py"}, "networkx": {"psigraph/inspect/picture.py"}}

# What nothing but tests imports and yet is for users: a tool for who writes kernels (docs/debugging.md).
FOR_USERS = {"psigraph.runtime.host.check"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    """`ir/graph.py` -> `psigraph.ir.graph`; a package's `__init__.py` gives the package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "psigraph":
        parts.insert(0, "psigraph")
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that a file imports, wherever in the file, in absolute names.

    `from ..ir.graph import Node` gives `psigraph.ir.graph.Node`: what is no module has one as its prefix.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def within(module: str, prefixes: set[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def offences(path: Path, ours: set[str], packages: set[str]) -> Iterator[str]:
    """What a file of a room imports although the room may not."""
    place = path.relative_to(ROOT).as_posix()
    for line, module in imports(path):
        top = module.partition(".")[0]
        if top == "psigraph":
            allowed = within(module, ours)
        elif top in SINGLE_PLACES:
            allowed = place in SINGLE_PLACES[top]
        else:
            allowed = top in packages or top in sys.stdlib_module_names
        if not allowed:
            yield f"{place}:{line} imports {module}"


def product_modules() -> dict[str, Path]:
    return {module_name(path): path for room in (*ROOMS, "psigraph") for path in sources(room)}


def import_graph(modules: dict[str, Path]) -> networkx.DiGraph:
    """Who imports whom of these, inside functions and for types alone too."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(modules)
    for module, path in modules.items():
        for _, name in imports(path):
            found = name if name in modules else name.rpartition(".")[0]
            if found in modules:
                graph.add_edge(module, found)
    return graph


def unused() -> list[str]:
    """Modules that no other imports, and that nobody starts: what only tests import stands in tests/support."""
    modules = product_modules()
    graph = import_graph(modules)
    commands = {f"psigraph.cli.{name}" for name in COMMANDS}
    return [
        module
        for module, path in modules.items()
        if not graph.in_degree(module)
        and path.name != "__init__.py"
        and module not in commands | FOR_USERS
        and '__name__ == "__main__"' not in path.read_text()
    ]


def circles() -> set[frozenset[str]]:
    """Modules that reach each other by imports."""
    graph = import_graph(product_modules())
    return {frozenset(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    found = [offence for path in sources(room) for offence in offences(path, *ROOMS[room])]
    assert not found, "\n".join(found)


def test_no_modules_import_each_other() -> None:
    """What cannot be read, tested or moved without the other is one module in two files."""
    assert not circles()


def test_every_module_is_of_use_to_the_product() -> None:
    assert not unused(), (
        "only tests import these, or nobody: a pass wants a line in PIPELINE; "
        "move others to tests/support, or delete them"
    )


def test_imports_within_the_package_are_relative() -> None:
    """An absolute import would work here and break wherever the package is vendored or renamed."""
    found = []
    for room in (*ROOMS, "psigraph"):
        for path in sources(room):
            for node in ast.walk(ast.parse(path.read_text())):
                named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    named = [node.module or ""]
                if any(within(name, {"psigraph"}) for name in named) and path.name != "__main__.py":
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, found


def test_the_test_sees_a_forbidden_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "codegen").mkdir()
    wrong = tmp_path / "codegen" / "wrong.py"
    wrong.write_text(
        "from ..runtime import driver\n"
        "from ..passes.pipeline import PIPELINE\n"
        "def late():\n    import cuda.core\n"
        "import yaml, os, numpy\n"
        "from .. import runtime\n"
        "from ..ir.graph import Node\n"
        "from . import writer\n"
    )
    lines = [text.split()[0] for text in offences(wrong, *ROOMS["codegen"])]
    assert sorted(lines) == [f"codegen/wrong.py:{line}" for line in (1, 2, 4, 5, 6)]


def test_the_test_sees_a_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "psigraph" / "text").mkdir(parents=True)
    (tmp_path / "psigraph" / "__init__.py").write_text("def load():\n    from .api import Model\n")
    (tmp_path / "psigraph" / "api.py").write_text("from .text import chat\n")
    (tmp_path / "psigraph" / "text" / "chat.py").write_text("if TYPE_CHECKING:\n    from .. import load, version\n")
    (tmp_path / "psigraph" / "version.py").write_text("from .text.chat.deeper import nothing\n")
    assert circles() == {frozenset({"psigraph", "psigraph.api", "psigraph.text.chat"})}


def test_the_test_sees_a_module_that_only_tests_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "ir").mkdir()
    (tmp_path / "ir" / "__init__.py").write_text("")
    (tmp_path / "ir" / "used.py").write_text("")
    (tmp_path / "ir" / "helper.py").write_text("def late():\n    from .used import it\n")
    (tmp_path / "ir" / "document.py").write_text('if __name__ == "__main__":\n    print()\n')
    assert unused() == ["psigraph.ir.helper"]
