"""Failures of the tokenizer's library as errors of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...ir.errors import PsigraphError


@contextmanager
def as_error(make: Callable[[str], PsigraphError]) -> Iterator[None]:
    """What the library says about a failure, 120 printable letters of it, goes into the error that `make` makes.

    A panic is a BaseException, so it passes every `except Exception`; its class cannot be imported, only named. What
    is known to make the library panic is refused before it is asked: this is for the rest.
    """
    try:
        yield
    except BaseException as problem:
        kind = type(problem)
        if kind is not Exception and kind.__name__ != "PanicException":  # the library raises no other kinds
            raise
        raise make(ascii(str(problem))[1:121]) from None
