"""`psigraph ablate`: times a step, and a prompt's chunk, with each pass or feature off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..json_file import check_writable, write_json_atomically
from ..medpsy.policy import Admission
from ..options import SessionOptions
from .kernels_only import kernels_only
from .model_argument import model_argument
from .notes import warn_of_file
from .options import FILE_PATH, admission_options, backend_option, kv_type_option

if TYPE_CHECKING:
    from ..bench.ablation import Row
    from ..session import Session

EPILOG = """\b
Rows are medians over whole dependent steps; the row with everything on is measured twice, and what the two
differ by is the noise of all others. The second time, told last, is right behind the features, in the same memory.
With --prompt-tokens the rows whose pass works on prompts have the time of one chunk of a prompt too.

\b
Examples:
  psigraph ablate qwen3-1.7b.gguf --json-out ablation.json
  psigraph ablate qwen3-1.7b.gguf --prompt-tokens 512
  psigraph ablate qwen3-1.7b.gguf --depth 4096 --ctx 8192"""


@click.command("ablate", epilog=EPILOG)
@model_argument()
@backend_option("cuda")
@click.option("--device", type=click.IntRange(0), default=0, show_default=True, help="Which GPU.")
@click.option(
    "-c",
    "--ctx",
    type=click.IntRange(1),
    metavar="N",
    help="Positions that the KV cache holds. Default: 4096, more where --depth and --steps need more.",
)
@kv_type_option
@click.option(
    "--depth", type=click.IntRange(1), default=256, show_default=True, metavar="N", help="Fill N positions first."
)
@click.option("--steps", type=click.IntRange(4), default=100, show_default=True, metavar="N", help="Timed steps a row.")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Measure too how long a prompt of N tokens takes to go in, at most one chunk (512); 0: not.",
)
@admission_options
@click.option("--json-out", type=FILE_PATH, metavar="R", help="Write the rows here.")
def command(
    model: Path,
    backend: str,
    device: int,
    ctx: int | None,
    kv_type: str,
    depth: int,
    steps: int,
    prompt_tokens: int,
    allow_blocked: bool,
    expect_sha256: str | None,
    json_out: Path | None,
) -> None:
    """Measure what each pass and feature is worth: MODEL's step with one of them off at a time."""
    if json_out is not None:
        check_writable(json_out)
    from ..bench.ablation import ablate

    first: list[Row] = []

    def show(row: Row) -> None:
        first.append(row)
        line = (
            f"  {row.off:32} {row.kernels:5} kernels {row.step_us:10.1f} us  {row.step_us - first[0].step_us:+9.1f}"
            f"   middle half {row.spread_us:.1f} us wide"
        )
        if row.prompt_us is not None and first[0].prompt_us is not None:
            line += f"   prompt {row.prompt_us:10.1f} us  {row.prompt_us - first[0].prompt_us:+9.1f}"
        click.echo(line)

    def warn(admission: Admission) -> None:
        warn_of_file(model, admission.said)

    def begin(session: Session) -> None:
        # Only now: a refusal leaves stdout empty.
        prompt = f"; prompts of {prompt_tokens} tokens, {session.prefill}" if prompt_tokens else ""
        click.echo(f"{model.name} on {session.backend}, at depth {depth}{prompt}")
        click.echo(f"  {'off':32} {'':13} {'step':>10}     {'more than everything on'}")

    with kernels_only():
        record = ablate(
            model,
            SessionOptions("cuda" if backend == "auto" else backend, device, ctx, kv_type),
            depth=depth,
            steps=steps,
            prompt_tokens=prompt_tokens,
            report=show,
            on_start=begin,
            allow_blocked=allow_blocked,
            expect_sha256=expect_sha256,
            on_admission=warn,
        )
    if json_out is not None:
        write_json_atomically(json_out, record)
        click.echo(f"report: {json_out}")
