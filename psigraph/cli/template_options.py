"""Options that say by which chat template a conversation is written, and with what in its variables."""

from __future__ import annotations

import json
from typing import Any

import click

from .options import Command


def _text(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """A file's text, or a name as it is: which names there are, only the model knows."""
    from ..text.template import given_template

    return None if value is None else given_template(value)


def _variables(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """`K=V` -> {K: V}: V as JSON where it is some, else as text."""
    found: dict[str, Any] = {}
    for given in values:
        name, equals, text = given.partition("=")
        if not equals or not name.isidentifier():
            what = f"{given[:40]!r}: give a name and a value, such as enable_thinking=false"
            raise click.BadParameter(what, context, option)
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return found


def template_options(command: Command) -> Command:
    """--chat-template, as a text or a name, and --template-var, as a dict `template_vars`."""
    found: Command = click.option(
        "--template-var",
        "template_vars",
        multiple=True,
        callback=_variables,
        metavar="K=V",
        help="Set a variable of the chat template, as JSON or else as text; repeatable.",
    )(command)
    return click.option(
        "--chat-template",
        callback=_text,
        metavar="FILE|NAME",
        help="Another chat template than the model's: a file, or one that the model has under this name.",
    )(found)
