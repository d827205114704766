"""Options that several commands share, so that they are named and explained alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..medpsy.policy import OVERRIDE_OPTION
from ..options import SessionOptions
from ..rope_scaling import rope_scaling

if TYPE_CHECKING:
    _Ids = click.ParamType[tuple[int, ...]]
else:
    _Ids = click.ParamType  # generic in click's newest versions only

Command = Callable[..., Any]

BACKEND_HELP = (
    "cuda: a GPU; cpu: numpy, slow and exact; host: the generated kernels on this machine's CPU (needs g++); "
    "auto: cuda if a GPU works, else cpu."
)


class TokenIds(_Ids):
    """`1,2,3` or `1 2 3` -> (1, 2, 3)."""

    name = "ids"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "IDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        ids: list[int] = []
        for part in re.split(r"[,\s]+", value.strip()):
            if not re.fullmatch(r"\d{1,10}", part, re.ASCII):
                what = f"{part[:40]!r} is no token id" if part else "an id is missing beside a comma"
                if not value.strip():
                    what = "the prompt is empty"
                self.fail(f"{what}; give numbers from 0, separated by commas, such as 151644,872", param, ctx)
            ids.append(int(part))
        return tuple(ids)


TOKEN_IDS = TokenIds()


class Seconds(click.FloatRange):
    """A number of seconds in a range; `nan`, which no comparison refuses, is none."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        if math.isnan(found):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return found


class Depths(_Ids):
    """`depth=0,512,1024` -> (0, 512, 1024)."""

    name = "depths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"depth=\d{1,7}(,\d{1,7})*", value, re.ASCII):
            self.fail(f"{value[:40]!r}: give depths as depth=0,512,1024", param, ctx)
        return tuple(int(part) for part in value.removeprefix("depth=").split(","))


DEPTHS = Depths()


class TokenCount(click.IntRange):
    """At least 1; or -1, for no limit."""

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return -1 if value in (-1, "-1") else int(super().convert(value, param, ctx))


TOKEN_COUNT = TokenCount()


class NamedPath(click.Path):
    """A path; an empty one, which Python takes for the folder it is in, is refused."""

    def __init__(self) -> None:
        # Who reads the file says why it cannot, with the exit code that this has: 3 for a model, not 2.
        super().__init__(path_type=Path, readable=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the name is empty", param, ctx)
        return super().convert(value, param, ctx)


# Existence is not asked here: the reader of model files has the better words for what is wrong with one.
MODEL_PATH = NamedPath()
FILE_PATH = NamedPath()


def backend_option(default: str | None = "auto") -> Callable[[Command], Command]:
    """--backend."""
    return click.option(
        "--backend",
        type=click.Choice(["auto", "cuda", "cpu", "host"]),
        default=default,
        show_default=default is not None,
        help=BACKEND_HELP,
    )


kv_type_option = click.option(
    "--kv-type",
    type=click.Choice(["f16", "q8"]),
    default="f16",
    show_default=True,
    help="What the KV cache holds. q8: 8 bits a value and a scale for 32, about half the memory, with a small loss.",
)


rope_options = (
    click.option(
        "--rope-scaling",
        "rope_kind",
        type=click.Choice(["none", "linear", "yarn"]),
        help="Stretch positions this way instead of the file's, for a context beyond its own.",
    ),
    click.option(
        "--rope-scale", type=float, metavar="N", help="With it: how many times the context that was trained on."
    ),
)


def run_options(command: Command) -> Command:
    """--device, --ctx, --kv-type, --no-graph, --disable-pass: how a model is run.

    The command gets them as one value `options`, together with --backend and, where it has that, --prefill.
    """

    @wraps(command)
    def gathered(
        *args: Any, backend: str, no_graph: bool, rope_kind: str | None, rope_scale: float | None, **values: Any
    ) -> Any:
        names = ("device", "ctx", "kv_type", "disable", "prefill")
        given = {name: values.pop(name) for name in names if name in values}
        rope = rope_scaling(rope_kind, rope_scale)
        return command(*args, options=SessionOptions(backend, graph=not no_graph, rope=rope, **given), **values)

    found: Command = gathered
    for option in reversed(
        (
            click.option("--device", type=click.IntRange(0), default=0, show_default=True, help="Which GPU."),
            click.option(
                "-c",
                "--ctx",
                type=click.IntRange(1),
                metavar="N",
                help="Positions that the KV cache holds. Default: 4096, more where the request needs more.",
            ),
            kv_type_option,
            *rope_options,
            click.option("--no-graph", is_flag=True, help="Launch kernel after kernel; replay no CUDA graph."),
            disable_option,
        )
    ):
        found = option(found)
    return found


disable_option = click.option(
    "--disable-pass",
    "disable",
    multiple=True,
    metavar="NAME",
    help="Leave a fusion out; repeatable. A wrong name lists them.",
)


prefill_option = click.option(
    "--prefill",
    type=click.Choice(["auto", "own", "library", "off"]),
    default="auto",
    show_default=True,
    help="How prompts go in: own kernels by chunks; a library's products (a GPU, with psigraph[library]); off: token "
    "by token, as always on the CPU in numpy. auto: the library on a GPU that has it, else own kernels, else off; own "
    "and library end with an error where they cannot be done.",
)


def admission_options(command: Command) -> Command:
    """--allow-blocked-quantization and --expect-sha256."""
    command = click.option(
        "--expect-sha256", metavar="HEX", help="Refuse the file unless this is its digest, before a weight is read."
    )(command)
    return click.option(
        OVERRIDE_OPTION,
        "allow_blocked",
        is_flag=True,
        help="Run weights of a quantization tier that the policy blocks; the report says so.",
    )(command)


# For commands that write text; a known digest switches the policy on by itself, and nothing switches it off.
policy_option = click.option(
    "--policy",
    type=click.Choice(["medpsy"]),
    help="Apply the medical policy to any model; MedPsy files bring it with them.",
)
