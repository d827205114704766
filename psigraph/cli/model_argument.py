"""MODEL, the argument of most commands, which -m and --model name too."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from .options import MODEL_PATH, Command


def model_argument(*also: str, metavar: str = "MODEL", required: bool = True) -> Callable[[Command], Command]:
    """MODEL as an argument, as -m or as --model; the command gets it as `model`.

    also: older names of the option. required: False where a command can do without a file, and gets None then.
    """

    def add(command: Command) -> Command:
        @wraps(command)
        def gathered(*args: Any, model: Any, named_model: Any, **values: Any) -> Any:
            if model is not None and named_model is not None:
                raise click.UsageError(
                    f"the model is given twice, as {model} and by -m {named_model}; leave one out",
                    click.get_current_context(),
                )
            found = named_model if model is None else model
            if found is None and required:
                raise click.UsageError(f"missing argument '{metavar}'", click.get_current_context())
            return command(*args, model=found, **values)

        option = click.option(
            "-m", "--model", *also, "named_model", type=MODEL_PATH, metavar="FILE", help="The same as the argument."
        )
        found: Command = click.argument("model", type=MODEL_PATH, required=False, metavar=metavar)(option(gathered))
        return found

    return add
