"""Options that say how the next token is drawn: the same for every command that writes text."""

from __future__ import annotations

import math
import secrets
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from .options import Command

if TYPE_CHECKING:
    _Bias = click.ParamType[tuple[tuple[int, float], ...]]
else:
    _Bias = click.ParamType  # generic in click's newest versions only


class LogitBias(_Bias):
    """`42=-5,7=-inf` -> ((42, -5.0), (7, -inf))."""

    name = "bias"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, float], ...]:
        if isinstance(value, tuple):
            return value
        found = []
        for part in value.split(","):
            token, equals, bias = part.partition("=")
            try:
                number = float(bias)
                if not equals or not (token.strip().isascii() and token.strip().isdigit()) or math.isnan(number):
                    raise ValueError
            except ValueError:
                self.fail(f"{part[:40]!r}: give token id and bias as 42=-5, or 42=-inf to forbid a token", param, ctx)
            found.append((int(token), number))
        return tuple(found)


# Option -> (field of SamplerSettings, type, what it does). -1 as a seed or as top-k is what other tools call it.
OPTIONS: dict[str, tuple[str, click.ParamType[Any], str]] = {
    "--temperature": ("temperature", click.FloatRange(0, 100), "Probabilities are softmax(logits / T); 0: greedy."),
    "--top-k": ("top_k", click.IntRange(-1, (1 << 31) - 1), "Of the K likeliest tokens; 0 or -1: of all."),
    "--top-p": ("top_p", click.FloatRange(0, 1), "Of the fewest whose probabilities reach P; 1: of all."),
    "--min-p": ("min_p", click.FloatRange(0, 1), "Of those with at least this part of the likeliest's probability."),
    "--repeat-penalty": (
        "repetition_penalty", click.FloatRange(0.01, 100), "Divides the logits of tokens that were there; 1: off."
    ),
    "--presence-penalty": (
        "presence_penalty", click.FloatRange(-100, 100), "Less for tokens that were there; 0: off."
    ),
    "--frequency-penalty": (
        "frequency_penalty", click.FloatRange(-100, 100), "Less for every time that a token was there; 0: off."
    ),
    "--penalty-window": (
        "penalty_window", click.IntRange(-1, (1 << 31) - 1), "How many of the last tokens penalties see; -1: all."
    ),
    "--seed": (
        "seed",
        click.IntRange(-1, (1 << 64) - 1),
        "The same seed draws the same text. Default, or -1: a new one; in bench 0.",
    ),
}  # fmt: skip
# What llama.cpp calls them.
ALSO = {"--temperature": ("--temp",), "--penalty-window": ("--repeat-last-n",), "--seed": ("-s",)}


def sampling_options(command: Command) -> Command:
    """Adds the options; the command gets those that were given as one dict `sampling`, fields of SamplerSettings."""

    @wraps(command)
    def gathered(*args: Any, **values: Any) -> Any:
        names = [field for field, _, _ in OPTIONS.values()]
        sampling = {name: values.pop(name) for name in names if values.get(name) is not None}
        for name in names:
            values.pop(name, None)
        if sampling.get("seed") == -1:
            sampling["seed"] = new_seed()
        if sampling.get("top_k") == -1:
            sampling["top_k"] = 0
        biases = [pair for group in values.pop("logit_bias") for pair in group]
        if biases:
            sampling["logit_bias"] = dict(biases)
        return command(*args, sampling=sampling, **values)

    found: Command = click.option(
        "--logit-bias",
        type=LogitBias(),
        multiple=True,
        metavar="ID=BIAS",
        help="Added to a token's logit; -inf forbids the token; repeatable.",
    )(gathered)
    for option, (field, kind, text) in reversed(OPTIONS.items()):
        found = click.option(option, *ALSO.get(option, ()), field, type=kind, metavar="N", help=text)(found)
    return found


def new_seed() -> int:
    """One that nobody can guess, short enough to be typed again."""
    return secrets.randbelow(1 << 32)
