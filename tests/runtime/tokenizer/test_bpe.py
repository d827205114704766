"""Text to ids and back on the tiny model's vocabulary; the oracle is its own tokenizer.json."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizer_file import a_file

from psigraph.ir.errors import ModelFileError, UnsupportedModelError, UsageError
from psigraph.runtime.tokenizer.bpe import Tokenizer
from psigraph.runtime.tokenizer.byte_letters import BYTE_LETTERS, BYTE_OF_LETTER
from psigraph.runtime.tokenizer.end_tokens import BY_TEMPLATE, BY_TEXT, END_TEXTS, end_tokens, named_end_tokens

TINY = Path(__file__).parents[3] / "fixtures" / "tiny"

PIECES = [
    "a", "the ", "Senate", "é", "e\u0301", " ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u3000",
    "1", "2026", "²", "😀", "👩‍👩‍👧", "汉字",
    "'s", "'LL", "’s", "...", "!?", "<|im_end|>", "<|im_start|>", "<|im_", "|>", "\0", "\ufeff", "ß", "İ", "ſ",
]  # fmt: skip


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


# What a file says of its end tokens beside <|im_end|> (4095), <|im_start|> (4094) and <|endoftext|> (4093), all control
# tokens -> the ids that end a text, with the keys or "its text" for each. eos = pad = <|endoftext|> is what a fine-tune
# of a base model carries, whose turns end with <|im_end|>.
EOS, EOT, ALL, TEXT = "eos_token_id", "eot_token_id", "eos_token_ids", BY_TEXT
ENDS = [
    ({}, {4095: [EOS, TEXT], 4093: [TEXT]}),
    ({"eos_token_id": 4093}, {4093: [EOS, TEXT], 4095: [TEXT]}),
    ({"eos_token_id": None, "padding_token_id": None, "bos_token_id": None}, {4093: [TEXT], 4095: [TEXT]}),
    ({"padding_token_id": 5, "bos_token_id": 4094}, {4095: [EOS, TEXT], 4093: [TEXT]}),
    ({"eot_token_id": 4094}, {4095: [EOS, TEXT], 4094: [EOT], 4093: [TEXT]}),
    ({"eos_token_ids": np.array([4094, 4095])}, {4095: [EOS, ALL, TEXT], 4094: [ALL], 4093: [TEXT]}),
    ({"eos_token_ids": [17]}, {4095: [EOS, TEXT], 17: [ALL], 4093: [TEXT]}),
]


@pytest.mark.parametrize(("changes", "wanted"), ENDS)
def test_end_tokens_are_those_that_keys_name_and_those_whose_text_says_so(metadata, changes, wanted):
    file = a_file(metadata, **changes)
    found = {
        end.id: [source.removeprefix("tokenizer.ggml.") for source in end.sources] for end in named_end_tokens(file)
    }
    assert found == wanted
    assert Tokenizer(file).end_tokens == end_tokens(file) == tuple(wanted)


@pytest.mark.parametrize("text", sorted(END_TEXTS))
def test_every_end_of_a_text_is_one_as_a_control_token_and_as_no_other(metadata, text):
    types, tokens = metadata["tokenizer.ggml.token_type"].copy(), list(metadata["tokenizer.ggml.tokens"])
    tokens[4000] = text
    for kind, ends in ((3, True), (1, False), (4, False)):
        types[4000] = kind
        assert (4000 in end_tokens(a_file(metadata, tokens=tokens, token_type=types))) is ends
    # A file that tells no kinds has no control tokens, but means the same by its texts.
    assert 4000 in end_tokens(a_file(metadata, tokens=tokens, token_type=None))


def test_what_a_template_writes_after_an_answer_ends_it_too(metadata):
    types, tokens = metadata["tokenizer.ggml.token_type"].copy(), list(metadata["tokenizer.ggml.tokens"])
    tokens[4000], types[4000] = "<|over", 4
    tokens[4001], types[4001] = "<|over|>", 4
    file = a_file(metadata, tokens=tokens, token_type=types)
    assert [end.id for end in named_end_tokens(file)] == [4095, 4093]
    over = named_end_tokens(file, "\n<|over|>\n<|im_start|>user")[-1]
    assert (over.id, over.text, over.sources) == (4001, "<|over|>", (BY_TEMPLATE,))
    assert named_end_tokens(file, "<|im_end|>")[0].sources[-1] == BY_TEMPLATE
    assert named_end_tokens(file, "\nUser: ") == named_end_tokens(file)
    with pytest.raises(ModelFileError, match=r"eos_token_id: 4096 is no token id; ids are 0 to 4095 \(byte 77\)"):
        end_tokens(a_file(metadata, eos_token_id=4096))


def test_a_file_may_ask_for_a_first_token(metadata):
    asking = Tokenizer(a_file(metadata, add_bos_token=True))
    once = asking.encode("a")
    assert once[0] == 4093
    assert asking.encode("<|endoftext|>a") == once  # a chat template writes it, too
    assert asking.encode("a<|endoftext|>")[-1] == 4093
    assert (asking.writes_start("a"), asking.writes_start("<|endoftext|>a")) == ("", "<|endoftext|>")
    assert Tokenizer(a_file(metadata)).writes_start("<|endoftext|>a") == ""
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
        ("eos_token_id", lambda _: -1),
        ("eos_token_id", lambda _: "0"),
        ("eos_token_ids", lambda _: 7),
        ("eos_token_ids", lambda _: np.array([4096])),
        ("eos_token_ids", lambda _: np.array([1.5])),
    ],
)
def test_broken_tokenizers_are_refused_by_key_and_byte(metadata, name, change):
    key = f"tokenizer.ggml.{name}"
    with pytest.raises(ModelFileError) as refused:
        Tokenizer(a_file(metadata, **{name: change(metadata.get(key))}))
    assert refused.value.field == key
    assert refused.value.offset == 77
    assert "\n" not in str(refused.value)


def test_byte_letters_are_a_bijection():
    assert len(BYTE_LETTERS) == len(BYTE_OF_LETTER) == 256
    assert sorted(BYTE_OF_LETTER.values()) == list(range(256))
    assert BYTE_OF_LETTER["Ġ"] == 0x20
    assert BYTE_OF_LETTER["Ċ"] == 0x0A
