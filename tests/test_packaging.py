"""The package as it installs: every folder named, every command registered, one version."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import psigraph
from psigraph.diagnosis import PACKAGES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("psigraph", "ir", "passes", "codegen", "runtime", "models")


def package_of(folder: Path) -> str:
    name = ".".join(folder.relative_to(ROOT).parts)
    return name if name.split(".")[0] == "psigraph" else f"psigraph.{name}"


def test_every_folder_with_source_is_installed() -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)
    assert {package_of(folder) for folder in folders} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_data_file_is_installed() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    data = [
        path
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    left_out = [path for path in data if not any(path.match(pattern) for pattern in patterns)]
    assert not left_out, left_out


def test_doctor_knows_the_dependencies() -> None:
    assert sorted(PROJECT["project"]["dependencies"]) == sorted(PACKAGES)


def test_one_version() -> None:
    assert psigraph.__version__ == metadata.version("psigraph") == PROJECT["project"]["version"]
