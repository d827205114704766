"""`psigraph perplexity`: judges a quantization, or a kernel, by a text."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import UsageError
from ..json_file import check_writable, write_json_atomically
from ..options import SessionOptions
from .model_argument import model_argument
from .notes import warn, warn_of_file
from .options import FILE_PATH, admission_options, backend_option, run_options
from .stages import stages
from .texts import read_text

if TYPE_CHECKING:
    import numpy as np

    from ..build import Model
    from ..medpsy.policy import Admission
    from ..runtime.gguf.file import GgufFile
    from ..session import Session
    from ..text.perplexity import Result
    from ..text.saved_logits import Reference

EPILOG = """\b
The text is read in windows (--window); every token but a window's first is scored. KL divergence is that of this
model from the reference, in nats, at every position. Without --text the reference's own ids are taken.

\b
Examples:
  psigraph perplexity model-q8_0.gguf --text book.txt --save-logits q8.npz --json-out q8.json
  psigraph perplexity model-q4_k_m.gguf --text book.txt --against q8.json
  psigraph perplexity tiny-qwen3-q4_k_m.gguf --against reference_logits.npz"""

FILE = FILE_PATH


@click.command("perplexity", epilog=EPILOG)
@model_argument()
@click.option("-f", "--text", type=FILE, metavar="FILE", help="The text, in UTF-8; - reads stdin.")
@click.option("--against", type=FILE, metavar="R", help="Saved logits: an .npz file, or a report that names one.")
@click.option("--key", metavar="NAME", help="Which array of the file. Default: logits, or that of the model's tier.")
@click.option(
    "--window",
    type=click.IntRange(2),
    metavar="N",
    help="Tokens that are read before the context is emptied. Default: 512, or the reference's.",
)
@click.option("--max-tokens", type=click.IntRange(2), metavar="N", help="Read no more of the text than this.")
@click.option("--save-logits", type=FILE, metavar="FILE", help="Write ids and logits here (.npz), for --against.")
@click.option("--json-out", type=FILE, metavar="R", help="Write the report here.")
@backend_option()
@run_options
@admission_options
def command(
    model: Path,
    text: Path | None,
    against: Path | None,
    key: str | None,
    window: int | None,
    max_tokens: int | None,
    save_logits: Path | None,
    json_out: Path | None,
    options: SessionOptions,
    allow_blocked: bool,
    expect_sha256: str | None,
) -> None:
    """Measure MODEL's perplexity on a text, and its divergence from saved logits."""
    if text is None and against is None:
        raise UsageError("nothing to read: give --text FILE, or --against with saved logits and their ids")
    if key is not None and against is None:
        raise UsageError("--key names an array of --against; give that too")
    if max_tokens is not None and (text is None or against is not None):
        raise UsageError("--max-tokens shortens a text; it goes with --text alone, since saved logits have their ids")
    ctx = options.ctx
    if window is not None and ctx is not None and window > ctx:
        raise UsageError(f"--window {window} does not fit into --ctx {ctx}")
    if save_logits is not None and json_out is not None and save_logits.resolve() == json_out.resolve():
        raise UsageError(f"--save-logits and --json-out are both {json_out}; name two files")
    for target in (save_logits, json_out):
        if target is not None:
            check_writable(target)
    words = read_text(text) if text is not None else None
    from ..medpsy.artifact import admit_file
    from ..runtime.tokenizer.bpe import Tokenizer
    from ..session import open_session
    from ..text.perplexity import WINDOW, measure
    from ..text.saved_logits import load_reference
    from ..text.saved_logits import save_logits as write_logits

    admitted: list[Admission] = []
    found: list[Reference] = []
    ids: list[int] = []

    def admit(file: GgufFile) -> None:
        """The policy first; then what is to be read, since its length decides how large the context must be."""
        admission = admit_file(file, allow_blocked=allow_blocked, expect_sha256=expect_sha256, on_hash=on_hash)
        admitted.append(admission)
        if against is not None:
            found.append(load_reference(against, admission.tier, key))
        ids.extend(Tokenizer(file).encode(words)[:max_tokens] if words is not None else found[0].ids)
        if not ids:
            raise UsageError(f"{text}: holds no token")
        if found and ids != found[0].ids:
            raise UsageError(
                f"--against {against}: its ids are not those of the text; leave --text out to read what it has"
            )

    def check(_: Model) -> None:
        warn_of_file(model, admitted[0].said)  # only now: the file is one that runs

    def size() -> int:
        return window or (found[0].window if found else min(WINDOW, ctx or WINDOW))

    def positions(opened: Model) -> int:
        most = ctx or opened.binding.context_limit
        if size() > most:
            what = f"--ctx {ctx}" if ctx else f"the model's context of {most}"
            raise UsageError(f"a window of {size()} tokens does not fit into {what}; give --window {most} or less")
        return size()

    with stages() as bars:
        on_hash = bars.bar(f"hashing {model.name}", in_bytes=True)
        options = replace(
            options,
            outputs=("logits",),
            positions=positions,
            admit=admit,
            check=check,
            on_load=bars.bar("loading weights", in_bytes=True),
            on_compile=bars.bar("compiling kernels"),
        )
        session = open_session(model, options)
        with session:
            if found and size() != found[0].window:
                warn(f"the reference was read in windows of {found[0].window}")
            rows: list[np.ndarray] | None = [] if save_logits is not None else None
            result = measure(session, ids, size(), found[0] if found else None, rows, bars.bar("reading"))
            report = _report(result, session, admitted[0], found)
    click.echo(summary(report))
    if save_logits is not None and rows is not None:
        write_logits(save_logits, ids, size(), rows)
        click.echo(f"logits: {save_logits}")
        where = json_out.parent if json_out is not None else Path()
        report["logits_file"] = os.path.relpath(save_logits, where)
    if json_out is not None:
        write_json_atomically(json_out, report)
        click.echo(f"report: {json_out}")


def _report(result: Result, session: Session, admission: Admission, found: list[Reference]) -> dict[str, Any]:
    from ..medpsy.artifact import artifact_record
    from ..text.perplexity import SCHEMA

    report: dict[str, Any] = {
        "schema": SCHEMA,
        "artifact": {**artifact_record(session.model), "sha256": admission.sha256},
        "admission": admission.record(),
        "backend": session.backend,
        "kv_type": session.kv_type,
        "arithmetic": session.facts["arithmetic"],
        **result.record(),
    }
    if found:
        report["against"] = {"file": found[0].name, "key": found[0].key}
    return report


def summary(report: dict[str, Any]) -> str:
    """The report's figures for people."""
    lines = [f"{report['artifact']['file']} on {report['backend']}: {report['arithmetic']}"]
    if report["perplexity"] is not None:
        error = report["perplexity_standard_error"]
        spread = f" +- {error:.4f}" if error is not None else ""
        lines.append(
            f"perplexity {report['perplexity']:.4f}{spread} over {report['scored']:,} of {report['tokens']:,} tokens, "
            f"in windows of {report['window']:,}"
        )
    if "divergence" in report:
        found = report["divergence"]
        lines.append(
            f"KL divergence from {report['against']['file']} ({report['against']['key']}): mean {found['mean']:.3e}, "
            f"p99 {found['p99']:.3e}, largest {found['largest']:.3e} at position {found['largest_at']}"
        )
        lines.append(f"same likeliest token at {100 * found['same_likeliest_token']:.2f} % of the positions")
    return "\n".join(lines)
