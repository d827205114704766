"""`psigraph compile`: writes what every stage makes of a model, machine code included. Needs no GPU."""

from __future__ import annotations

from pathlib import Path

import click

from ..ir.errors import UsageError
from ..ir.program import DECODE, PREFILL
from .model_argument import model_argument
from .options import FILE_PATH, disable_option, kv_type_option
from .stages import stages
from .tables import kernel_table, pass_table, step_line

QUANTS = "q4_k_m, q5_k_m, q8_0, f16; iq3_m has no kernels and is there to be refused"

EPILOG = """\b
DIR holds ir/NN-<pass>.txt, fused.txt, fused.dot and fused.json of a token's step and, in prefill/, of the one that
takes a prompt in; kernels/*.cu, cubins/<arch>/*.cubin and program.json, whose `steps` have their `launches` in order.
Kernels and program of a second --arch lie in kernels/<arch>/ and program.<arch>.json. SHA256SUMS lists them all: a DIR
that holds anything else is left alone. No weights are read and no GPU is used.

\b
Examples:
  psigraph compile model.gguf --out compiled
  psigraph compile --size 1.7b --quant q4_k_m --arch sm_89 --arch sm_90a --out compiled"""


@click.command("compile", epilog=EPILOG)
@model_argument(metavar="[MODEL.gguf]", required=False)
@click.option("--size", metavar="SIZE", help="Compile for a published size instead of a file: 0.6b, 1.7b, 4b, 8b.")
@click.option("--quant", metavar="MIX", help=f"Block types with --size: {QUANTS}.")
@click.option(
    "--arch",
    "arches",
    multiple=True,
    metavar="ARCH",
    help="GPU architecture, such as sm_89; repeatable. Default: this machine's GPU, sm_90a without one.",
)
@click.option("--out", type=FILE_PATH, metavar="DIR", help="Write everything to this folder.")
@click.option(
    "-c", "--ctx", type=click.IntRange(1), metavar="N", help="Positions that the KV cache holds. Default: 4096."
)
@kv_type_option
@disable_option
def command(
    model: Path | None,
    size: str | None,
    quant: str | None,
    arches: tuple[str, ...],
    out: Path | None,
    ctx: int | None,
    kv_type: str,
    disable: tuple[str, ...],
) -> None:
    """Compile MODEL.gguf, or the shapes of a published size, and show its kernels.

    DIR appears whole or not at all; a DIR that an earlier compile wrote is replaced.
    """
    if (model is None) == (size is None):
        raise UsageError("give either MODEL.gguf or --size with --quant")
    if (size is None) != (quant is None):
        raise UsageError("--size and --quant go together: --size 1.7b --quant q4_k_m")
    from ..inspect.compilation import (
        check_folder,
        compile_stages,
        default_target,
        gpu_target,
        program_record,
        source_of_file,
        source_of_size,
        staged,
        write_compilation,
    )

    targets = [gpu_target(arch) for arch in dict.fromkeys(arches)]
    if out is not None:
        check_folder(out)
    if model is not None:
        source = source_of_file(model, ctx, kv_type)
    else:
        assert size is not None
        assert quant is not None
        source = source_of_size(size, quant, ctx, kv_type=kv_type)
    targets = targets or [default_target()]
    with stages() as bars:
        compilation = compile_stages(staged(source, disable), targets, bars.bar("compiling kernels"))
    if out is not None:
        write_compilation(compilation, out)
    for built in compilation.built:
        record = program_record(compilation.stages, built)
        if built is compilation.built[0]:
            click.echo(f"{source.name}\n\na token's step\n{pass_table(record['passes'])}")
            click.echo(f"\na prompt's chunk\n{pass_table(record['prefill_passes'])}")
        head = f"{built.arch}, {built.program.sm_count} multiprocessors"
        for what, step in (("a token's step", DECODE), ("a prompt's chunk", PREFILL)):
            if step == DECODE or any(found["name"] == step for found in record["steps"]):
                click.echo(f"\n{head}, {what}\n{kernel_table(record, step)}\n{step_line(record, step)}")
            else:
                click.echo(f"\n{head}, {what}: none, prompts go in {record['notes'].get(step, 'another way')}")
    if out is not None:
        click.echo(f"\nwritten: {out}")
