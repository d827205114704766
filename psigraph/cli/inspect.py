"""`psigraph inspect`: shows a model at any stage on its way to kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..ir.errors import UsageError
from .model_argument import model_argument
from .tables import kernel_table, launch_table, pass_table, step_line

if TYPE_CHECKING:
    from ..inspect.inspection import Inspected
    from ..ir.graph import Graph

EPILOG = """\b
Without options: what the model is, what every pass did, and its kernels. DIR is what `psigraph compile` wrote.
Only headers are read; no GPU is used.

\b
Examples:
  psigraph inspect model.gguf --stage fused --layer 0
  psigraph inspect model.gguf --stage prompt --layer 0
  psigraph inspect model.gguf --diff fuse_attention --layer 0
  psigraph inspect model.gguf --step prefill --diff fuse_swiglu --layer 0
  psigraph inspect compiled --kernel rope_attention
  psigraph inspect model.gguf --stage fused --format dot | dot -Tsvg > fused.svg"""


@click.command("inspect", epilog=EPILOG)
@model_argument(metavar="MODEL|DIR")
@click.option(
    "--stage",
    type=click.Choice(["model", "fused", "program", "prompt"]),
    help="model: the block as its YAML declares it; fused: after all passes; program: the launches in order; prompt: "
    "the same as --step prefill --stage fused.",
)
@click.option(
    "--step",
    type=click.Choice(["decode", "prefill"]),
    help="Whose graphs, passes and launches: the step of one token, or the one that takes a prompt's tokens in. "
    "Default: decode.",
)
@click.option("--after", metavar="PASS", help="The graph after this pass.")
@click.option("--diff", metavar="PASS", help="What this pass changed, as a unified diff.")
@click.option("--kernel", metavar="NAME", help="The CUDA C text of this kernel.")
@click.option("--layer", type=click.IntRange(0), metavar="N", help="Only this layer; of a --kernel, its launches.")
@click.option(
    "--format", "form", type=click.Choice(["text", "dot", "json"]), default="text", show_default=True, help="How."
)
@click.option(
    "--arch",
    metavar="ARCH",
    help="For which GPU kernels are written, or one that DIR has. Default: this machine's or sm_90a, or DIR's first.",
)
@click.option(
    "--kv-type", type=click.Choice(["f16", "q8"]), help="What the KV cache holds; see generate. Default: f16."
)
def command(
    model: Path,
    stage: str | None,
    step: str | None,
    after: str | None,
    diff: str | None,
    kernel: str | None,
    layer: int | None,
    form: str,
    arch: str | None,
    kv_type: str | None,
) -> None:
    """Show MODEL, a model file, or DIR, a compiled folder, at one stage."""
    wanted = {"--stage": stage, "--after": after, "--diff": diff, "--kernel": kernel}
    named = [option for option, value in wanted.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)}: give one of them")
    if form == "dot" and (diff or kernel or stage == "program"):
        given = "--stage program" if stage else named[0]
        raise UsageError(f"{given} has no --format dot, only graphs do: take --stage model, --stage fused or --after")
    if form == "json" and diff:
        raise UsageError("--format json: a diff is text; leave --format out")
    if kv_type is not None and model.is_dir():
        raise UsageError(f"--kv-type {kv_type}: {model} is compiled already; give the model file instead")
    from ..inspect.inspection import INPUT, inspect_path

    if stage == "prompt":
        if step == "decode":
            raise UsageError("--stage prompt is a stage of --step prefill; leave --step out")
        stage, step = "fused", "prefill"
    step = step or "decode"
    found = inspect_path(model, arch, kv_type or "f16", step)
    found.check_layer(layer)
    if kernel is not None:
        text = _kernel(found, kernel, layer, form)
    elif diff is not None:
        text = found.diff(diff, layer) or f"{diff} changed nothing here\n"
    elif after is not None:
        text = _graph(found.graph(after), layer, form)
    elif stage == "program":
        text = _program(found, step, layer, form)
    elif stage is None and layer is None and form == "text":
        text = _overview(found, step)
    else:
        # A layer or a format alone asks for a graph: the one that kernels are made of.
        graph = found.graph(INPUT) if stage == "model" else found.fused
        text = _graph(graph, layer, form)
    click.echo(text, nl=False)


def _graph(graph: Graph, layer: int | None, form: str) -> str:
    from ..inspect.export import to_dot, to_json
    from ..ir.text import print_graph

    printers = {"text": print_graph, "dot": to_dot, "json": to_json}
    return printers[form](graph, layer)


def _program(found: Inspected, step: str, layer: int | None, form: str) -> str:
    record = found.program()
    if form == "text":
        return f"{launch_table(record, step, layer)}\n{step_line(record, step)}\n"
    if layer is not None:
        for part in record["steps"]:
            part["launches"] = [launch for launch in part["launches"] if launch["layer"] == layer]
    return json.dumps(record, indent=1) + "\n"


def _kernel(found: Inspected, name: str, layer: int | None, form: str) -> str:
    text = found.kernel(name)
    launches = found.launches(name, layer) if form == "json" or layer is not None else []
    if form == "json":
        return json.dumps({"name": name, "text": text, "launches": launches}, indent=1) + "\n"
    # The text is the same for all layers: what is a layer's own are its launches.
    comments = [
        f"// layer {layer}: computes {', '.join(f'%{node}' for node in launch['nodes'])}; {launch['grid']} x "
        f"{launch['block']}, {launch['shared_bytes']:,} bytes of shared memory\n"
        for launch in launches
    ]
    return (text if text.endswith("\n") else text + "\n") + "".join(comments)


def _overview(found: Inspected, step: str) -> str:
    record = found.program()
    width = max(map(len, found.facts))
    lines = [f"{name:<{width}}  {value}" for name, value in found.facts.items()]
    lines += ["", pass_table(found.passes), "", f"{record['arch']}, {record['sm_count']} multiprocessors"]
    lines += [kernel_table(record, step), step_line(record, step)]
    return "\n".join(lines) + "\n"
