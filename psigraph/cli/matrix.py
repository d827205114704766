"""`psigraph matrix`: reports in, comparator matrix out."""

from __future__ import annotations

import platform
from pathlib import Path

import click

from ..ir.errors import UsageError
from ..json_file import read_json, write_json_atomically, write_text_atomically
from ..matrix import build_matrix, problems_of, read_source, validate_matrix
from ..matrix_view import markdown, replace_block, svg
from .options import FILE_PATH

MATRIX = "fixtures/medpsy/benchmarks/medpsy_comparator_matrix_20260511_local.json"
REPORTS = "fixtures/medpsy/benchmarks"


@click.command(
    epilog="Example: psigraph matrix --into docs/MEDPSY_BENCHMARK.md --svg docs/images/medpsy_matrix.svg",
)
@click.argument("reports", nargs=-1, type=FILE_PATH)
@click.option("--out", default=MATRIX, show_default=True, type=FILE_PATH, help="Matrix to write, JSON.")
@click.option("--svg", "chart", type=FILE_PATH, help="Chart to write.")
@click.option("--into", multiple=True, type=FILE_PATH, help="Document whose marked block gets the tables.")
@click.option("--root", default=".", type=FILE_PATH, help="Folder that the rows' references start at.")
@click.option("--host", default="", help="Name of this machine in the matrix.  [default: its own]")
@click.option("--check", is_flag=True, help="Write nothing: check the matrix at --out against its reports.")
def command(
    reports: tuple[Path, ...],
    out: Path,
    chart: Path | None,
    into: tuple[Path, ...],
    root: Path,
    host: str,
    check: bool,
) -> None:
    """Merge benchmark and comparator REPORTS into one matrix and decide what may be claimed.

    Without REPORTS, every report under fixtures/medpsy/benchmarks is taken.
    """
    if check:
        problems = validate_matrix(read_json(out), root)
        if problems:
            raise UsageError(f"{out}: {problems[0]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else ""))
        click.echo(f"{out}: agrees with its reports")
        return
    paths = reports or tuple(_reports_under(root / REPORTS, out))
    matrix = build_matrix([read_source(path, root) for path in paths], host=host or platform.node())
    tables = markdown(matrix)
    documents = {path: replace_block(_text_of(path), tables, str(path)) for path in into}
    write_json_atomically(out, matrix)
    if chart is not None:
        write_text_atomically(chart, svg(matrix))
    for path, text in documents.items():
        write_text_atomically(path, text)
    click.echo(tables, nl=False)
    click.echo(f"written: {', '.join(str(path) for path in (out, chart, *into) if path is not None)}", err=True)


def _reports_under(folder: Path, matrix: Path) -> list[Path]:
    """Report files under a folder; other JSON (matrices) is passed over, broken reports are not."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        if path.resolve() == matrix.resolve():
            continue
        problems = problems_of(read_json(path))
        if not (problems and problems[0].startswith("schema:")):
            found.append(path)
    return found


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
