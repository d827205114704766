"""What pyproject.toml declares is what runs: `make lowest` runs all tests with it, here is what needs no download."""

from __future__ import annotations

import importlib.util
import runpy
import sys
import tomllib
from pathlib import Path

import click
import pytest

from psigraph.diagnosis import satisfies

ROOT = Path(__file__).parents[1]
LOWEST = runpy.run_path(str(ROOT / "scripts" / "lowest_versions.py"))["lowest"]


def test_every_dependency_declares_its_lowest_version() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = [LOWEST(requirement) for requirement in declared]
    assert None not in lowest
    for requirement, line in zip(declared, lowest, strict=True):
        name, _, version = line.partition("==")
        assert requirement.startswith(name)
        assert satisfies(version, requirement.removeprefix(name))
    assert LOWEST("a[b]>=1.2,<2") == "a==1.2"
    assert LOWEST("a<2") is None


@pytest.mark.parametrize("path", sorted((ROOT / "psigraph" / "cli").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_commands_need_no_generic_types_of_click(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """click.ParamType[...] is an error before 8.4."""

    def refuse(*_: object) -> None:
        raise TypeError("type 'ParamType' is not subscriptable")

    monkeypatch.setattr(click.ParamType, "__class_getitem__", refuse, raising=False)
    spec = importlib.util.spec_from_file_location(f"psigraph.cli._lowest_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
