"""`psigraph matrix`: reports in, comparator matrix out."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import click

from ..ir.errors import UsageError
from ..json_file import check_writable, read_json, write_json_atomically, write_text_atomically
from ..medpsy.matrix import build_matrix, problems_of, read_source, validate_matrix
from ..medpsy.matrix_view import markdown, plain, replace_block, svg
from .notes import note
from .options import FILE_PATH

MATRIX = "fixtures/medpsy/benchmarks/medpsy_comparator_matrix_20260511_local.json"
REPORTS = "fixtures/medpsy/benchmarks"


EPILOG = """\b
A document takes its tables between the lines <!-- psigraph matrix: begin --> and <!-- psigraph matrix: end -->.
Everything is computed from the reports: nothing that is typed into a matrix survives --check.

\b
Exit code 0 if the matrix was written, or agrees with its reports; 2 if a report, a document or the matrix under
--check does not agree with itself; 10 if something cannot be written.

\b
Examples:
  psigraph matrix --into docs/MEDPSY_BENCHMARK.md --svg docs/images/medpsy_matrix.svg
  psigraph matrix psigraph-compare/psigraph_1a2b3c4d.json --root psigraph-compare --out matrix.json
  psigraph matrix --check"""


@click.command("matrix", epilog=EPILOG)
@click.argument("reports", nargs=-1, type=FILE_PATH, metavar="[REPORTS]...")
@click.option(
    "--out",
    type=FILE_PATH,
    metavar="FILE",
    help="Matrix to write, JSON. With --into, --svg or --check by default this project's own, "
    "fixtures/medpsy/benchmarks/*_local.json under --root; without any of them nothing is written.",
)
@click.option("--svg", "chart", type=FILE_PATH, metavar="FILE", help="Chart to write.")
@click.option(
    "--into", multiple=True, type=FILE_PATH, metavar="FILE", help="Document that gets the tables; repeatable."
)
@click.option(
    "--root",
    default=".",
    show_default=True,
    type=FILE_PATH,
    metavar="DIR",
    help="Folder that the rows' references start at.",
)
@click.option("--host", default="", metavar="NAME", help="Name of this machine in the matrix. Default: its own.")
@click.option("--check", is_flag=True, help="Write nothing: check the matrix at --out against its reports.")
def command(
    reports: tuple[Path, ...],
    out: Path | None,
    chart: Path | None,
    into: tuple[Path, ...],
    root: Path,
    host: str,
    check: bool,
) -> None:
    """Merge benchmark and comparator REPORTS into one matrix and decide what may be claimed.

    Without REPORTS, every report under fixtures/medpsy/benchmarks is taken.
    """
    shown_only = out is None and chart is None and not into and not check
    if out is None:
        out = root / MATRIX
        if not out.parent.is_dir() and not (shown_only and reports):
            raise UsageError(
                f"--out: there is no folder {out.parent}; give --out, or --root with a checkout of psigraph"
            )
    if check:
        problems = validate_matrix(read_json(out), root)
        if problems:
            raise UsageError(f"{out}: {problems[0]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else ""))
        click.echo(f"{out}: agrees with its reports")
        return
    paths = reports or tuple(_reports_under(root / REPORTS, out))
    matrix = build_matrix([read_source(path, root) for path in paths], host=host or platform.node())
    tables = markdown(matrix)
    if shown_only:
        click.echo(plain(tables), nl=False)
        note("nothing is written without --out, --into or --svg")
        return
    _check_targets([out, *([chart] if chart is not None else []), *into], paths)
    documents = {path: replace_block(_text_of(path), tables, str(path)) for path in into}
    write_json_atomically(out, matrix)
    if chart is not None:
        write_text_atomically(chart, svg(matrix))
    for path, text in documents.items():
        write_text_atomically(path, text)
    click.echo(plain(tables), nl=False)
    note(f"written: {', '.join(str(path) for path in (out, chart, *into) if path is not None)}")


def _check_targets(targets: Sequence[Path], reports: Sequence[Path]) -> None:
    """All of them can be written, no two are one file and none is a report: before the first is touched."""
    seen: dict[Path, str] = {path.resolve(): "is one of the REPORTS" for path in reports}
    for target in targets:
        found = seen.setdefault(target.resolve(), "")
        if found:
            raise UsageError(f"{target}: {found}; write somewhere else")
        seen[target.resolve()] = "is given twice"
        check_writable(target)


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
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"--into {path}: cannot be read: {reason}") from None
