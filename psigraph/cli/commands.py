"""Which commands there are, and the group that finds their modules."""

from __future__ import annotations

import click

from .exit_codes import EPILOG
from .lazy import LazyGroup
from .name_type import NAME
from .notes import set_quiet

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


# Options whose text may be empty: it is said, not looked up.
TEXTS = ("prompt", "system", "prompt_text", "stop", "host")
HELP_NAMES = {"help_option_names": ["-h", "--help"]}


def _prepare(command: click.Command) -> None:
    """-h and -q are everywhere, and a name is never empty."""
    if any(param.name == "quiet" for param in command.params):
        return  # a second look at the same command
    for param in command.params:
        if param.type is click.STRING and param.name not in TEXTS:
            param.type = NAME
    command.context_settings = {**command.context_settings, **HELP_NAMES}
    command.params.append(
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=lambda ctx, _, wanted: set_quiet(wanted),
            help="Say nothing beside the result: no warnings, no notes, no progress.",
        )
    )


@click.group(
    cls=LazyGroup,
    commands_table=COMMANDS,
    package=__package__,
    prepare=_prepare,
    epilog=EPILOG,
    no_args_is_help=True,
    context_settings=HELP_NAMES,
)
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
