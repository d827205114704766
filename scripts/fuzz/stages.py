"""A file's way through psigraph, stage by stage, and what each of them made of it. Runs in a process of its own."""

from __future__ import annotations

import re
import resource
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from psigraph.build import fuse, open_model
from psigraph.ir.errors import PsigraphError
from psigraph.medpsy.artifact import admit_file
from psigraph.options import SessionOptions
from psigraph.runtime.gguf.file import GgufFile, open_gguf
from psigraph.runtime.tokenizer.bpe import Tokenizer
from psigraph.runtime.tokenizer.end_tokens import end_tokens
from psigraph.session import open_session
from psigraph.text.template import KEY, ChatTemplate

MOST_LETTERS = 500
READER_SECONDS, SECONDS = 1.0, 8.0  # of processor time: for header and tokenizer, and for everything
SPARE_BYTES = 64 << 20  # and five times the metadata
HANG_SECONDS = 20.0

TEXTS = ("", "a", "Hello, world!\n", "<|im_start|>user\nHi<|im_end|>", "é 😀 \u0301 12 \t\r\n", "<" * 3000, "ab" * 4000)
MESSAGES = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "{{ 1 }}"}, {"role": "assistant", "content": ""},
     {"role": "user", "content": "é"}],
)  # fmt: skip


class Judge:
    """Runs stages and collects problems: [stage, what is wrong, details]."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, str, str]] = []
        self.refused: list[str] = []

    def run(self, stage: str, act: Callable[[], Any]) -> Any:
        """What the stage gives; None where it refuses the file, or fails."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    return act()
                finally:
                    for warning in caught:
                        self.message(stage, f"warning {warning.category.__name__}", str(warning.message))
                        if warning.category is not UserWarning:
                            self.problems.append((stage, f"{warning.category.__name__} for developers", str(warning)))
        except PsigraphError as error:
            self.refused.append(stage)
            self.message(stage, type(error).__name__, str(error))
        except BaseException as error:  # which types escape is what is asked
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}"
            self.problems.append((stage, what, "".join(traceback.format_exception(error))))
        return None

    def message(self, stage: str, kind: str, message: str) -> None:
        """A message must be one line, short, and drive no terminal."""
        if len(message) > MOST_LETTERS:
            self.problems.append((stage, f"{kind} of over {MOST_LETTERS} letters: {start_of(message)}", message))
        if not message or not message.isprintable():
            self.problems.append((stage, f"{kind} that is no printable line: {start_of(message)}", ascii(message)))


def start_of(message: str) -> str:
    """A message's beginning, numbers and quoted parts left out, so that alike ones count as one."""
    return re.sub(r"\d+|'[^']*'", "#", ascii(message))[:60]


def judge(path: Path, draw: Random, header_bytes: int, templates: bool = True) -> dict[str, Any]:
    """Feeds a file to every stage; problems, and in which stages it was refused.

    templates: render them too, which takes a process each, and 2 s where one goes on for ever.
    """
    court = Judge()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    file: GgufFile | None = court.run("header", lambda: open_gguf(path))
    if file is not None:
        tokenizer = court.run("tokenizer", lambda: Tokenizer(file))
        spent = time.process_time() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        if spent > READER_SECONDS:
            court.problems.append(("tokenizer", "slow", f"{spent:.2f} s"))
        if grown > SPARE_BYTES + 5 * header_bytes:
            court.problems.append(("tokenizer", "memory", f"{grown >> 20} MB for {header_bytes >> 10} KB of metadata"))
        if tokenizer is not None:
            court.run("text", lambda: texts(tokenizer, draw))
        court.run("end tokens", lambda: end_tokens(file))
        court.run("admission", lambda: admit_file(file, with_digest=False))
        court.run("template", lambda: ChatTemplate.of_file(file))
        if templates and file.metadata.get(KEY) is not None and draw.random() < 0.1:
            court.run("template", lambda: render(file, tokenizer, draw))
        model = court.run("binding", lambda: open_model(path, draw.choice((None, 1, 64, 2**31))))
        if model is not None:
            court.run("graph", lambda: fuse(model.graph(), ()))
            if draw.random() < 0.5:
                court.run("generation", lambda: generate(path))
    spent = time.process_time() - began
    if spent > SECONDS:
        court.problems.append(("all", "slow", f"{spent:.2f} s"))
    return {"problems": court.problems, "refused": court.refused}


def texts(tokenizer: Tokenizer, draw: Random) -> None:
    """Texts and back: the bytes of a text's ids are the text's, except where a token that stands for its own text is
    made by a merge too."""
    for text in TEXTS:
        ids = tokenizer.encode(text)
        told = tokenizer.decode_bytes(ids)
        if not told.endswith(text.encode()) and not tokenizer._literal.intersection(ids):
            raise AssertionError(f"{text[:20]!r} came back as {told[:20]!r}")
    ids = [draw.randrange(tokenizer.vocab_size) for _ in range(50)]
    stream = tokenizer.stream(skip_special=True)
    pieces = [*map(stream.push, ids), stream.finish()]
    if "".join(pieces) != tokenizer.decode(ids, skip_special=True):
        raise AssertionError("a stream gives other text than all at once")


def render(file: GgufFile, tokenizer: Tokenizer | None, draw: Random) -> None:
    """A conversation by the file's template, and its ids as far as a context of 64 goes."""
    text = ChatTemplate.of_file(file).render(draw.choice(MESSAGES), draw.choice((None, None, True)))
    if tokenizer is not None:
        tokenizer.encode(text, 64)


def generate(path: Path) -> None:
    """A few tokens in numpy: they come from finite logits, or there is an error."""
    with open_session(path, SessionOptions("cpu", ctx=None, outputs=("logits",))) as session:
        session.feed([1, 2])
        for _ in range(3):
            if session.position >= session.context:
                return
            token = session.engine.chosen()
            if not np.isfinite(session.engine.logits()).all():
                raise AssertionError("logits are not finite, and a token was chosen")
            session.feed([token])
