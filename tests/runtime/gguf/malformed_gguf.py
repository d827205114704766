"""Wrong GGUF files, one defect each, written byte by byte without the code under test.

`CASES` lists every file; `sound` tells which must load. `python malformed_gguf.py FILE...` feeds files to the reader,
and those with a vocabulary to the tokenizer, and prints a JSON line for each: outcome, CPU seconds, growth of the
largest resident size.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LAYOUTS = {
    U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q", I64: "<q",
    F64: "<d",
}  # fmt: skip
TYPE_F32, TYPE_Q4_0, TYPE_REMOVED, TYPE_Q4_K = 0, 2, 4, 12


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: object) -> bytes:
    return text(value) if kind == STRING else struct.pack(LAYOUTS[kind], value)  # type: ignore[arg-type]


def pair(key: str | bytes, kind: int, value: object) -> bytes:
    return text(key) + struct.pack("<I", kind) + scalar(kind, value)


def array(key: str, kind: int, values: Sequence[object], count: int | None = None) -> bytes:
    """An array; `count` is what it claims to hold."""
    head = struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count)
    return text(key) + head + b"".join(scalar(kind, value) for value in values)


def tensor(name: str | bytes, dimensions: Sequence[int], kind: int, offset: int, count: int | None = None) -> bytes:
    """A table entry; `count` is the number of dimensions that it claims. Negative numbers wrap as in C."""
    wrapped = [dimension % 2**64 for dimension in dimensions]
    head = text(name) + struct.pack("<I", len(wrapped) if count is None else count)
    return head + struct.pack(f"<{len(wrapped)}QIQ", *wrapped, kind, offset % 2**64)


def build(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    pair_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file; the counts are what its header claims."""
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    whole = head + b"".join(pairs) + b"".join(tensors)
    return whole + b"\0" * (-len(whole) % alignment if tensors or data else 0) + data


PAIRS = [
    pair("general.architecture", STRING, "qwen3"),
    pair("general.name", STRING, "tiny"),
    pair("qwen3.block_count", U32, 1),
    pair("qwen3.embedding_length", U32, 8),
    pair("qwen3.attention.head_count", U32, 2),
    array("tokenizer.ggml.tokens", STRING, ["a", "b", "c"]),
]
ROW = struct.pack("<8f", *range(1, 9))
TWO = [tensor("a", [8], TYPE_F32, 0), tensor("b", [8], TYPE_F32, 32)]
VALID = build(PAIRS, TWO, ROW + ROW)


def one(dimensions: Sequence[int], kind: int = TYPE_F32, offset: int = 0, data: bytes = ROW, **claims: int) -> bytes:
    return build(PAIRS, [tensor("a", dimensions, kind, offset, **claims)], data)


def architecture(*pairs: bytes) -> bytes:
    return build([pair("general.architecture", STRING, "qwen3"), *pairs], TWO, ROW + ROW)


def nested_arrays() -> bytes:
    body = text("k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 2000
    return build([body + struct.pack("<IQ", U8, 0)])


def wrapping_offset() -> bytes:
    """The offset brings the sum back to byte 0 where it wraps: the tensor would be the header."""
    start = len(build(PAIRS, [tensor("a", [8], TYPE_F32, 0)]))
    return one([8], offset=-start)


def not_finite() -> bytes:
    scale = (struct.pack("<H", 0x7E00) + b"\x88" * 16).ljust(32, b"\0")
    table = [tensor("a", [32], TYPE_Q4_0, 0), tensor("b", [8], TYPE_F32, 32)]
    return build(PAIRS, table, scale + struct.pack("<8f", *[float("inf")] * 8))


def vocabulary(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str]) -> bytes:
    """A file of nothing but a tokenizer, which begins with the 256 letters of bytes."""
    letters = [*map(chr, (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)))]
    pairs = [
        pair("general.architecture", STRING, "qwen3"),
        pair("tokenizer.ggml.model", STRING, "gpt2"),
        pair("tokenizer.ggml.pre", STRING, "qwen2"),
        array("tokenizer.ggml.tokens", STRING, [*letters, *tokens]),
        array("tokenizer.ggml.token_type", I32, [1] * 256 + list(kinds)),
        array("tokenizer.ggml.merges", STRING, merges),
    ]
    return build(pairs, TWO, ROW + ROW)


def merged(count: int, more_tokens: int = 0) -> bytes:
    """So many merges, each of a token and a letter, and so many tokens that no merge makes."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    words, merges = list(letters), []
    for number in range(count):  # breadth first, so that tokens stay as short as those of a real vocabulary
        merges.append(f"{words[number // len(letters)]} {letters[number % len(letters)]}")
        words.append(merges[-1].replace(" ", "", 1))
    made = words[len(letters) :]
    return vocabulary([*made, *(f"<{n}>" for n in range(more_tokens))], [1] * count + [4] * more_tokens, merges)


def control_tokens(count: int, letters: int) -> bytes:
    """So many control tokens of so many letters."""
    return vocabulary(["ab", *(f"<{n}>".ljust(letters, "x") for n in range(count))], [1] + [3] * count, ["a b"])


def strings(count: int, value: str) -> bytes:
    body = text("k") + struct.pack("<IIQ", ARRAY, STRING, count) + text(value) * count
    return build([body])


def many_tensors(count: int) -> bytes:
    return build(PAIRS, [tensor(f"t{index}", [8], TYPE_F32, 32 * index) for index in range(count)], ROW * count)


@dataclass(frozen=True)
class Case:
    """what: the defect; content: makes the file's bytes; sound: it must load; names: what the error must name."""

    what: str
    content: Callable[[], bytes]
    names: str = ""
    sound: bool = False


def wrong(what: str, names: str, content: bytes | Callable[[], bytes]) -> Case:
    return Case(what, content if callable(content) else lambda: content, names)


def right(what: str, content: bytes | Callable[[], bytes]) -> Case:
    return Case(what, content if callable(content) else lambda: content, sound=True)


def aligned(value: bytes, alignment: int = 32) -> bytes:
    return build([*PAIRS, value], TWO, ROW + ROW, alignment=alignment)


CASES: dict[str, Case] = {
    "valid": right("a correct file", VALID),
    # header and truncation
    "empty": wrong("zero bytes", "header", b""),
    "truncated_header": wrong("10 bytes", "header", VALID[:10]),
    "bad_magic": wrong("magic GGUX", "magic", build(PAIRS, TWO, ROW + ROW, magic=b"GGUX")),
    "version_99": wrong("version 99", "version", build(PAIRS, TWO, ROW + ROW, version=99)),
    "version_1": wrong("version 1 has 32-bit lengths", "version", build(PAIRS, TWO, ROW + ROW, version=1)),
    "mixed_endian": wrong("version big-endian", "big-endian", build(PAIRS, TWO, ROW + ROW, version=0x03000000)),
    "truncated_pairs": wrong("cut in the pairs", "metadata_kv_count", VALID[:100]),
    "truncated_value": wrong("cut in a value", "tokenizer.ggml.tokens", VALID[: VALID.index(text("b")) + 4]),
    "truncated_table": wrong(
        "cut in the tensor table", "tensor b", VALID[: VALID.rindex(text("b") + struct.pack("<I", 1)) + 14]
    ),
    "truncated_data": wrong("last tensor 8 bytes short", "tensor b", VALID[:-8]),
    "pair_count_huge": wrong("2^63-1 pairs", "metadata_kv_count", build(PAIRS, TWO, ROW + ROW, pair_count=2**63 - 1)),
    "tensor_count_huge": wrong("2^40 tensors", "tensor_count", build(PAIRS, TWO, ROW + ROW, tensor_count=2**40)),
    # pairs
    "string_length_huge": wrong(
        "a string of 2^62 bytes", "k", build([text("k") + struct.pack("<IQ", STRING, 2**62) + b"abc"])
    ),
    "array_count_huge": wrong("2^40 bytes in an array of 3", "k", build([array("k", U8, [1, 2, 3], 2**40)])),
    "string_array_count_huge": wrong("2^61 strings, 1 there", "k", build([array("k", STRING, ["a"], 2**61)])),
    "array_string_length_huge": wrong(
        "a string of 2^63 bytes in an array",
        "k[1]",
        build([text("k") + struct.pack("<IIQ", ARRAY, STRING, 2) + text("a") + struct.pack("<Q", 2**63) + b"a"]),
    ),
    "array_nested": wrong("arrays 2,000 deep", "k", nested_arrays),
    "array_large": right("4,000,000 bytes in an array", lambda: build([array("k", U8, [1] * 4_000_000)])),
    "value_type_99": wrong("value type 99", "k", build([text("k") + struct.pack("<II", 99, 0)])),
    "element_type_99": wrong("element type 99", "k", build([text("k") + struct.pack("<IIQ", ARRAY, 99, 0)])),
    "key_twice": wrong("the same key twice", "k", build([pair("k", U32, 1), pair("k", U32, 2)])),
    "key_not_utf8": wrong("key bytes ff fe", "key 0", build([pair(b"\xff\xfe", U32, 1)])),
    "key_controls": wrong("a terminal escape in a key", "key 0", build([pair("\x1b[2J", U32, 1)])),
    "value_not_utf8": wrong("text bytes ff fe", "k", build([pair("k", STRING, b"\xff\xfe")])),
    "architecture_not_utf8": wrong(
        "an architecture of bytes ff fe",
        "general.architecture",
        build([pair("general.architecture", STRING, b"\xff\xfe")]),
    ),
    "name_not_utf8": right("a name of bytes ff fe", build([pair("general.name", STRING, b"\xff\xfe")])),
    "key_long": wrong("a key of 257 letters", "key 0", build([pair("k" * 257, U32, 1)])),
    "key_longest": wrong("twice a key of 256 letters", "k" * 256, build([pair("k" * 256, U32, 1)] * 2)),
    "key_empty": wrong("an empty key", "key 0", build([pair("", U32, 1)])),
    "bool_7": wrong("a bool stored as 7", "k", build([pair("k", BOOL, 7)])),
    "bool_array_2": wrong("a bool in an array stored as 2", "k", build([array("k", BOOL, [0, 1, 2])])),
    # shapes and types
    "dimensions_0": wrong("no dimensions", "tensor a", one([])),
    "dimensions_64": wrong("64 dimensions", "tensor a", one([1] * 64)),
    "dimensions_huge": wrong("2^31 dimensions claimed", "tensor a", one([8], count=2**31)),
    "dimension_zero": wrong("shape 8 x 0", "tensor a", one([8, 0])),
    "elements_wrap_to_0": wrong("2^32 x 2^32", "tensor a", one([2**32, 2**32])),
    "elements_wrap_to_1": wrong("a product that wraps to 1", "tensor a", one([3, 0xAAAAAAAAAAAAAAAB])),
    "dimension_negative": wrong("-8", "tensor a", one([-8])),
    "row_not_whole_blocks": wrong("100 elements in a Q4_K row", "tensor a", one([100], TYPE_Q4_K, data=b"\0" * 144)),
    "type_removed": wrong("type 4", "tensor a", one([32], TYPE_REMOVED, data=b"\0" * 64)),
    "type_9999": wrong("type 9999", "tensor a", one([32], 9999, data=b"\0" * 64)),
    # names, offsets, alignment
    "tensor_twice": wrong(
        "the same tensor twice",
        "tensor a",
        build(PAIRS, [tensor("a", [8], TYPE_F32, 0), tensor("a", [8], TYPE_F32, 32)], ROW + ROW),
    ),
    "offset_past_end": wrong("offset 2^40", "tensor a", one([8], offset=2**40)),
    "offset_wraps": wrong("offset that wraps to the header", "tensor a", wrapping_offset),
    "overlap": wrong(
        "two tensors in one place",
        "overlaps",
        build(PAIRS, [tensor("a", [8], TYPE_F32, 0), tensor("b", [8], TYPE_F32, 0)], ROW + ROW),
    ),
    "misaligned": wrong("offset 1", "tensor a", one([8], offset=1, data=ROW + ROW)),
    "alignment_0": wrong("alignment 0", "general.alignment", aligned(pair("general.alignment", U32, 0))),
    "alignment_24": wrong("alignment 24", "general.alignment", aligned(pair("general.alignment", U32, 24), 24)),
    "alignment_huge": wrong("alignment 2^31", "general.alignment", aligned(pair("general.alignment", U32, 2**31))),
    "alignment_text": wrong("alignment as text", "general.alignment", aligned(pair("general.alignment", STRING, "32"))),
    "alignment_64": right("alignment 64", build([pair("general.alignment", U32, 64)], TWO[:1], ROW, alignment=64)),
    "evil_name": wrong(
        "a path, NUL and escape in a name", "tensor 0", build(PAIRS, [tensor("../x\0\x1b[2J", [8], 0, 0)], ROW)
    ),
    "long_name": wrong("a name of 1 MB", "tensor 0", lambda: build(PAIRS, [tensor("a" * 2**20, [8], 0, 0)], ROW)),
    # a right container with a wrong meaning
    "not_finite": wrong("a NaN scale, infinite weights", "tensor a", not_finite),
    "heads_0": wrong("no heads", "head_count", architecture(pair("qwen3.attention.head_count", U32, 0))),
    "heads_text": wrong("heads as text", "head_count", architecture(pair("qwen3.attention.head_count", STRING, "2"))),
    "layers_4g": wrong("2^32-1 layers", "block_count", architecture(pair("qwen3.block_count", U32, 2**32 - 1))),
    "theta_nan": wrong("theta NaN", "freq_base", architecture(pair("qwen3.rope.freq_base", F32, float("nan")))),
    "split": wrong("part of a split model", "llama-gguf-split", build([pair("split.count", U16, 3)])),
    "hostile_template": right(
        "a template that reaches for classes (judged where it is rendered)",
        build([*PAIRS, pair("tokenizer.chat_template", STRING, "{{ ''.__class__.__mro__ }}")], TWO, ROW + ROW),
    ),
    "trailing_bytes": right("1,000 bytes after the data", VALID + b"\xcc" * 1000),
    "reserved_key": right("a key that other readers use themselves", build([pair("GGUF.version", U32, 1)])),
    "no_tensors": right("a header and nothing else", build()),
    "heads_per_layer": right("an array of heads", architecture(array("qwen3.attention.head_count", U32, [2]))),
    # files made to be expensive
    "strings_short": right("1,000,000 strings of 2 letters", lambda: strings(1_000_000, "ab")),
    "strings_wide": right(
        "100,000 strings of 50 letters outside Unicode's first plane", lambda: strings(100_000, "😀" * 50)
    ),
    "strings_too_many": wrong("1,000,001 strings", "k", lambda: strings(1_000_001, "a")),
    "pairs_many": right("16,384 pairs", lambda: build([pair(f"k{index}", U32, index) for index in range(16_384)])),
    "pairs_too_many": wrong(
        "16,385 pairs", "metadata_kv_count", lambda: build([pair(f"k{index}", U32, index) for index in range(16_385)])
    ),
    "tensors_many": right("32,768 tensors", lambda: many_tensors(32_768)),
    "text_huge": wrong("a text of 17 MiB", "k", lambda: build([pair("k", STRING, b"x" * (17 << 20))])),
    "vocabulary": right("Qwen3's number of tokens and merges", lambda: merged(151_387, 293)),
    "vocabulary_most": right("as many tokens and merges as a tokenizer may have", lambda: merged(196_608, 65_280)),
    "control_tokens_short": right("12 MB of control tokens", lambda: control_tokens(250_000, 48)),
    "control_tokens_many": right("40 MB of control tokens", lambda: control_tokens(400_000, 100)),
    "control_tokens_long": right("40 MB of control tokens, 1 MB each", lambda: control_tokens(40, 1 << 20)),
}


def measure(path: Path) -> dict[str, object]:
    """Open the file, make its tokenizer and read its tensors: what came of it, CPU seconds for the first two, growth of
    the largest resident size."""
    from psigraph.ir.errors import PsigraphError
    from psigraph.runtime.gguf.file import open_gguf
    from psigraph.runtime.tokenizer.bpe import Tokenizer

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    opened = 0.0
    try:
        with open_gguf(path) as file:
            if "tokenizer.ggml.model" in file.metadata:
                with suppress(PsigraphError):
                    Tokenizer(file)
            opened = time.process_time() - start
            for name in file.tensors if len(file.tensors) < 100 else ():
                file.read(name)
        outcome, message = "loaded", ""
    except Exception as error:  # which type escapes is what the test asks
        outcome, message = type(error).__name__, str(error)
    opened = opened or time.process_time() - start
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"case": path.stem, "outcome": outcome, "message": message, "seconds": opened, "growth": growth}


def main(paths: list[str]) -> None:
    """Print one JSON line for each file, each opened in a fork of its own: a hang or crash ends that one alone."""
    import psigraph.runtime.tokenizer.bpe  # noqa: F401 - its own cost is not a file's

    warnings.simplefilter("ignore")

    for path in map(Path, paths):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            print(json.dumps(measure(path)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"case": path.stem, "outcome": f"wait status {status}", "message": ""}))


if __name__ == "__main__":
    main(sys.argv[1:])
