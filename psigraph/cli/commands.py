"""Which commands there are, and the group that finds their modules."""

from __future__ import annotations

import click

from .exit_codes import EPILOG
from .lazy import LazyGroup

# Command -> what it does. Its module is psigraph.cli.<command>, and the click command in there is `command`.
COMMANDS = {
    "compile": "Compile a model and write what every stage makes of it.",
    "inspect": "Show a model, a pass, a layer or a kernel at any stage.",
    "bench": "Measure how many tokens a second a model decodes, and write a report.",
    "generate": "Continue a text with a model.",
    "chat": "Talk with a model in the terminal.",
    "perplexity": "Judge a quantization or a kernel by a text's perplexity and saved logits.",
    "synth": "Write a synthetic model file with a real model's exact shapes.",
    "ablate": "Measure what each pass and feature is worth.",
    "tune": "Find the launch shapes that are fastest on this GPU, and keep them.",
    "compare": "Measure other runtimes and psigraph in turns on one file.",
    "matrix": "Merge reports into the comparator matrix, its tables and its chart.",
    "doctor": "Say what works on this machine, and how to get the rest.",
}


@click.group(cls=LazyGroup, commands_table=COMMANDS, package=__package__, epilog=EPILOG, no_args_is_help=True)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _, wanted: _show_version(ctx) if wanted else None,
    help="Show the version and exit.",
)
def main() -> None:
    """Compile a transformer block written in YAML into fused CUDA kernels, and run it.

    One decode step becomes one CUDA graph, replayed for every token.
    """


def _show_version(context: click.Context) -> None:
    """Not by click's own option, which wants the version before anybody asks."""
    from ..version import package_version

    click.echo(f"psigraph {package_version()}")
    context.exit()
