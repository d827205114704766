"""The type of options that name something."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    _Text = click.ParamType[str]
else:
    _Text = click.ParamType  # generic in click's newest versions only


class NamedText(_Text):
    """A name, or another text that means nothing when it is empty."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "":
            self.fail("the name is empty", param, ctx)
        return str(value)


NAME = NamedText()
