"""What Python callers give: of the right types, and answered in the words of the API, not in a command line's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from .ir.errors import PsigraphError
from .options import SessionOptions

# Options of commands, as errors from the rooms below name them: what they are called here.
_WORDS = (
    (re.compile("`psigraph generate` without --chat"), "`generate`"),
    (re.compile("--prompt-token-ids"), "a prompt of ids"),
    (re.compile("--template-var\\b"), "template_vars"),
    (re.compile(r" \(--rope-scale\)"), ""),
    (
        re.compile(
            "--(allow-blocked-quantization|arch|backend|chat-template|ctx|device|expect-sha256|kv-type|logprobs|max-new-tokens|out|"
            "policy|prefill|stop|thinking)\\b"
        ),
        lambda found: found[1].replace("-", "_"),
    ),
)


def reword(error: PsigraphError) -> None:
    """Make an error name parameters where it names a command's options."""
    text = str(error)
    for pattern, word in _WORDS:
        text = pattern.sub(word, text)
    error.args = (text,)


@contextmanager
def in_own_words() -> Iterator[None]:
    """Errors from within name parameters."""
    try:
        yield
    except PsigraphError as error:
        reword(error)
        raise


def require(name: str, value: object, kind: type | tuple[type, ...], give: str) -> None:
    """TypeError, with what to give, for a value that is not of a kind; True and False are no numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} is {_shown(value)}; give {give}")


def whole_or_none(name: str, value: object) -> int | None:
    """A whole number of any kind as an int; TypeError for anything else but None."""
    if value is None:
        return None
    require(name, value, Integral, "a whole number, or None")
    return int(value)  # type: ignore[call-overload, no-any-return]


def texts(name: str, value: object) -> tuple[str, ...]:
    """Several strings; TypeError for one string alone, or anything that is none."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {_shown(value)}; give a list of strings")
    several = tuple(value)
    for one in several:
        require(f"one of {name}", one, str, "strings")
    return several


def first_that_is_not_whole(ids: Sequence[Any]) -> int | None:
    """Where the first id lies that is no whole number; None where all are."""
    # A prompt's ids are looked at on the way to its first token: so each type once, not each id.
    wrong = {kind for kind in set(map(type, ids)) if kind is bool or not issubclass(kind, Integral)}
    return next((place for place, one in enumerate(ids) if type(one) in wrong), None) if wrong else None


def token_ids(name: str, value: Any, give: str = "a list of token ids") -> list[int]:
    """Token ids, of any kind of sequence or array, as ints; TypeError for anything else."""
    if isinstance(value, str | bytes | bytearray | dict) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {_shown(value)}; give {give}")
    ids = list(value)
    place = first_that_is_not_whole(ids)
    if place is not None:
        raise TypeError(f"{name}[{place}] is {_shown(ids[place])}; give token ids, which are whole numbers")
    return [int(one) for one in ids]


# What `psigraph.load` takes that is no path and no function, and what to give where something else is given.
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "backend": (str, "a string"),
    "device": (Integral, "the number of a GPU"),
    "kv_type": (str, "a string"),
    "sampling": (bool, "True or False"),
    "graph": (bool, "True or False"),
    "prefill": (str, "a string"),
    "cache_dtype": (str, "a string"),
}


def session_options(more: dict[str, Any], **given: Any) -> SessionOptions:
    """The options of `psigraph.load`; TypeError for one that there is not, or a value of a wrong type."""
    values = {**given, **more}
    known = SessionOptions.__dataclass_fields__
    for name in values:
        if name not in known:
            raise TypeError(f"load has no option {name}; options of sessions are {', '.join(known)}")
    for name, (kind, give) in _KINDS.items():
        if name in values:
            require(name, values[name], kind, give)
    for name in ("outputs", "disable"):
        if name in values:
            values[name] = texts(name, values[name])
    return SessionOptions(**{**values, "ctx": whole_or_none("ctx", values["ctx"]), "device": int(values["device"])})


def _shown(value: object) -> str:
    shown = ascii(value)
    return f"{shown if len(shown) <= 40 else shown[:37] + '...'} ({type(value).__name__})"
