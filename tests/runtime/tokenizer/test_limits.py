"""What a tokenizer does with files and texts that are damaged, strange or far too large."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import tokenizers
from tokenizer_file import a_file

from psigraph.ir.errors import ModelFileError, UnsupportedModelError, UsageError
from psigraph.runtime.tokenizer import special_tokens, splits
from psigraph.runtime.tokenizer.bpe import Tokenizer
from psigraph.runtime.tokenizer.end_tokens import end_tokens
from psigraph.runtime.tokenizer.panics import as_error
from psigraph.runtime.tokenizer.special_tokens import SpecialTokens

MILLIONS = {"spaces": " " * 10_000_000, "tabs": "\t" * 3_000_000, "one word": "a" * 3_000_000, "dots": "." * 2_000_000}


def warned(call):
    """The warnings of a call, and its result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return [str(one.message) for one in caught], result


@pytest.mark.parametrize("name", MILLIONS)
def test_a_run_that_the_library_panics_at_or_chews_for_ever_is_refused_before(tokenizer, name, capfd):
    with pytest.raises(UsageError, match="run of more than 1,048,576 characters"):
        tokenizer.encode(MILLIONS[name])
    assert capfd.readouterr().err == ""


def test_a_text_is_not_read_far_beyond_the_context(tokenizer):
    text = "One word after the other, 16 MB of them. " * 400_000
    with pytest.raises(UsageError, match=r"context of 2,048 tokens: its first 6\d,\d\d\d of 16,400,000 characters"):
        tokenizer.encode(text, most=2048)
    with pytest.raises(UsageError, match="context of 2,048 tokens"):
        tokenizer.encode("<|im_end|>a" * 1_000_000, most=2048)
    short = "word " * 3000  # one piece: whoever asks counts them all, and says how many they are
    assert len(tokenizer.encode(short, most=2048)) > 2048


@pytest.mark.parametrize("rule", splits.SPLITS)
def test_a_text_in_pieces_has_the_ids_of_the_whole(metadata, rule, monkeypatch):
    pairs = [left + right for left in "ĠĊĉ.é" for right in "ĠĊĉ.é"]
    pairs = [pair for pair in pairs if pair not in set(metadata["tokenizer.ggml.tokens"])]
    more = {
        "tokens": [*metadata["tokenizer.ggml.tokens"], *pairs],
        "token_type": np.append(metadata["tokenizer.ggml.token_type"], [1] * len(pairs)),
        "merges": [*metadata["tokenizer.ggml.merges"], *map(" ".join, pairs)],  # so that each split shows in the ids
    }
    tokenizer = Tokenizer(a_file(metadata, pre=rule, **more))
    draw = random.Random(7)
    letters = "aZ's 't\t\n\r.,!?19 é汉。，かe\u0301\u093e'\u2009²ſ_-"
    texts = ["".join(draw.choices(letters, k=draw.randrange(200))) for _ in range(500)]
    whole = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(splits, "PIECE", 3)
    assert max(len(list(splits.pieces(text))) for text in texts) > 10
    for text, ids in zip(texts, whole, strict=True):
        assert "".join(splits.pieces(text)) == text
        assert tokenizer.encode(text) == ids, ascii(text)


def test_special_tokens_are_found_as_the_library_finds_them():
    draw = random.Random(11)
    for _ in range(200):
        words = {"".join(draw.choices("ab<|", k=draw.randrange(1, 6))) for _ in range(draw.randrange(6))}
        ids = {word: 1 + index for index, word in enumerate(sorted(words))}
        encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unknown>": 0}, unk_token="<unknown>"))
        encoder.add_special_tokens([tokenizers.AddedToken(word, normalized=False) for word in sorted(words)])
        text = "".join(draw.choices("ab<|c", k=40))
        wanted = [part for part in encoder.encode(text).offsets if text[slice(*part)] in ids]
        at, found = 0, []
        for part in SpecialTokens(ids).split(text):
            length = len(part) if isinstance(part, str) else len(sorted(words)[part - 1])
            if isinstance(part, int):
                assert text[at : at + length] == sorted(words)[part - 1]
                found.append((at, at + length))
            at += length
        assert found == wanted, (text, words)
        assert at == len(text)


def test_a_file_and_a_text_made_for_each_other_do_not_take_for_ever(monkeypatch):
    """256 lengths are looked for at every letter."""
    monkeypatch.setattr(special_tokens, "MOST_PROBES", 255_000)
    found = SpecialTokens({"<" * length + "!": length for length in range(1, 256)})
    assert list(found.split("<" * 900)) == ["<" * 900]
    with pytest.raises(UsageError, match="1,000 of its 4,000 characters took 255,000 looks"):
        list(found.split("<" * 4000))


@pytest.mark.parametrize("raised", [BaseException, Exception])
def test_a_panic_that_nobody_foresaw_is_one_line(raised):
    kind = type("PanicException", (raised,), {})

    def broken(what):
        return UsageError(f"broken: {what}")

    with (
        pytest.raises(UsageError, match=r"^broken: a\\nb x+$") as refused,
        as_error(lambda s: UsageError(f"broken: {s}")),
    ):
        raise kind("a\nb " + "x" * 1000)
    assert len(str(refused.value)) < 200
    with pytest.raises(KeyboardInterrupt), as_error(UsageError):
        raise KeyboardInterrupt


def test_a_panic_inside_the_library_is_an_error_of_the_text(tokenizer, monkeypatch):
    monkeypatch.setattr(splits, "LONGEST_RUN", 1 << 30)
    with pytest.raises(UsageError, match="cannot be made into tokens: Onig"):
        tokenizer.encode("\t" * 10_000_000)


@pytest.mark.parametrize("name", ["eot", "eom", "padding", "bos"])
def test_an_id_that_ends_nothing_may_be_out_of_range(metadata, name):
    told, ends = warned(lambda: end_tokens(a_file(metadata, **{f"{name}_token_id": 4096})))
    assert ends[0] == 4095
    assert told == [f"tokenizer.ggml.{name}_token_id is 4096, and ids are 0 to 4095: it is not used"]
    told, tokenizer = warned(lambda: Tokenizer(a_file(metadata, **{f"{name}_token_id": 2**40})))
    assert len(told) == 1
    assert tokenizer.encode("a") == Tokenizer(a_file(metadata)).encode("a")


def test_a_bos_that_is_used_must_be_a_token(metadata):
    with pytest.raises(ModelFileError, match="bos_token_id: 4096 is no token id"):
        warned(lambda: Tokenizer(a_file(metadata, bos_token_id=4096, add_bos_token=True)))


def test_several_empty_tokens_warn_and_no_text_is_made_into_them(metadata):
    tokens = list(metadata["tokenizer.ggml.tokens"])
    unmade = [index for index in range(256, 4093) if len(tokens[index]) > 9][:3]
    for index in unmade:
        tokens[index] = ""
    known = set(tokens)
    merges = [merge for merge in metadata["tokenizer.ggml.merges"] if {*merge.split(), merge.replace(" ", "")} <= known]
    told, tokenizer = warned(lambda: Tokenizer(a_file(metadata, tokens=tokens, merges=merges)))
    assert told == ["3 tokens have no text: no text becomes one of them"]
    assert tokenizer.decode(unmade) == ""
    assert tokenizer.decode(tokenizer.encode("The Constitution")) == "The Constitution"


@pytest.mark.parametrize(("pre", "told"), [(None, "is missing"), ("default", "is 'default'")])
def test_a_qwen_vocabulary_that_tells_no_rule_gets_the_nearest(metadata, tokenizer, pre, told):
    messages, found = warned(lambda: Tokenizer(a_file(metadata, pre=pre)))
    assert messages == [f"tokenizer.ggml.pre {told}: texts are split as Qwen2's are, which is near"]
    text = "It's 2026: e\u0301  \n\n a?"
    assert found.encode(text) == tokenizer.encode(text)
    tokens = [token.replace("im_start", "begin") for token in metadata["tokenizer.ggml.tokens"]]
    with pytest.raises(UnsupportedModelError, match=f"tokenizer.ggml.pre {told}.*--prompt-token-ids"):
        Tokenizer(a_file(metadata, pre=pre, tokens=tokens))


def test_qwen35_keeps_marks_in_their_word(metadata):
    """The rule of Qwen3.5's tokenizer.json, held against the library's own split by it."""
    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(rule), behavior="isolated")
    text = "e\u0301te\u0301 का It's 12"
    words = [word for word, _ in split.pre_tokenize_str(text)]
    assert words == ["e\u0301te\u0301", " का", " It", "'s", " ", "1", "2"]
    tokenizer = Tokenizer(a_file(metadata, pre="qwen35"))
    assert tokenizer.encode(text) == [index for word in words for index in tokenizer.encode(word)]


def test_bos_comes_once(metadata):
    tokenizer = Tokenizer(a_file(metadata, add_bos_token=True))
    plain = tokenizer.encode("Hi")
    assert plain[0] == 4093
    assert plain[1] != 4093
    assert tokenizer.encode("<|endoftext|>Hi") == plain
    assert tokenizer.encode("<|endoftext|><|endoftext|>Hi")[:2] == [4093, 4093]  # who writes it twice has it twice


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("tokens", [""] * 262_145, "tokenizer.ggml.tokens has 262,145 strings; up to 262,144 are supported"),
        ("merges", ["a b"] * 196_609, "tokenizer.ggml.merges has 196,609 strings; up to 196,608 are supported"),
    ],
)
def test_vocabularies_of_more_than_any_qwen_are_refused(metadata, name, value, says):
    with pytest.raises(UnsupportedModelError, match=says):
        Tokenizer(a_file(metadata, token_type=None, **{name: value}))


def test_a_special_token_of_a_page_is_refused(metadata):
    tokens = [*metadata["tokenizer.ggml.tokens"], "<" * 257]
    kinds = np.append(metadata["tokenizer.ggml.token_type"], 3)
    with pytest.raises(UnsupportedModelError, match="tokens: token 4096 is a special one of 257 letters; up to 256"):
        Tokenizer(a_file(metadata, tokens=tokens, token_type=kinds))
