"""`psigraph synth`: writes a model file with a real model's shapes and random weights."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..ir.errors import OutputError
from ..runtime.synth.model import QUANTS, SIZES, write_synth
from .options import FILE_PATH
from .stages import stages

EPILOG = """\b
Example:
  psigraph synth qwen3-1.7b.gguf --size 1.7b --quant q4_k_m --seed 1"""


@click.command("synth", epilog=EPILOG)
@click.argument("out", type=FILE_PATH)
@click.option("--size", required=True, type=click.Choice(list(SIZES), case_sensitive=False), help="Qwen3 model size.")
@click.option(
    "--quant",
    required=True,
    type=click.Choice(list(QUANTS), case_sensitive=False),
    help="Block types of the weights; iq3_m has no kernels and is there to be refused.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**64 - 1),
    help="The same seed gives the same bytes.",
)
@click.option("--untied", is_flag=True, help="Give the output head a matrix of its own (8b always has one).")
@click.option("--layers", type=click.IntRange(1, 1024), metavar="N", help="This many layers, not the size's own.")
@click.option("--force", is_flag=True, help="Write over a file that is there already.")
def command(out: Path, size: str, quant: str, seed: int, untied: bool, layers: int | None, force: bool) -> None:
    """Write OUT, a GGUF file with the exact shapes and block types of a Qwen3 model and random weights.

    It costs what the real model costs, so benchmarks need no download. What it says is noise.
    """
    if not force and os.path.lexists(out):
        raise OutputError(f"{out}: is there already; name another file, or give --force to write over it")
    with stages() as bars:
        progress = bars.bar(f"writing {out.name}", in_bytes=True)
        write_synth(out, size, quant, seed, untied=untied, layers=layers, progress=progress)
    click.echo(f"{out}: {out.stat().st_size:,} bytes, {size} {quant}, seed {seed}")
