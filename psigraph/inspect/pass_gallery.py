"""The passes as Markdown, from their own docstrings: `python -m psigraph.inspect.pass_gallery` prints it."""

from __future__ import annotations

import inspect
import sys

from ..ir.regime import ALL, Regime
from ..passes.pipeline import PIPELINE


def gallery() -> str:
    """One section a pass, in the order of the pipeline: its reason, before and after."""
    sections = []
    for number, step in enumerate(PIPELINE, 1):
        text = inspect.getdoc(sys.modules[step.function.__module__]) or ""
        summary, *rest = text.split("\n\n")
        body = "\n\n".join(_fenced(part) for part in rest)
        note = "Cannot be disabled. " if step.lowering else ""
        note += "" if step.regimes == ALL else f"For {' and '.join(str(r) for r in Regime if r in step.regimes)}. "
        sections.append(f"## {number}. `{step.name}`\n\n{summary}\n\n{body}\n\n{note}Stands here: {step.reason}.")
    return "\n\n".join(sections) + "\n"


def _fenced(part: str) -> str:
    """Op lines as a code block, prose as it is."""
    return f"```\n{part}\n```" if part.split("\n")[0].rstrip().endswith(("before:", "after:")) else part


if __name__ == "__main__":
    print(gallery(), end="")
