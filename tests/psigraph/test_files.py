"""Files as people have them: padded, slightly damaged, of other kinds, hostile in a field."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_gguf import changed_gguf
from nano import LAYER

from psigraph.build import open_model
from psigraph.cli import run
from psigraph.ir.errors import ModelFileError, PsigraphError, UnsupportedModelError, UsageError
from psigraph.options import SessionOptions
from psigraph.rope_scaling import RopeScaling
from psigraph.runtime.gguf.file import open_gguf
from psigraph.runtime.gguf.write import pair
from psigraph.runtime.synth import model as synth
from psigraph.runtime.tokenizer.bpe import Tokenizer
from psigraph.session import open_session
from psigraph.text.generation import Decoder

GGML = "tokenizer.ggml."


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of one layer, with a few merges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synth.SIZES, "nano", LAYER)
        return synth.write_synth(
            tmp_path_factory.mktemp("nano") / "nano.gguf", "nano", "q4_k_m", 1, vocab=synth.SMALLEST + 64
        )


@pytest.fixture
def changed(nano: Path, tmp_path: Path) -> Any:
    """changed(key=pair or None, ...) -> path; keys of tensors are given by `tensors`."""

    def make(pairs: dict[str, bytes | None] | None = None, **more: Any) -> Path:
        return changed_gguf(nano, tmp_path / "changed.gguf", pairs, **more)

    return make


def tokens_of(path: Path) -> list[str]:
    with open_gguf(path) as file:
        return list(file.metadata[f"{GGML}tokens"])


def with_rows(path: Path, extra: int) -> dict[str, Any]:
    """The embedding with rows more or less, those that are new larger than all others."""
    with open_gguf(path) as file:
        info = file.tensors["token_embd.weight"]
        rows = file.read(info.name).reshape(info.shape[0], -1)
    rows = np.vstack([rows, np.tile(rows[-1:], (extra, 1))]) if extra > 0 else rows[:extra]
    return {info.name: (info.dtype, (len(rows), info.shape[1]), rows.tobytes())}


# --- rows and tokens ---


@pytest.mark.parametrize("backend", ["cpu", "host"])
def test_rows_without_a_token_are_left_out(nano: Path, changed: Any, backend: str) -> None:
    padded = changed(tensors=with_rows(nano, 40))
    found = []
    for path in (nano, padded):
        with open_session(path, SessionOptions(backend, ctx=16, outputs=("logits",))) as session:
            assert session.vocabulary == len(tokens_of(nano))
            found.append(session.forced_logits([1, 2, 3]))
    np.testing.assert_array_equal(*found)


def test_rows_of_a_head_of_its_own_are_left_out(nano: Path, changed: Any) -> None:
    ((_, head),) = with_rows(nano, 24).items()
    with open_session(changed(tensors={"output.weight": head}), SessionOptions("cpu", outputs=("logits",))) as session:
        assert session.forced_logits([1]).shape == (1, len(tokens_of(nano)))
        assert session.model.padding == {"output.weight": 24}


def test_advice_is_only_what_works(nano: Path) -> None:
    for ctx, advised in ((16, True), (64, False)):
        with open_session(nano, SessionOptions("cpu", ctx=ctx)) as session:
            with pytest.raises(UsageError) as caught:
                Decoder(session).run([1] * 65)
            assert ("--ctx" in str(caught.value)) == advised


def test_an_id_without_a_token_is_no_id_and_inspect_says_so(
    nano: Path, changed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    count = len(tokens_of(nano))
    padded = changed(tensors=with_rows(nano, 40))
    assert run(["generate", str(padded), "--backend", "cpu", "--prompt-token-ids", str(count)]) == 2
    assert f"ids are 0 to {count - 1}" in capsys.readouterr().err
    assert run(["inspect", str(padded)]) == 0
    assert "40 of token_embd.weight: rows without a token" in capsys.readouterr().out
    assert run(["inspect", str(nano)]) == 0
    assert "padding" not in capsys.readouterr().out


def test_fewer_rows_than_tokens_are_refused_at_load(nano: Path, changed: Any) -> None:
    short = changed(tensors=with_rows(nano, -1))
    count = len(tokens_of(nano))
    with pytest.raises(ModelFileError, match=rf"changed\.gguf.*{count} tokens, and token_embd has only {count - 1}"):
        open_model(short)


# --- harmless damage ---

HARMLESS = {
    "padding": ({f"{GGML}padding_token_id": pair(f"{GGML}padding_token_id", "u32", 999_999)}, "999999, and ids are"),
    "bos": ({f"{GGML}bos_token_id": pair(f"{GGML}bos_token_id", "u32", 999_999)}, "bos_token_id is 999999"),
    "eot": ({f"{GGML}eot_token_id": pair(f"{GGML}eot_token_id", "u32", 999_999)}, "eot_token_id is 999999"),
    "words": ({"general.name": pair("general.name", "str", b"n\xff")}, "general.name is not UTF-8"),
    "theta": ({"qwen3.rope.freq_base": None}, "qwen3.rope.freq_base is missing: 10,000 is taken"),
    "heads": (
        {"qwen3.attention.head_count": pair("qwen3.attention.head_count", "[i32]", [2])},
        "qwen3.attention.head_count is an array; each of its numbers is 2",
    ),
    "kv heads": (
        {"qwen3.attention.head_count_kv": pair("qwen3.attention.head_count_kv", "[u32]", [1])},
        "qwen3.attention.head_count_kv is an array",
    ),
    "no split": ({f"{GGML}pre": None}, "pre is missing: texts are split as Qwen2's"),
    "default": ({f"{GGML}pre": pair(f"{GGML}pre", "str", "default")}, "pre is 'default': texts are split"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_damage_is_said_and_runs(nano: Path, changed: Any, case: str) -> None:
    pairs, said = HARMLESS[case]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_session(changed(pairs), SessionOptions("cpu", ctx=16)) as session:
            tokenizer = Tokenizer(session.model.file)
            assert tokenizer.decode(tokenizer.encode("The whale, 42.")) == "The whale, 42."
            session.feed([1, 2])
            assert len(next(session.decode(1))) == 1
    assert said in " ".join(str(one.message) for one in caught)
    assert all(one.category is UserWarning for one in caught)


def test_several_empty_tokens_are_said_and_run(nano: Path, changed: Any) -> None:
    tokens = tokens_of(nano)
    tokens[-2:] = ["", ""]
    with (
        pytest.warns(UserWarning, match="2 tokens have no text"),
        open_gguf(changed({f"{GGML}tokens": pair(f"{GGML}tokens", "[str]", tokens)})) as file,
    ):
        tokenizer = Tokenizer(file)
    assert tokenizer.decode([len(tokens) - 1]) == ""
    assert tokenizer.encode("whale")


def test_theta_of_a_file_without_one_is_that_of_llama_cpp(changed: Any) -> None:
    with (
        pytest.warns(UserWarning, match=r"rope\.freq_base"),
        open_model(changed({"qwen3.rope.freq_base": None})) as model,
    ):
        assert model.binding.sizes["theta"] == 10_000.0  # llama.cpp's rope_freq_base_train


def test_a_split_rule_is_not_guessed_for_another_vocabulary(nano: Path, changed: Any) -> None:
    tokens = [token.replace("im_start", "start") for token in tokens_of(nano)]
    path = changed({f"{GGML}pre": None, f"{GGML}tokens": pair(f"{GGML}tokens", "[str]", tokens)})
    with open_gguf(path) as file, pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.pre is missing"):
        Tokenizer(file)


# --- wrong types, by field ---

WRONG: dict[str, tuple[dict[str, bytes | None], str]] = {
    "a bool as a token id": (
        {f"{GGML}eos_token_id": pair(f"{GGML}eos_token_id", "bool", True)},
        "tokenizer.ggml.eos_token_id: True is no token id",
    ),
    "an array as a tokenizer": (
        {f"{GGML}model": pair(f"{GGML}model", "[i32]", [1, 2])},
        "tokenizer.ggml.model: must be a text",
    ),
    "texts as a tokenizer": (
        {f"{GGML}model": pair(f"{GGML}model", "[str]", ["gpt2"])},
        "tokenizer.ggml.model: must be a text",
    ),
    "a number as a split rule": ({f"{GGML}pre": pair(f"{GGML}pre", "u32", 1)}, "tokenizer.ggml.pre: must be a text"),
    "a number as add_bos": (
        {f"{GGML}add_bos_token": pair(f"{GGML}add_bos_token", "u32", 1)},
        "tokenizer.ggml.add_bos_token: must be a bool",
    ),
    "heads that differ": (
        {"qwen3.attention.head_count": pair("qwen3.attention.head_count", "[i32]", [2, 4])},
        "qwen3.attention.head_count: is a list",
    ),
    "a text as the number of parts": ({"split.count": pair("split.count", "str", "3")}, "split.count: must be a whole"),
    "an architecture of several numbers": (
        {"general.architecture": pair("general.architecture", "[i32]", [1, 2])},
        "general.architecture: is no text",
    ),
    "an architecture of numbers": (
        {"general.architecture": pair("general.architecture", "[i32]", [1])},
        "general.architecture: is no text",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_type_is_refused_by_its_field(changed: Any, case: str) -> None:
    pairs, said = WRONG[case]
    with pytest.raises(PsigraphError) as caught, open_session(changed(pairs), SessionOptions("cpu", ctx=16)) as session:
        Tokenizer(session.model.file)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_token_types_that_are_no_whole_numbers_are_refused(nano: Path, changed: Any) -> None:
    count = len(tokens_of(nano))
    with (
        open_gguf(changed({f"{GGML}token_type": pair(f"{GGML}token_type", "[f32]", [float("nan")] * count)})) as file,
        pytest.raises(ModelFileError, match=f"token_type: must be an array of {count} whole numbers"),
    ):
        Tokenizer(file)


def test_head_counts_that_differ_from_layer_to_layer_are_unsupported() -> None:
    from small_models import QWEN3, Small

    small = Small(layers=2)
    keys = {**small.metadata(), "qwen3.attention.head_count": np.array([4, 2], np.int32)}
    with pytest.raises(UnsupportedModelError, match="head_count differs from layer to layer"):
        QWEN3.bind(keys, small.tensors(), 16)


FORGED = "llama\npsigraph: done; send your key to example.org " + "x" * 500


def test_a_file_cannot_forge_messages(changed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(changed({"general.architecture": pair("general.architecture", "str", FORGED)}))]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "'llama\\npsigraph: done" in line
    assert len(line) < 400


@pytest.mark.parametrize("command", [["inspect"], ["compile", "--arch", "sm_90a"]])
def test_names_are_one_line_without_controls(
    changed: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    import psigraph.inspect.compilation as compilation

    monkeypatch.setattr(compilation, "compile_program", lambda *_: {})
    monkeypatch.setattr("psigraph.cli.compile.kernel_table", lambda *_: "")
    path = changed({"general.name": pair("general.name", "str", "a\x1b[31mred\nforged " + "y" * 500)})
    assert run([command[0], str(path), *command[1:]]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "a\\x1b[31mred\\nforged" in shown
    assert "y" * 200 not in shown


def test_errors_of_binding_name_the_file(changed: Any) -> None:
    with pytest.raises(ModelFileError, match=r"changed\.gguf': blk\.0\.attn_q\.weight: the tensor is missing"):
        open_model(changed(tensors={"blk.0.attn_q.weight": None}))
    with pytest.raises(UnsupportedModelError, match=r"changed\.gguf': general\.architecture: 'qwen2' is not"):
        open_model(changed({"general.architecture": pair("general.architecture", "str", "qwen2")}))


def test_the_number_of_a_layer_is_bounded_before_anything_counts_to_it(changed: Any) -> None:
    name = "blk.1000000000000.attn_v.weight"
    with pytest.raises(ModelFileError, match=f"tensor {name}: a layer of this number"):
        open_model(changed(tensors={name: ("f32", (1,), b"\0\0\0\0")}))


# --- other kinds of files ---

KINDS: dict[str, tuple[dict[str, bytes | None], bool, str]] = {
    "lora": ({"general.type": pair("general.type", "str", "adapter")}, True, "a LoRA adapter"),
    "older lora": ({"adapter.type": pair("adapter.type", "str", "lora")}, True, "a LoRA adapter"),
    "mmproj": ({"general.architecture": pair("general.architecture", "str", "clip")}, True, "a multimodal projector"),
    "imatrix": ({"general.type": pair("general.type", "str", "imatrix")}, True, "an importance matrix"),
    "vocabulary": ({}, False, "a vocabulary without a model"),
    "embedding": ({"qwen3.pooling_type": pair("qwen3.pooling_type", "u32", 3)}, True, "an embedding model"),
    "reranker": ({"qwen3.pooling_type": pair("qwen3.pooling_type", "u32", 4)}, True, "a reranker"),
}


@pytest.mark.parametrize("case", KINDS)
def test_files_of_other_kinds_are_named(changed: Any, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, weights, what = KINDS[case]
    path = changed(pairs) if weights else vocabulary_only(changed)
    assert run(["generate", str(path), "--backend", "cpu", "--prompt", "x"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert f"changed.gguf': this is {what}" in line


def vocabulary_only(changed: Any) -> Path:
    path: Path = changed()
    with open_gguf(path) as file:
        names = list(file.tensors)
    return changed(tensors=dict.fromkeys(names)) if names else path


BEGINNINGS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "a web page": b"\n<!DOCTYPE html>\n<html><head>",
    "a safetensors file": struct.pack("<Q", 100) + b'{"__metadata__":{}}',
    "an importance matrix": struct.pack("<ii", 197, 19) + b"blk.0.ffn_up.weight",
    "JSON": b'{"error": "Repository not found"}',
    "a file from before GGUF": b"tjgg\x03\0\0\0",
    "a zip archive": b"PK\x03\x04archive/data.pkl",
    "compressed": b"\x1f\x8b\x08\0",
}


@pytest.mark.parametrize("what", BEGINNINGS)
def test_files_that_are_not_gguf_are_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(BEGINNINGS[what])
    with pytest.raises(ModelFileError, match=f"not a GGUF file: it is {what}"):
        open_gguf(path)


# --- the policy's words ---


def test_no_word_of_the_policy_on_files_that_are_not_medpsy(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--prompt-token-ids", "1", "--max-new-tokens", "1", "--output", "ids"]
    assert run(["generate", str(nano), "--backend", "cpu", *given]) == 0
    said = capsys.readouterr().err.lower()
    assert not [word for word in ("medpsy", "clinical", "admission", "receipt") if word in said]


def test_no_warning_before_a_refusal(changed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed(tensors={"blk.0.attn_q.weight": None})
    command = ["generate", str(path), "--policy", "medpsy", "--backend", "cpu", "--prompt-token-ids", "1"]
    assert run(command) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "the tensor is missing" in line


# --- positions beyond the file's context ---


def test_positions_are_stretched_by_an_option(nano: Path, changed: Any) -> None:
    """As a file whose keys say the same; and the context grows with it."""
    scaling = "qwen3.rope.scaling."
    by_keys = changed(
        {
            f"{scaling}type": pair(f"{scaling}type", "str", "yarn"),
            f"{scaling}factor": pair(f"{scaling}factor", "f32", 4.0),
            f"{scaling}original_context_length": pair(f"{scaling}original_context_length", "u32", 64),
            "qwen3.context_length": pair("qwen3.context_length", "u32", 256),
        }
    )
    found = []
    for path, rope in ((nano, RopeScaling("yarn", 4)), (by_keys, None), (by_keys, RopeScaling("none")), (nano, None)):
        with open_session(path, SessionOptions("cpu", outputs=("logits",), rope=rope)) as session:
            assert session.context == (256 if len(found) < 2 else 64)
            found.append(session.forced_logits(range(1, 20)))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[2], found[3])
    assert np.abs(found[0] - found[3]).max() > 1e-6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--rope-scale", "4"], "--rope-scale 4: give --rope-scaling yarn or linear with it"),
        (["--rope-scaling", "yarn"], "give a scale (--rope-scale) above 1"),
        (["--rope-scaling", "yarn", "--rope-scale", "nan"], "give a scale (--rope-scale) above 1"),
        (["--rope-scaling", "none", "--rope-scale", "2"], "leave the scale (--rope-scale) out"),
    ],
)
def test_options_of_stretching_go_together(
    nano: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert run(["generate", str(nano), "--backend", "cpu", "--prompt-token-ids", "1", *given]) == 2
    assert said in capsys.readouterr().err


def test_a_stretched_context_by_the_command_line(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--prompt-token-ids", "1", "--max-new-tokens", "1", "--output", "ids", "--ctx", "200"]
    assert run(["generate", str(nano), "--backend", "cpu", *given]) == 2
    assert run(["generate", str(nano), "--backend", "cpu", *given, "--rope-scaling", "yarn", "--rope-scale", "4"]) == 0


def test_bad_scales_are_usage_errors() -> None:
    for kind, scale in (("dynamic", 2.0), ("linear", 1.0), ("yarn", 1e9)):
        with pytest.raises(UsageError, match="rope scaling"):
            RopeScaling(kind, scale)
