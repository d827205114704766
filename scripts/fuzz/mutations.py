"""Ways to make a model file wrong: each is a function of a document and a random source, and a row of `MUTATIONS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

from document import ARRAY, BOOL, F32, F64, I32, STRING, U8, U32, U64, Document, Pair, Tensor

NUMBERS = (0, 1, 2, -1, 7, 255, 256, 4096, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, 3.4e38, math.inf, -math.inf, math.nan)
TEXTS = (
    b"", b" ", b"a", b"qwen3", b"gpt2", b"default", b"qwen35", b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"a\nb", b"\x1b[2J",
    b"psigraph: done\r\n", "\u202e\u2028x".encode(), "é".encode(), b"x" * 600, b"x" * 70_000, "😀".encode() * 200,
    b"<|im_end|>", b"<|endoftext|>", b"</think>", b"{{", b"%s %n {0}", b"../../etc/passwd", b"1e999",
)  # fmt: skip
KEYS = (
    b"general.architecture", b"general.name", b"general.type", b"general.alignment", b"general.file_type",
    b"general.sampling.temp", b"general.sampling.top_k", b"general.sampling.top_p", b"general.quantization_version",
    b"split.count", b"split.no", b"qwen3.block_count", b"qwen3.context_length", b"qwen3.embedding_length",
    b"qwen3.feed_forward_length", b"qwen3.attention.head_count", b"qwen3.attention.head_count_kv",
    b"qwen3.attention.key_length", b"qwen3.attention.value_length", b"qwen3.attention.layer_norm_rms_epsilon",
    b"qwen3.rope.freq_base", b"qwen3.rope.dimension_count", b"qwen3.rope.scaling.type", b"qwen3.rope.scaling.factor",
    b"qwen3.rope.scaling.attn_factor", b"qwen3.rope.scaling.original_context_length", b"qwen3.rope.scale_linear",
    b"qwen3.vocab_size", b"qwen3.pooling_type", b"adapter.type", b"psigraph.synthetic",
    b"tokenizer.ggml.model", b"tokenizer.ggml.pre", b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type",
    b"tokenizer.ggml.scores", b"tokenizer.ggml.merges", b"tokenizer.ggml.eos_token_id",
    b"tokenizer.ggml.eos_token_ids", b"tokenizer.ggml.eot_token_id", b"tokenizer.ggml.eom_token_id",
    b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.padding_token_id", b"tokenizer.ggml.unknown_token_id",
    b"tokenizer.ggml.add_bos_token", b"tokenizer.chat_template", b"tokenizer.chat_templates",
    b"tokenizer.chat_template.tool_use",
)  # fmt: skip
TENSOR_NAMES = (
    b"", b"token_embd.weight", b"output.weight", b"rope_freqs.weight", b"blk.1.attn_q.weight", b"blk.-1.attn_q.weight",
    b"blk.1000000000000.attn_v.weight", b"blk.0.attn_v.bias", b"blk.00.ffn_up.weight", b"blk.0.attn_q.weight.lora_a",
    b"x" * 63, b"x" * 64, b"\xff", b"a\nb", b"../x",
)  # fmt: skip
JINJA = (
    "{% for a in range(10**9) %}{% endfor %}", "{{ 'x' * 10**9 }}", "{{ 'x' * 10**6 }}", "{{ messages[99].content }}",
    "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no\n' * 200) }}", "{% include 'x' %}", "{{ 1/0 }}", "{{", "{%",
    "{{ '\\ud800' }}", "{{ 'a '*8000000 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 9**9**9 }}",
    "{{ messages | tojson(indent=99999999) }}", "{{ strftime_now('%') }}", "{{ '%999999999d' % 1 }}", "{# ", "\0",
    "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
)  # fmt: skip

Mutation = Callable[[Document, Random], None]


def _value(draw: Random, kind: int) -> Any:
    if kind == STRING:
        return draw.choice(TEXTS)
    return draw.choice(FLOATS) if kind in (F32, F64) else draw.choice(NUMBERS)


def _any_pair(draw: Random, key: bytes) -> Pair:
    kind = draw.choice((U8, U32, I32, F32, BOOL, BOOL, STRING, STRING, ARRAY, ARRAY, U64, F64))
    if kind != ARRAY:
        return Pair(key, kind, draw.randrange(2) if kind == BOOL and draw.random() < 0.9 else _value(draw, kind))
    of = draw.choice((U8, U32, I32, F32, STRING, U64, F64))
    return Pair(key, ARRAY, [_value(draw, of) for _ in range(draw.choice((0, 1, 2, 300)))], of)


def other_type(document: Document, draw: Random) -> None:
    at = draw.randrange(len(document.pairs))
    document.pairs[at] = _any_pair(draw, document.pairs[at].key)


def other_value(document: Document, draw: Random) -> None:
    pair = draw.choice(document.pairs)
    if pair.kind != ARRAY:
        pair.value = _value(draw, pair.kind)


def known_key(document: Document, draw: Random) -> None:
    key = draw.choice(KEYS)
    document.pairs = [pair for pair in document.pairs if pair.key != key]
    document.pairs.append(_any_pair(draw, key))


def drop_pair(document: Document, draw: Random) -> None:
    del document.pairs[draw.randrange(len(document.pairs))]


def rename_pair(document: Document, draw: Random) -> None:
    draw.choice(document.pairs).key = draw.choice((*TEXTS, *KEYS))


def swap_values(document: Document, draw: Random) -> None:
    one, other = draw.choice(document.pairs), draw.choice(document.pairs)
    one.key, other.key = other.key, one.key


def array_claim(document: Document, draw: Random) -> None:
    arrays = [pair for pair in document.pairs if pair.kind == ARRAY]
    if arrays:
        pair = draw.choice(arrays)
        pair.claims = draw.choice((*NUMBERS, len(pair.value) + 1, max(0, len(pair.value) - 1))) % 2**64


def array_element(document: Document, draw: Random) -> None:
    arrays = [pair for pair in document.pairs if pair.kind == ARRAY and pair.value]
    if not arrays:
        return
    pair = draw.choice(arrays)
    for _ in range(draw.choice((1, 1, 3, 40))):
        at = draw.randrange(len(pair.value))
        act = draw.randrange(5)
        if act == 0:
            pair.value[at] = _value(draw, pair.of)
        elif act == 1:
            pair.value[at] = pair.value[draw.randrange(len(pair.value))]
        elif act == 2:
            pair.value.insert(at, pair.value[draw.randrange(len(pair.value))])
        elif act == 3 and len(pair.value) > 1:
            del pair.value[at]
        elif pair.of == STRING:
            word = pair.value[at]
            cut = draw.randrange(len(word) + 1)
            pair.value[at] = draw.choice(
                (word[:cut], word[:cut] + b" " + word[cut:], (word * 300)[:100_000], word + b"\xff")
            )


def vocabulary(document: Document, draw: Random) -> None:
    """Tokens, kinds and merges that belong together, one of them hardly as it should be."""
    tokens, kinds, merges = (document.pair(b"tokenizer.ggml." + name) for name in (b"tokens", b"token_type", b"merges"))
    if not (tokens and kinds and merges and tokens.of == merges.of == STRING and kinds.kind == ARRAY):
        return
    letters = [
        b"a",
        b"b",
        "Ġ".encode(),
        "é".encode(),
        b"<|x",
        b"a" * 300,
        b"",
        b"b c",
        b"<" * draw.choice((5, 256, 257)),
    ]
    for _ in range(draw.choice((1, 4, 300))):
        left, right = draw.choice(letters), draw.choice(letters)
        if draw.random() < 0.9:
            tokens.value.append(left + right + b"%d" % len(tokens.value) * draw.randrange(2))
            kinds.value.append(draw.choice((1, 3, 4, 2, 5, 6, 0, 99)))
        if draw.random() < 0.7:
            merges.value.append(left + draw.choice((b" ", b" ", b"", b"  ")) + right)


def tensor(document: Document, draw: Random) -> None:
    if not document.tensors:
        return
    at = draw.randrange(len(document.tensors))
    one = document.tensors[at]
    act = draw.randrange(8)
    if act == 0:
        one.name = draw.choice(TENSOR_NAMES)
    elif act == 1:
        one.dimensions[draw.randrange(len(one.dimensions))] = draw.choice((*NUMBERS, 128, 257))
    elif act == 2:
        one.dimensions = [draw.choice((1, 32, 256, 2**32)) for _ in range(draw.choice((0, 1, 2, 3, 4, 5)))]
    elif act == 3:
        one.kind = draw.choice((*range(42), 2**31))
    elif act == 4:
        one.offset = draw.choice((*NUMBERS, one.offset + 32, len(document.data)))
    elif act == 5:
        one.claims = draw.choice((0, 1, 5, 2**31))
    elif act == 6:
        del document.tensors[at]
    else:
        document.tensors.append(Tensor(draw.choice(TENSOR_NAMES), list(one.dimensions), one.kind, one.offset))


def head(document: Document, draw: Random) -> None:
    act = draw.randrange(4)
    if act == 0:
        document.version = draw.choice((0, 1, 2, 4, 3 << 24, 2**32 - 1))
    elif act == 1:
        document.magic = draw.choice((b"GGML", b"<htm", b"\0\0\0\0", b"vers", b"GGU\xff"))
    else:
        document.counts[act - 2] = draw.choice((0, 1, 5, 40, 2**31, 2**64 - 1))


def template(document: Document, draw: Random) -> None:
    pair = document.pair(b"tokenizer.chat_template")
    if pair is None or pair.kind != STRING:
        return
    source = pair.value.decode("utf-8", "replace")
    cut = draw.randrange(len(source) + 1)
    pair.value = draw.choice(
        (
            source[:cut],
            source[:cut] + draw.choice(JINJA) + source[cut:],
            draw.choice(JINJA),
            source + draw.choice(JINJA),
            source[:cut] + source[max(0, cut - draw.randrange(60)) :],
        )
    ).encode("utf-8", "replace")


def named_templates(document: Document, draw: Random) -> None:
    """Templates with names, many or long, and perhaps none without."""
    own = document.pair(b"tokenizer.chat_template")
    if own is None:
        return
    for number in range(draw.choice((1, 3, 300))):
        name = draw.choice((b"tool_use", b"default", b"%d" % number, b"n" * 600, "é\u202e\u3000".encode(), b""))
        document.pairs.append(Pair(b"tokenizer.chat_template." + name + b"%d" % number, STRING, own.value))
    if draw.random() < 0.5:
        document.pairs.remove(own)


def data(document: Document, draw: Random) -> None:
    """Bytes of weights: random ones, or a half that is infinite, NaN or as large as halves get, here and there."""
    size = len(document.data)
    for _ in range(draw.choice((1, 10, 200)) if size > 8 else 0):
        at = draw.randrange(size - 4) & ~1
        what = draw.choice((b"\x00\x7c", b"\x01\x7e", b"\xff\x7b", b"\xff\xff\x7f\x7f", draw.randbytes(4)))
        document.data[at : at + len(what)] = what


# Function, and how often it is taken.
MUTATIONS: tuple[tuple[Mutation, int], ...] = (
    (other_type, 4), (other_value, 4), (known_key, 5), (drop_pair, 2), (rename_pair, 2), (swap_values, 1),
    (array_claim, 1), (array_element, 5), (vocabulary, 4), (tensor, 5), (head, 1), (template, 3),
    (named_templates, 1), (data, 4),
)  # fmt: skip


def mutated(document: Document, draw: Random) -> bytes:
    """The bytes of a file with one to four mistakes, in its parts or in its bytes; the document is changed."""
    functions, often = zip(*MUTATIONS, strict=True)
    for mutation in draw.choices(functions, often, k=draw.choice((1, 1, 2, 4))):
        if document.pairs:
            mutation(document, draw)
    header = bytearray(document.header())
    if draw.random() < 0.1:
        for _ in range(draw.choice((1, 3, 30))):
            header[draw.randrange(len(header))] = draw.randrange(256)
    whole = bytes(header) + bytes(document.data)
    return whole[: draw.randrange(len(whole))] if draw.random() < 0.03 else whole
