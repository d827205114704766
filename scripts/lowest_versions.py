"""Prints the lowest version of every package that pyproject.toml declares, as pip's constraints: `make lowest`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest(requirement: str) -> str | None:
    """`name>=1.2,<2` -> `name==1.2`; None without a lower bound."""
    found = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", requirement)
    return f"{found[1]}=={found[2]}" if found else None


def main() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    for requirement in project["dependencies"]:
        line = lowest(requirement)
        if line is None:
            raise SystemExit(f"{requirement}: declares no lowest version")
        print(line)


if __name__ == "__main__":
    main()
