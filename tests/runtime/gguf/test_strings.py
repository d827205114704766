"""Arrays of strings: what numpy finds is what a walk from length to length finds, whatever the strings hold."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from psigraph.ir.errors import ModelFileError
from psigraph.runtime.gguf import cursor as gguf_cursor
from psigraph.runtime.gguf.cursor import Cursor
from psigraph.runtime.gguf.strings import StringArray, string_lengths


def stored(texts: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(text)) + text for text in texts)


def texts_of(kind: str, count: int) -> list[bytes]:
    draw = random.Random(f"{kind} {count}")
    lengths = {
        "short": lambda: draw.randint(1, 12),
        "with empty ones": lambda: draw.choice((0, 0, 3)),
        "with long ones": lambda: draw.choice((2, 255, 256, 300, 70_000)),
        "zeros": lambda: draw.randint(0, 20),
    }[kind]
    letters = b"\0" if kind == "zeros" else bytes(range(256))
    return [bytes(draw.choice(letters) for _ in range(lengths())) for _ in range(count)]


KINDS = ["short", "with empty ones", "with long ones", "zeros"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begin", [0, 3, 24])
def test_what_lies_whole_in_a_buffer_is_found(kind, begin):
    texts = texts_of(kind, 60)
    whole = b"\7" * begin + stored(texts)
    for cut in (0, 1, 9, len(whole) // 2):
        buffer = whole[: len(whole) - cut]
        lengths, end = string_lengths(buffer, begin, len(texts))
        ends = begin + np.cumsum([len(text) + 8 for text in texts])
        assert lengths.tolist() == [len(text) for text, last in zip(texts, ends, strict=True) if last <= len(buffer)]
        assert end == (ends[len(lengths) - 1] if len(lengths) else begin)
    assert string_lengths(whole, begin, 7)[0].tolist() == [len(text) for text in texts[:7]]


@pytest.mark.parametrize("kind", KINDS)
def test_strings_are_read_over_the_ends_of_buffers(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_cursor, "_READ_AHEAD", 256)
    texts = texts_of(kind, 400)
    path = tmp_path / "strings"
    path.write_bytes(stored(texts) + b"\2\0\0\0")
    with path.open("rb") as file:
        cursor = Cursor(file.fileno(), path.stat().st_size)
        found = cursor.strings(len(texts), "k")
        assert cursor.u32("behind") == 2
    wanted = [text.decode("utf-8", "surrogateescape") for text in texts]
    assert isinstance(found, StringArray)
    assert list(found) == wanted
    assert [found[index] for index in (0, 5, -1)] == [wanted[index] for index in (0, 5, -1)]
    assert found[3:9] == wanted[3:9]
    with pytest.raises(IndexError):
        found[len(texts)]


@pytest.mark.parametrize(
    ("behind", "says"),
    [(b"\5\0\0\0\0\0\0\0abc", "k\\[3\\].*needs 13 bytes"), (struct.pack("<Q", 2 << 20), "k\\[3\\].*at most 1048576")],
)
def test_the_string_that_is_at_fault_is_named(behind, says, tmp_path):
    path = tmp_path / "strings"
    path.write_bytes(stored([b"one", b"", b"three"]) + behind)
    with path.open("rb") as file, pytest.raises(ModelFileError, match=says):
        Cursor(file.fileno(), path.stat().st_size).strings(4, "k")
