"""A click group that imports a command's module when the command is called, not before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import click


class LazyGroup(click.Group):
    """Group whose commands lie in modules of their own.

    commands_table: command name -> one-line summary, in the order that `--help` lists them.
    package: the package that holds the modules; a hyphen in a name is an underscore in the module's.
    prepare: gets every command before it is used, for what all of them have in common.
    Each module calls its click command `command`.
    """

    def __init__(
        self,
        *args: Any,
        commands_table: Mapping[str, str],
        package: str,
        prepare: Callable[[click.Command], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.commands_table = dict(commands_table)
        self.package = package
        self.prepare = prepare

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands_table:
            return None
        found = import_module(f".{cmd_name.replace('-', '_')}", self.package).command
        if not isinstance(found, click.Command):
            raise TypeError(f"{self.package}.{cmd_name}.command is no click command")
        self.prepare(found)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        # click looks for near names among the commands that it holds, and this group holds none.
        if name not in self.commands_table and not name.startswith("-") and not ctx.resilient_parsing:
            known = ", ".join(self.commands_table)
            raise click.UsageError(f"there is no command {name!r}; the commands are {known}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.commands_table.items()))
