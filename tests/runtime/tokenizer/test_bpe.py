"""Text to ids and back on the tiny model's vocabulary; the oracle is its own tokenizer.json."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

from psigraph.ir.errors import ModelFileError, UnsupportedModelError, UsageError
from psigraph.runtime.gguf.file import open_gguf
from psigraph.runtime.tokenizer.bpe import Tokenizer
from psigraph.runtime.tokenizer.byte_letters import BYTE_LETTERS, BYTE_OF_LETTER
from psigraph.runtime.tokenizer.end_tokens import end_tokens

TINY = Path(__file__).parents[3] / "fixtures" / "tiny"

PIECES = [
    "a", "the ", "Senate", "é", "e\u0301", " ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u3000",
    "1", "2026", "²", "😀", "👩‍👩‍👧", "汉字",
    "'s", "'LL", "’s", "...", "!?", "<|im_end|>", "<|im_start|>", "<|im_", "|>", "\0", "\ufeff", "ß", "İ", "ſ",
]  # fmt: skip


@pytest.fixture(scope="module")
def metadata():
    with open_gguf(TINY / "tiny-qwen3-q4_k_m.gguf") as file:
        return file.metadata


def a_file(metadata, **changes):
    """What a Tokenizer reads of a model file; a change to None removes the key `tokenizer.ggml.<name>`."""
    changed = metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    kept = {key: value for key, value in changed.items() if value is not None}
    return SimpleNamespace(metadata=kept, value_offsets=dict.fromkeys(kept, 77))


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return Tokenizer(a_file(metadata))


@pytest.fixture(scope="module")
def reference():
    return tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))


def random_text(generator):
    """Pieces that have tripped tokenizers, and any character of Unicode but surrogates."""

    def character():
        return chr(generator.choice([generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)]))

    return "".join(
        generator.choice(PIECES) if generator.random() < 0.7 else character() for _ in range(generator.randrange(14))
    )


def test_ten_thousand_texts_give_the_ids_of_tokenizer_json_and_come_back(tokenizer, reference):
    generator = random.Random(20261123)
    for _ in range(10_000):
        text = random_text(generator)
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids, ascii(text)
        assert tokenizer.decode_bytes(ids) == text.encode(), ascii(text)


def test_reference_prompts_give_their_ids(tokenizer):
    prompts = json.loads((TINY / "reference_greedy.json").read_text())["prompts"]
    for prompt in prompts.values():
        assert tokenizer.encode(prompt["text"]) == prompt["ids"]
        assert tokenizer.decode(prompt["ids"]) == prompt["text"]


def test_every_token_decodes_to_its_own_bytes(tokenizer, reference, metadata):
    """Any sequence of ids, text or not: its bytes are those of its tokens, one after the other."""
    each = [tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size)]
    assert sorted(each[:256]) == [bytes([byte]) for byte in range(256)]
    assert all(each)
    generator = random.Random(3)
    for _ in range(500):
        ids = [generator.randrange(tokenizer.vocab_size) for _ in range(generator.randrange(20))]
        assert tokenizer.decode_bytes(ids) == b"".join(each[index] for index in ids)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


def test_a_stream_never_gives_half_a_character_and_loses_nothing(tokenizer):
    generator = random.Random(4)
    for _ in range(500):
        ids = [generator.randrange(tokenizer.vocab_size) for _ in range(generator.randrange(20))]
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)
    stream = tokenizer.stream()
    emoji = tokenizer.encode("😀")
    assert len(emoji) > 1
    assert [stream.push(index) for index in emoji] == [""] * (len(emoji) - 1) + ["😀"]
    assert stream.finish() == ""
    assert stream.push(emoji[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(tokenizer.encode("a")[0]) == "a"


def test_special_tokens_can_be_left_out(tokenizer):
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>"
    assert tokenizer.decode(ids, skip_special=True) == "user\nHi"
    stream = tokenizer.stream(skip_special=True)
    assert "".join(map(stream.push, ids)) + stream.finish() == "user\nHi"


def test_text_is_not_normalized(tokenizer):
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "e\u0301"
    assert tokenizer.encode("e\u0301") != tokenizer.encode("\u00e9")


def test_end_tokens_come_from_the_file(metadata):
    def ends(**changes):
        return end_tokens(a_file(metadata, **changes))

    assert ends() == (4095, 4093)
    assert Tokenizer(a_file(metadata)).end_tokens == (4095, 4093)
    assert ends(padding_token_id=None, bos_token_id=None) == (4095,)
    assert ends(padding_token_id=5, bos_token_id=4094) == (4095,)
    assert ends(eot_token_id=4094) == (4095, 4094, 4093)
    assert ends(eos_token_id=None, padding_token_id=None, bos_token_id=None) == ()
    with pytest.raises(ModelFileError, match=r"eos_token_id: 4096 is no token id; ids are 0 to 4095 \(byte 77\)"):
        ends(eos_token_id=4096)


def test_a_file_may_ask_for_a_first_token(metadata):
    assert Tokenizer(a_file(metadata, add_bos_token=True)).encode("a")[0] == 4093
    assert Tokenizer(a_file(metadata, add_bos_token=None)).encode("a")[0] != 4093


def test_user_defined_tokens_are_found_in_text_and_unused_ones_are_not(metadata):
    types = metadata["tokenizer.ggml.token_type"].copy()
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[4000], types[4000] = "<think here>", 4
    tokens[4001], types[4001] = "[PAD1]", 5
    kept = [merge for merge in metadata["tokenizer.ggml.merges"] if merge.replace(" ", "") in set(tokens)]
    tokenizer = Tokenizer(a_file(metadata, tokens=tokens, token_type=types, merges=kept))
    assert tokenizer.encode("a<think here>b")[1] == 4000
    assert tokenizer.decode([4000, 4001]) == "<think here>[PAD1]"
    assert tokenizer.decode([4000], skip_special=True) == "<think here>"
    assert 4001 not in tokenizer.encode("[PAD1]")


def test_wrong_ids_and_wrong_text_are_refused(tokenizer):
    for index in (-1, 4096):
        with pytest.raises(UsageError, match=f"token id {index} .* 0 to 4095"):
            tokenizer.decode([index])
    with pytest.raises(UsageError, match="character 1"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model", None, "tokenizer.ggml.model is missing"),
        ("model", "llama", "tokenizer.ggml.model is 'llama'"),
        ("pre", "llama-bpe", "tokenizer.ggml.pre is 'llama-bpe'"),
        ("tokens", None, "tokenizer.ggml.tokens is missing"),
        ("merges", None, "tokenizer.ggml.merges is missing"),
    ],
)
def test_unsupported_tokenizers_are_refused_by_key(metadata, name, value, says):
    with pytest.raises(UnsupportedModelError) as refused:
        Tokenizer(a_file(metadata, **{name: value}))
    assert says in str(refused.value)
    assert "--prompt-token-ids" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens", lambda tokens: tokens[:-1] + tokens[:1]),
        ("tokens", lambda tokens: ["\udcff", *tokens[1:]]),
        ("tokens", lambda tokens: ["nothing", *tokens[1:]]),
        ("tokens", lambda _: []),
        ("tokens", lambda _: 7),
        ("token_type", lambda types: types[:-1]),
        ("token_type", lambda _: "normal"),
        ("token_type", lambda types: types.astype(np.float32) * np.float32("nan")),
        ("token_type", lambda types: types > 0),
        ("model", lambda _: np.array([1, 2])),
        ("model", lambda _: ["gpt2"]),
        ("model", lambda _: True),
        ("pre", lambda _: ["qwen2"]),
        ("pre", lambda _: np.array([1, 2])),
        ("tokens", lambda _: np.arange(4096)),
        ("merges", lambda _: "a b"),
        ("add_bos_token", lambda _: 1),
        ("add_bos_token", lambda _: np.array([True, False])),
        ("eos_token_id", lambda _: True),
        ("eos_token_id", lambda _: 2.0),
        ("padding_token_id", lambda _: True),
        ("bos_token_id", lambda _: np.array([1, 2])),
        ("merges", lambda merges: ["ab", *merges]),
        ("merges", lambda merges: ["a b c", *merges]),
        ("merges", lambda merges: [" a", *merges]),
        ("merges", lambda merges: ["absent also-absent", *merges]),
        ("merges", lambda merges: [*merges, f"{merges[0].replace(' ', '')} <|endoftext|>"]),  # the library panics
        ("bos_token_id", lambda _: "0"),
    ],
)
def test_broken_tokenizers_are_refused_by_key_and_byte(metadata, name, change):
    key = f"tokenizer.ggml.{name}"
    with pytest.raises(ModelFileError) as refused:
        Tokenizer(a_file(metadata, **{name: change(metadata[key])}))
    assert refused.value.field == key
    assert refused.value.offset == 77
    assert "\n" not in str(refused.value)


def test_byte_letters_are_a_bijection():
    assert len(BYTE_LETTERS) == len(BYTE_OF_LETTER) == 256
    assert sorted(BYTE_OF_LETTER.values()) == list(range(256))
    assert BYTE_OF_LETTER["Ġ"] == 0x20
    assert BYTE_OF_LETTER["Ċ"] == 0x0A
