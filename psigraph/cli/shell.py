"""Runs the command line: every way in which a command can end becomes an exit code and at most one line."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

import click
from click.shell_completion import shell_complete

from ..ending import asked
from ..ir.errors import OutOfMemoryError, PsigraphError, SpecError
from ..printable import printable
from .commands import main
from .exit_codes import CLOSED_PIPE, DEFECT, INTERRUPTED, MISSING_PACKAGE, SYSTEM
from .notes import is_quiet, set_quiet
from .terminal import is_plain

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What click calls a kind of number, and what people call it.
_KINDS = {
    "is not a valid integer range": "is not a whole number",
    "is not a valid integer": "is not a whole number",
    "is not a valid float range": "is not a number",
    "is not a valid float": "is not a number",
}

_shown_warnings: set[str] = set()  # one cause, such as a cache that cannot be written, may be met in several places


def run(arguments: Sequence[str]) -> int:
    """Runs `psigraph ARGUMENTS` and returns its exit code; messages go to stderr.

    PSIGRAPH_DEBUG, when set and not 0, shows the traceback before the line.
    """
    warnings.showwarning = _show_warning
    _shown_warnings.clear()
    set_quiet(False)
    # A file's name may hold bytes that no encoding of stdout has; it is shown with escapes then.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _invoke(main, list(arguments))
        # Here and not at interpreter exit, where a reader that went away could no longer be answered quietly.
        if sys.stdout is not None:
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except (KeyboardInterrupt, click.Abort):
        if sys.stderr is not None and sys.stderr.isatty():
            click.echo(err=True)  # off the line on which the terminal shows ^C
        return INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return CLOSED_PIPE
    except click.ClickException as error:
        return _fail(_usage_line(error), error.exit_code)
    except PsigraphError as error:
        return _fail(str(error), error.exit_code, isinstance(error, SpecError))
    except ModuleNotFoundError as error:
        if _is_ours(error.name):
            return _defect(error)
        return _fail(
            f"the Python package {error.name!r} is missing; `psigraph doctor` says what to install", MISSING_PACKAGE
        )
    except MemoryError:
        return _fail(
            "this machine's main memory is used up; close other programs, or take a smaller model or --ctx",
            OutOfMemoryError.exit_code,
        )
    except OSError as error:
        if error.strerror is None:
            return _defect(error)
        where = error.filename
        if where is None and error.errno in _FULL:
            # What a command writes to files has their names in its errors.
            where = "stdout"
            _silence_stdout()
        return _fail(f"{where}: {error.strerror}" if where else error.strerror, SYSTEM)
    except Exception as error:
        return _defect(error)


def _invoke(group: click.Group, arguments: list[str]) -> object:
    """What the command returns. Not by `group.main`, which answers a closed pipe itself, with exit code 1."""
    completion = os.environ.get("_PSIGRAPH_COMPLETE")  # set by the line that click's documentation puts into .bashrc
    if completion:
        return shell_complete(group, {}, "psigraph", "_PSIGRAPH_COMPLETE", completion)
    # Alone on the line, the program's name asks what it can do.
    colour = False if is_plain() else None
    with group.make_context("psigraph", arguments or ["--help"], color=colour) as context:
        return group.invoke(context)


def _usage_line(error: click.ClickException) -> str:
    """click's message in this program's form, with the help that fits."""
    message = " ".join(error.format_message().split()).rstrip(".")
    for clicks, ours in _KINDS.items():
        message = message.replace(clicks, ours)
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    # click begins its messages with a capital; after "psigraph: " that reads like a second sentence.
    if message[:1].isupper() and not message[1:2].isupper():
        message = message[0].lower() + message[1:]
    return f"{message} (see `{context.command_path} --help`)"


def _defect(error: Exception) -> int:
    what = str(error) or "no message"
    return _fail(
        f"{type(error).__name__}: {what}; this is a defect; rerun with PSIGRAPH_DEBUG=1 for the traceback", DEFECT
    )


def _fail(message: str, code: int, lines: bool = False) -> int:
    """Prints the one line, after the traceback when one is asked for. lines: several, the offender underlined."""
    if os.environ.get("PSIGRAPH_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    # After a signal, what fails since it was cut short is nobody's news.
    if asked() is None:
        with suppress(BrokenPipeError):  # if nobody reads stderr either, the exit code still tells
            click.echo(f"psigraph: {printable(message, lines)}", err=True)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning for the user, in the same form as an error; those for developers keep Python's form."""
    if category is UserWarning:
        text = f"psigraph: warning: {printable(str(message))}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    stream = file or sys.stderr
    if stream is not None and not is_quiet() and text not in _shown_warnings:
        _shown_warnings.add(text)
        stream.write(text)


def _is_ours(module: str | None) -> bool:
    return module is None or module.partition(".")[0] == "psigraph"


def _silence_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's own flush at exit does not complain again."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
