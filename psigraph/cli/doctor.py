"""`psigraph doctor`: shows the diagnosis of this machine."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from ..diagnosis import Diagnosis, diagnose
from ..version import package_version

MARKS = {"ok": ("ok", "green"), "warning": ("warn", "yellow"), "missing": ("no", "red")}

EPILOG = """\b
Exit code 0 if a model can be run here in some way, else 1.

\b
Examples:
  psigraph doctor
  psigraph doctor --json"""


@click.command("doctor", epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def command(as_json: bool) -> int:
    """Say what is installed, what will work here, and what to do about the rest."""
    diagnosis = diagnose()
    click.echo(_json(diagnosis) if as_json else _table(diagnosis))
    return 0 if diagnosis.useful else 1


def _json(diagnosis: Diagnosis) -> str:
    record = {"psigraph": package_version(), "useful": diagnosis.useful, **asdict(diagnosis)}
    return json.dumps(record, indent=2)


def _table(diagnosis: Diagnosis) -> str:
    width = max(len(check.name) for check in diagnosis.checks)
    lines = [f"psigraph {package_version()}", ""]
    lines += [f"  {_mark(check.status)}  {check.name:<{width}}  {check.found}" for check in diagnosis.checks]

    width = max(len(capability.name) for capability in diagnosis.capabilities)
    lines += ["", "What works here"]
    lines += [
        f"  {_mark('ok' if capability.works else 'missing')}  {capability.name:<{width}}  {capability.reason}"
        for capability in diagnosis.capabilities
    ]

    advice = [f"  {check.name}: {check.advice}" for check in diagnosis.checks if check.advice]
    if advice:
        lines += ["", "What to do", *advice]
    return "\n".join(lines)


def _mark(status: str) -> str:
    word, colour = MARKS[status]
    return click.style(f"{word:<4}", fg=colour)
